"""Timestep laws: at which point of the path each pair is compared, a function of (seed, pair id, epoch) alone.

A law is a class with `draw` and `masses`. One that learns from training has `observe(metrics)` too, called after each
optimizer step, and `state` and `load_state`, which put what it has learnt into every checkpoint
(`alignkit.training.state`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import VideoModel
from alignkit.schedules import Schedule
from alignkit_kernels import NoiseKey, Stream, keyed_rand, keyed_randn

DECAY, BASE_SHARE = 0.99, 0.1
SIGNAL = "signal"
"""The metric that `adaptive` follows, by row of the schedule: `alignkit.objectives.diagnostics.signal`."""


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
    """allowed: the rows of the schedule that lie in `noise.interval` and are the trained expert's, int64, ascending."""

    model: VideoModel
    schedule: Schedule
    allowed: Tensor

    def draw(self, ids: Tensor, epochs: Tensor, among: Tensor | None = None) -> PathPoints:
        """The points of pairs `ids` in `epochs`, int64 [B] each.

        among: rows of the schedule to choose from, int64 [B, S], where states are stored at those alone: each as likely
        that lies in `noise.interval`, or any where none does.
        """

    @property
    def masses(self) -> Tensor:
        """How likely each row of the schedule is, fp64 [N], where the law is held to them; they sum to 1."""

    @property
    def noisiest(self) -> Tensor:
        """Coefficients, fp64 [4], of the point with the most noise that the law may draw."""


class _Law:
    def __init__(self, config: Config, model: VideoModel):
        self.config, self.model = config, model
        self.schedule = model.schedule(config.sampler.num_steps)
        share = self.schedule.timesteps / model.scheduler.config.num_train_timesteps
        low, high = config.noise.bounds
        first, end = model.own_timesteps
        own = (self.schedule.timesteps >= first) & (self.schedule.timesteps < end)
        self.allowed = ((share >= low) & (share <= high) & own).nonzero()[:, 0]

    @property
    def no_rows(self) -> ConfigError:
        """None of the schedule's is allowed."""
        rows, expert = f"none of the sampler's {len(self.schedule)} steps", self.model.expert
        if expert is None:
            return ConfigError(f"noise.interval: {rows} lies in it; widen it")
        return ConfigError(
            f"noise.interval: {rows} lies in it and in the range of model.expert {expert}; widen it, or take more "
            "(rollout.num_inference_steps)"
        )

    def uniform(self, ids: Tensor, epochs: Tensor) -> Tensor:
        key = NoiseKey(self.config.train.seed, ids, epochs, Stream.TIMESTEP)
        return keyed_rand((len(ids), 1), key, device="cpu", dtype=torch.float64)[:, 0]

    def at(self, rows: Tensor, weight: Tensor | None = None) -> PathPoints:
        return PathPoints(self.schedule.coefficients[rows], self.schedule.timesteps[rows], rows, weight)

    def one_of(self, among: Tensor, u: Tensor) -> PathPoints:
        """The row of `among`, [B, S], that lies a share u of the way through those which may be drawn."""
        may = self.may_be_drawn(among)
        count = may.sum(dim=1)
        place = torch.minimum((u * count).long(), count - 1)
        chosen = (may.cumsum(dim=1) > place[:, None]).long().argmax(dim=1, keepdim=True)
        return self.at(among.gather(1, chosen)[:, 0])

    def may_be_drawn(self, among: Tensor) -> Tensor:
        """Which of `among` lie in the interval, bool [B, S]; all of a pair of which none does."""
        inside = torch.isin(among, self.allowed)
        return inside | ~inside.any(dim=1, keepdim=True)


class OnSchedule(_Law):
    """One of the sampler's steps, each as likely, with the timestep that the network is given there."""

    def __init__(self, config: Config, model: VideoModel):
        super().__init__(config, model)
        if not len(self.allowed):
            raise self.no_rows

    def draw(self, ids: Tensor, epochs: Tensor, among: Tensor | None = None) -> PathPoints:
        among = self.allowed.expand(len(ids), -1) if among is None else among
        return self.one_of(among, self.uniform(ids, epochs))

    @property
    def noisiest(self) -> Tensor:
        return self.schedule.coefficients[self.allowed[0]]

    @property
    def masses(self) -> Tensor:
        masses = torch.zeros(len(self.schedule), dtype=torch.float64)
        masses[self.allowed] = 1 / len(self.allowed)
        return masses


