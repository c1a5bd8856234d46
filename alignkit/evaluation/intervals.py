"""How far a difference between two sets of the same prompts may be chance."""

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
