"""What a noise source makes of a pair batch."""

from dataclasses import dataclass

from torch import Tensor

from alignkit.objectives.laws import PathPoints
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import NoiseKey, NoiseSource, add_keyed_noise


@dataclass(frozen=True)
class Noised:
    """The videos of B pairs at points of the path, fp32 [B, ...] a side, and what they were noised with.

    coefficients: fp64 [B, 4], where the videos lie; timesteps: fp64 [B]; noise_w, noise_l, weight, rows: as in
    `States`.
    """

    winner: Tensor
    loser: Tensor
    coefficients: Tensor
    timesteps: Tensor
    noise_w: NoiseSource
    noise_l: NoiseSource | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None


def noise_alike(batch: PairBatch, points: PathPoints, key: NoiseKey) -> Noised:
    """Both videos of each pair with the pair's own noise, at the pair's own point."""
    coefficients = points.coefficients.to(batch.winner.device)
    winner, loser = (add_keyed_noise(clean, coefficients, key) for clean in (batch.winner, batch.loser))
    return Noised(winner, loser, coefficients, points.timesteps, key, weight=points.weight, rows=points.rows)
