"""Starts the kernel of a preference loss's head; the same meaning as the reference's."""

import struct

import torch
from torch import Tensor

from ..dispatch import launch
from .kernel import preference_head_kernel
from .reference import NUMBERS, Settings

BLOCK = 32  # pairs at a time, one a lane


def bits(x: float) -> int:
    """The integer with the bits of an fp64."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def head(
    name: str,
    sums: Tensor,
    stored: tuple[Tensor, Tensor] | None,
    settings: Settings,
    beta: Tensor | None,
    strength: Tensor | None,
    importance: Tensor | None,
    guard: Tensor | None,
    preference: Tensor | None,
    elements: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.head` in one launch."""
    _, batch, num_regions = sums.shape
    loss, per_pair = sums.new_empty(()), sums.new_empty(batch)
    numbers, weights = sums.new_empty(len(NUMBERS), batch), sums.new_empty((2, batch, num_regions), dtype=dtype)
    with torch.cuda.device_of(sums):
        launch(
            preference_head_kernel, (1,),
            sums, *(stored or (None, None)), beta, strength, importance, guard, preference,
            loss, per_pair, numbers, weights, batch, num_regions, elements, *map(bits, settings),
            HEAD=name, SAFEGUARD=settings.mu >= 0, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return loss, per_pair, numbers, weights
