"""Where an op runs: the Triton kernels for CUDA tensors and under Triton's interpreter, else the reference."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

try:
    import triton
except ImportError:  # the reference path needs torch alone
    triton = None

HAVE_TRITON = triton is not None
INTERPRETED = HAVE_TRITON and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, set before import

_launched: Counter[str] = Counter()


def runs_kernels(x: Tensor) -> bool:
    return HAVE_TRITON and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Start a grid of programs of a kernel and count the launch.

    Fusing multiplications into additions is off, whatever triton's default becomes: it would change the bits.
    """
    _launched[kernel.__name__] += 1
    kernel[grid](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Kernel launches inside the block, by kernel name, filled in when it ends: what really ran."""
    before = _launched.copy()
    inside: Counter[str] = Counter()
    try:
        yield inside
    finally:
        inside.update(_launched - before)
