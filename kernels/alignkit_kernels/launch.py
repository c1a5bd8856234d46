"""Launch choices by architecture. None of them changes a bit of any result; see `tiles` for what would."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl

from .sources import KEYED

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Launch:
    """unroll, pair_unroll: loop steps whose loads are in flight together, where loads are what a kernel waits for.
    noise_tile, noise_warps: the kernels that write noise."""

    unroll: int
    pair_unroll: int
    noise_tile: int
    noise_warps: int


# Calculated (bytes in flight to cover the memory's latency), not yet timed on a GPU.
LAUNCHES = {
    80: Launch(unroll=4, pair_unroll=2, noise_tile=1024, noise_warps=4),
    90: Launch(unroll=4, pair_unroll=2, noise_tile=1024, noise_warps=4),
    100: Launch(unroll=4, pair_unroll=2, noise_tile=1024, noise_warps=4),
}


def unroll_for(wanted: int, aligned: bool, *sources: str) -> int:
    """1 where loads are not what a kernel waits for: keyed noise keeps it busy, and odd samples are read singly."""
    return wanted if aligned and KEYED not in sources else 1


def launch_for(device: torch.device) -> Launch:
    return LAUNCHES[_generation(device.index) if device.type == "cuda" else min(LAUNCHES)]


@lru_cache
def _generation(index: int | None) -> int:
    """The newest known architecture that is not newer than the device's."""
    major, minor = torch.cuda.get_device_capability(index)
    return max((known for known in LAUNCHES if known <= 10 * major + minor), default=min(LAUNCHES))
