"""Timestep laws: at which point of the path each pair is compared, a function of (seed, pair id, epoch) alone.

A law is a class with `draw`. One that learns from training has `observe(step)` too, called after each optimizer step,
and `state` and `load_state`, which put what it has learnt into every checkpoint (`alignkit.training.state`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.models import VideoModel
from alignkit_kernels import NoiseKey, Stream, keyed_rand, keyed_randn


@dataclass(frozen=True)
class PathPoints:
    """Points of the path for B pairs: coefficients fp64 [B, 4] and the network's timesteps fp64 [B], on CPU.

    rows: int64 [B], which rows of the sampler's schedule they are; None off it. weight: fp64 [B], what a pair's loss
    must be multiplied by for the law to stay unbiased; None for 1.
    """

    coefficients: Tensor
    timesteps: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None


class Law(Protocol):
    def draw(self, ids: Tensor, epochs: Tensor) -> PathPoints:
        """The points of pairs `ids` in `epochs`, int64 [B] each."""


@dataclass(frozen=True)
class Uniform:
    """Uniform on the model's own path (for Wan moved by its flow shift)."""

    config: Config
    model: VideoModel

    def draw(self, ids: Tensor, epochs: Tensor) -> PathPoints:
        u = keyed_rand((len(ids), 1), _key(self.config, ids, epochs), device="cpu", dtype=torch.float64)[:, 0]
        return PathPoints(*self.model.training_path(u))


@dataclass(frozen=True)
class LogitNormal:
    """The sigmoid of a standard normal (arXiv 2403.03206) on the model's own path."""

    config: Config
    model: VideoModel

    def draw(self, ids: Tensor, epochs: Tensor) -> PathPoints:
        normal = keyed_randn((len(ids), 1), _key(self.config, ids, epochs), device="cpu", dtype=torch.float64)[:, 0]
        return PathPoints(*self.model.training_path(torch.sigmoid(normal)))


@dataclass(frozen=True)
class OnSchedule:
    """One of the sampler's steps, each as likely, with the timestep that the network is given there."""

    config: Config
    model: VideoModel

    def draw(self, ids: Tensor, epochs: Tensor) -> PathPoints:
        schedule = self.model.schedule(self.config.sample.num_inference_steps)
        u = keyed_rand((len(ids), 1), _key(self.config, ids, epochs), device="cpu", dtype=torch.float64)[:, 0]
        rows = (u * len(schedule)).long().clamp(max=len(schedule) - 1)
        return PathPoints(schedule.coefficients[rows], schedule.timesteps[rows], rows)


LAWS: dict[str, type[Law]] = {"logit_normal": LogitNormal, "uniform": Uniform, "schedule": OnSchedule}
"""By `noise.timesteps`."""


def start_law(config: Config, model: VideoModel) -> Law:
    return LAWS[config.noise.timesteps](config, model)


def _key(config: Config, ids: Tensor, epochs: Tensor) -> NoiseKey:
    return NoiseKey(config.train.seed, ids, epochs, Stream.TIMESTEP)