class Adaptive(OnSchedule):
    """More often those steps whose pairs teach more: importance sampling by the running mean of the gradient's size,
    σ(−z)·√(E_w + E_l), of earlier optimizer steps, mixed with a tenth of the plain law.

    `weight` keeps the loss an unbiased estimate of the plain law's. The one paper on this for preferences (SIPO) was
    rejected and its theorem corrected; not the default.
    """

    def __init__(self, config: Config, model: VideoModel):
        super().__init__(config, model)
        self._sums, self._counts = (torch.zeros(len(self.schedule), dtype=torch.float64) for _ in range(2))

    def draw(self, ids: Tensor, epochs: Tensor, among: Tensor | None = None) -> PathPoints:
        among = self.allowed.expand(len(ids), -1) if among is None else among
        may = self.may_be_drawn(among)
        plain = may / may.sum(dim=1, keepdim=True, dtype=torch.float64)
        size = self._sizes()[among] * may
        total = size.sum(dim=1, keepdim=True)
        likely = torch.where(total > 0, (1 - BASE_SHARE) * size / total + BASE_SHARE * plain, plain)
        below = likely.cumsum(dim=1)
        chosen = (self.uniform(ids, epochs)[:, None] * below[:, -1:] >= below).sum(dim=1, keepdim=True)
        chosen = chosen.clamp(max=among.shape[1] - 1)
        weight = (plain / likely).gather(1, chosen)[:, 0]
        return self.at(among.gather(1, chosen)[:, 0], weight)

    def _sizes(self) -> Tensor:
        """Of every row; one that no pair has been at yet counts as the mean of the others."""
        seen = self._counts > 0
        if not seen.any():
            return torch.ones_like(self._sums)
        means = self._sums / self._counts.clamp(min=torch.finfo(torch.float64).tiny)
        means = torch.where(seen, means, means[seen].mean())
        return means if means.sum() > 0 else torch.ones_like(means)

    def observe(self, metrics: dict[str, Any]) -> None:
        """After an optimizer step, with the sum of its signals and the number of its pairs by row, fp64 [2, N]."""
        sums, counts = metrics[SIGNAL]
        here = counts > 0
        self._sums[here] = DECAY * self._sums[here] + sums[here] / counts[here]
        self._counts[here] = DECAY * self._counts[here] + 1

    def state(self) -> dict[str, Tensor]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._sums, self._counts = state["sums"].clone(), state["counts"].clone()


