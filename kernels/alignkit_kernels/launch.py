"""Launch choices by architecture. None of them changes a bit of any result; see `tiles` for what would."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Launch:
    """stages: loop steps whose loads are in flight together, as asynchronous copies.
    backward_parts, backward_warps: how a tile's loop is shared out where nothing is summed.
    noise_tile, noise_warps: the kernels that write noise."""

    stages: int = 4
    backward_parts: int = 4
    backward_warps: int = 2
    noise_tile: int = 1024
    noise_warps: int = 4


# Timed on an H200 (benchmarks/results/h200-sweep.csv); for the others taken over from there.
LAUNCHES = {80: Launch(), 90: Launch(), 100: Launch()}


def stages_for(wanted: int, aligned: bool) -> int:
    """1 where samples are read element by element: such loads are too narrow for asynchronous copies."""
    return wanted if aligned else 1


def launch_for(device: torch.device) -> Launch:
    return LAUNCHES[_generation(device.index) if device.type == "cuda" else min(LAUNCHES)]


@lru_cache
def _generation(index: int | None) -> int:
    """The newest known architecture that is not newer than the device's."""
    major, minor = torch.cuda.get_device_capability(index)
    return max((known for known in LAUNCHES if known <= 10 * major + minor), default=min(LAUNCHES))
