"""Which state a pair is compared at: its point of the path, its noise and its caption, the same for both videos."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import NoiseKey, NoiseSource, Stream, add_keyed_noise, keyed_rand, keyed_randn


@dataclass(frozen=True)
class States:
    """What the network is shown for a pair batch: both videos stacked, winners first.

    states: [2B, ...]; timesteps: fp32 [2B]; text: [2B, L, D]; coefficients: fp64 [B, 4]; noise: of both videos.
    """

    states: Tensor
    timesteps: Tensor
    text: Tensor
    coefficients: Tensor
    noise: NoiseSource


def draw_path_points(config: Config, model, ids: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor]:
    """Where on the path each pair is compared: coefficients fp64 [B, 4] and network timesteps fp64 [B].

    A function of (seed, pair id, epoch) alone, by `noise.timesteps`: "logit_normal" (the sigmoid of a normal)
    and "uniform" are moved by the model's own path (for Wan its flow shift); "schedule" draws one of the
    sampler's steps.
    """
    key = NoiseKey(config.train.seed, ids, epochs, Stream.TIMESTEP)
    shape = (len(ids), 1)
    if config.noise.timesteps == "schedule":
        schedule = model.schedule(config.sample.num_inference_steps)
        u = keyed_rand(shape, key, device="cpu", dtype=torch.float64)[:, 0]
        rows = (u * len(schedule)).long().clamp(max=len(schedule) - 1)
        return schedule.coefficients[rows], schedule.timesteps[rows]
    if config.noise.timesteps == "uniform":
        return model.training_path(keyed_rand(shape, key, device="cpu", dtype=torch.float64)[:, 0])
    normal = keyed_randn(shape, key, device="cpu", dtype=torch.float64)[:, 0]
    return model.training_path(torch.sigmoid(normal))


def make_states(
    model, batch: PairBatch, coefficients: Tensor, timesteps: Tensor, noise: NoiseKey, dtype: torch.dtype
) -> States:
    """Noise both videos of each pair with the pair's own noise (by its id) at the pair's own point of the path."""
    device = batch.winner.device
    coefficients = coefficients.to(device)
    states = torch.cat([add_keyed_noise(clean, coefficients, noise) for clean in (batch.winner, batch.loser)])
    text = model.pad_text(batch.text).to(device, dtype)
    return States(
        states=states.to(dtype),
        timesteps=timesteps.to(device, torch.float32).repeat(2),
        text=text.repeat(2, 1, 1),
        coefficients=coefficients,
        noise=noise,
    )


def training_states(
    config: Config, model, batch: PairBatch, epochs: Tensor, empty_text: Tensor, dtype: torch.dtype
) -> States:
    """`make_states` at the points, with the noise and the captions that training visits in `epochs` (int64 [B]).

    A share `train.caption_dropout` of pairs is shown with `empty_text` [tokens, D], winner and loser together:
    a function of (seed, pair id, epoch).
    """
    key = NoiseKey(config.train.seed, batch.ids, epochs, Stream.CAPTION_DROPOUT)
    dropped = keyed_rand((len(batch), 1), key, device="cpu", dtype=torch.float64)[:, 0] < config.train.caption_dropout
    text = [empty_text if drop else own for own, drop in zip(batch.text, dropped.tolist(), strict=True)]
    batch = dataclasses.replace(batch, text=text)
    coefficients, timesteps = draw_path_points(config, model, batch.ids, epochs)
    noise = NoiseKey(config.train.seed, batch.ids, epochs, Stream.TRAINING)
    return make_states(model, batch, coefficients, timesteps, noise, dtype)
