"""Inference schedules as path coefficients: what a network sees and must predict at each sampler step.

Every parameterisation is four numbers (a, s, c, d) per sample:

    x_t = a·x0 + s·ε        y = c·ε + d·x0

so samplers, corruption, training and the kernels share one form and know nothing of schedulers.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The states an N-step sampler visits.

    coefficients: fp64 [N + 1, 4], rows (a, s, c, d); the last row is the clean end (a = 1, s = 0).
    timesteps: fp64 [N], what the network is given at each step (Wan's sampler truncates it to an integer
    while it solves with the exact σ, so the two cannot be derived from each other).
    """

    coefficients: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        assert self.coefficients.dtype == self.timesteps.dtype == torch.float64
        assert self.coefficients.shape == (len(self.timesteps) + 1, 4)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def fingerprint(self) -> str:
        """Changes with any coefficient or timestep; stored with whatever was made on this schedule."""
        digest = hashlib.sha256()
        for tensor in (self.coefficients, self.timesteps):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def flow_coefficients(sigmas: Tensor) -> Tensor:
    """Rectified flow at noise level σ: x_t = (1−σ)·x0 + σ·ε, y = ε − x0. fp64 [...] to fp64 [..., 4]."""
    sigmas = sigmas.double()
    one = torch.ones_like(sigmas)
    return torch.stack((1 - sigmas, sigmas, one, -one), dim=-1)


def v_coefficients(alphas_cumprod: Tensor) -> Tensor:
    """v-prediction at signal share ᾱ: x_t = √ᾱ·x0 + √(1−ᾱ)·ε, v = √ᾱ·ε − √(1−ᾱ)·x0 (arXiv 2202.00512, section 4).

    fp64 [...] to fp64 [..., 4]. ᾱ = 0, where a zero terminal signal-to-noise ratio starts, is a row like any other.
    """
    signal, noise = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    return torch.stack((signal, noise, signal, -noise), dim=-1)


def flow_shift(u: Tensor, shift: float) -> Tensor:
    """S(u) = k·u / (1 + (k−1)·u): moves noise levels towards 1 for larger latents (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def split_prediction(state: Tensor, prediction: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Solve x = a·x0 + s·ε, y = c·ε + d·x0 for (x0, ε). `coefficients` is one row [4]."""
    a, s, c, d = coefficients.tolist()
    determinant = a * c - s * d
    return (c * state - s * prediction) / determinant, (a * prediction - d * state) / determinant


def split_states(here: Tensor, there: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Solve a·x0 + s·ε at both ends of a step for (x0, ε): the pair by which a first-order solver gets from `here` to
    `there`, [B, ...] each, in one step. ends: fp64 [B, 2, 2], (a, s) of each."""
    (a, s), (next_a, next_s) = (
        (row.to(here.device).view(-1, *[1] * (here.dim() - 1)) for row in end.unbind(1)) for end in ends.unbind(1)
    )
    determinant = a * next_s - next_a * s
    here, there = here.double(), there.double()
    clean, noise = (next_s * here - s * there) / determinant, (a * there - next_a * here) / determinant
    return clean.float(), noise.float()


def common_rows(few: Schedule, many: Schedule) -> tuple[int, ...] | None:
    """Of each step of `few` the row of `many` at the same point and timestep; None where some step has none."""
    rows = []
    for coefficients, timestep in zip(few.coefficients, few.timesteps, strict=False):
        # noise levels are computed in fp32, and the network's timesteps are whole numbers or come of them
        off = (many.coefficients[:-1] - coefficients).abs().amax(dim=1) + (many.timesteps - timestep).abs() / 1000
        if off.min() > 1e-5:
            return None
        rows.append(int(off.argmin()))
    return tuple(rows)


def one_step(state: Tensor, prediction: Tensor, row: Tensor, next_row: Tensor) -> Tensor:
    """First-order solver from one schedule row to the next: Euler for flow, DDIM (η = 0) for v and ε.

    It carries nothing from step to step, which is what makes pasting known content into `state` safe.
    """
    clean, noise = split_prediction(state, prediction, row)
    a, s, _, _ = next_row.tolist()
    return a * clean + s * noise