class _OnPath(_Law):
    """A law on the model's own path, whose position u runs from 0, clean, to 1, noise."""

    def __init__(self, config: Config, model: VideoModel):
        super().__init__(config, model)
        trained = model.scheduler.config.num_train_timesteps
        low, high = config.noise.bounds
        first, end = model.own_timesteps
        self.low, self.high = 0.0, 1.0
        self.bounded = config.noise.interval is not None or model.expert is not None
        if self.bounded:
            ends = torch.tensor([low, high], dtype=torch.float64) * trained
            self.low = _first(lambda u: self._timestep(u) >= ends[:1].clamp(min=first)).item()
            self.high = _first(lambda u: (self._timestep(u) > ends[1:]) | (self._timestep(u) >= end)).item()
            if not self.low < self.high:
                raise ConfigError(
                    f"noise.interval: no timestep of the model lies in [{low:g}, {high:g}]"
                    + (f" and in the range of model.expert {model.expert}" if model.expert else "")
                    + "; widen it"
                )

    def _timestep(self, u: Tensor) -> Tensor:
        return self.model.training_path(u)[1]

    def position(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """u of each pair, fp64 [B]."""
        raise NotImplementedError

    def below(self, u: Tensor) -> Tensor:
        """The law's share below position u, fp64, without `noise.interval`."""
        raise NotImplementedError

    def draw(self, ids: Tensor, epochs: Tensor, among: Tensor | None = None) -> PathPoints:
        if among is not None:
            return self.one_of(among, self.uniform(ids, epochs))
        return PathPoints(*self.model.training_path(self.position(ids, epochs)))

    @property
    def noisiest(self) -> Tensor:
        below = torch.tensor([math.nextafter(self.high, 0.0)], dtype=torch.float64)
        return self.model.training_path(below)[0][0]

    @property
    def masses(self) -> Tensor:
        """Each row's is that of the positions which are nearest to its timestep."""
        timesteps = self.schedule.timesteps  # falling
        middles = (timesteps[1:] + timesteps[:-1]) / 2
        bounds = _first(lambda u: self._timestep(u) >= middles)
        edges = self.below(torch.cat([bounds.new_ones(1), bounds, bounds.new_zeros(1)]).clamp(self.low, self.high))
        masses = torch.zeros_like(timesteps)
        masses[self.allowed] = (edges[:-1] - edges[1:])[self.allowed]
        if not masses.sum() > 0:
            raise self.no_rows
        return masses / masses.sum()


class Uniform(_OnPath):
    """Uniform on the model's own path (for Wan moved by its flow shift)."""

    def position(self, ids: Tensor, epochs: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.uniform(ids, epochs)

    def below(self, u: Tensor) -> Tensor:
        return u


class LogitNormal(_OnPath):
    """The sigmoid of a standard normal (arXiv 2403.03206) on the model's own path."""

    def position(self, ids: Tensor, epochs: Tensor) -> Tensor:
        if not self.bounded:
            key = NoiseKey(self.config.train.seed, ids, epochs, Stream.TIMESTEP)
            normal = keyed_randn((len(ids), 1), key, device="cpu", dtype=torch.float64)[:, 0]
            return torch.sigmoid(normal)
        low, high = self.below(torch.tensor([self.low, self.high], dtype=torch.float64))
        share = low + (high - low) * self.uniform(ids, epochs)
        return torch.sigmoid(torch.special.ndtri(share)).clamp(self.low, self.high)

    def below(self, u: Tensor) -> Tensor:
        return torch.special.ndtr(torch.logit(u))


LAWS: dict[str, Callable[[Config, VideoModel], Law]] = {
    "logit_normal": LogitNormal,
    "uniform": Uniform,
    "schedule": OnSchedule,
    "adaptive": Adaptive,
}
"""By `noise.timesteps`."""


def start_law(config: Config, model: VideoModel) -> Law:
    """The law of `config.noise`; `model` needs no weights. Raises ConfigError where `noise.interval` holds nothing."""
    return LAWS[config.noise.timesteps](config, model)


STORED_DRAWS = 2**31
"""Epochs lie below: which rows are stored and which of them training draws must not come of the same numbers."""


def stored_rows(law: Law, count: int, seed: int, number: int, draw: int) -> tuple[int, ...]:
    """`count` different rows of the law's schedule, ascending, drawn by the law for one prompt or pair, `number`.

    Without replacement, by exponential races (Efraimidis and Spirakis 2006): the first to arrive, each at its mass's
    rate. Raises ConfigError where the law knows fewer rows.
    """
    masses = law.masses
    possible = int((masses > 0).sum())
    if possible < count:
        raise ConfigError(
            f"noise.path_steps: {count}, but only {possible} of the sampler's {len(masses)} steps can be drawn; lower "
            "it, or widen noise.interval"
        )
    key = NoiseKey(seed, torch.tensor([number]), STORED_DRAWS + draw, Stream.TIMESTEP)
    u = keyed_rand((1, len(masses)), key, device="cpu", dtype=torch.float64)[0]
    arrival = torch.where(masses > 0, -torch.log1p(-u) / masses, torch.inf)
    return tuple(sorted(arrival.argsort()[:count].tolist()))


def _first(reached: Callable[[Tensor], Tensor]) -> Tensor:
    """The smallest position u in [0, 1] at which `reached`, false and then true, is true; 1 where it never is."""
    size = reached(torch.zeros(1, dtype=torch.float64)).shape
    low, high = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        true = reached(middle)
        low, high = torch.where(true, low, middle), torch.where(true, middle, high)
    return torch.where(reached(torch.zeros(size, dtype=torch.float64)), 0.0, high)
