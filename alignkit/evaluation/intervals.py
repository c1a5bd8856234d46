"""How far a difference between two sets of the same prompts may be chance."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
SEED = 0


def paired_interval(before: np.ndarray, after: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of mean(after − before), for two arrays [N] over the same N prompts and noises.

    Prompts are drawn with replacement, both sides of one together (Efron & Tibshirani 1993, chapter 13): what the two
    sides share does not widen the interval. The same arrays give the same interval.
    """
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    rng = np.random.default_rng(SEED)
    means = np.array([change[rng.integers(len(change), size=len(change))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Means over N samples of each side, and the 95 % bootstrap interval of mean(second − first) over its samples."""

    measure: str
    first: float
    second: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        return self.low > 0 or self.high < 0

    def written(self, scale: float, digits: int) -> tuple[str, str, str]:
        """The change of the mean and the interval's ends, each with its sign."""
        change, low, high = (scale * value for value in (self.second - self.first, self.low, self.high))
        return f"{change:+.{digits}f}", f"{low:+.{digits}f}", f"{high:+.{digits}f}"


def difference(measure: str, first: np.ndarray, second: np.ndarray) -> Difference:
    """Of two arrays [N] over the same N prompts and noises, as `paired_interval` has it."""
    return Difference(measure, float(first.mean()), float(second.mean()), *paired_interval(first, second))
