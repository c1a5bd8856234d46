"""Which pairs a training step sees: a function of (seed, step) alone, whatever the number of processes."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def global_batch(count: int, seed: int, step: int, size: int, first_epoch: int = 0) -> list[tuple[int, int]]:
    """(row, epoch) of the `size` pairs of step `step`, counted from 0, epochs from `first_epoch`.

    Epochs follow one another without a gap, so a batch may straddle two; each row comes once an epoch.
    """
    places = [(first_epoch + p // count, p % count) for p in range(step * size, (step + 1) * size)]
    return [(int(_epoch_order(count, seed, epoch)[place]), epoch) for epoch, place in places]


def rank_share(batch: list[tuple[int, int]], rank: int, world_size: int) -> list[tuple[int, int]]:
    """The contiguous part of the global batch that one process works on; the sizes must divide."""
    assert len(batch) % world_size == 0
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]
