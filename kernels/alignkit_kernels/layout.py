"""How a sample is walked: [slabs, loop, inner], with labels shared along the loop axis and so read once.

Channels first is one slab that loops over channels; frames first is a slab a frame that loops over channels; a
label map that varies along every axis has a loop of one. A program takes a tile of neighbouring positions of `inner`
through its part of the loop: grids are [tiles of inner, slabs times parts, samples].
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

VECTOR = 8  # elements in 128 bits of bf16; a multiple of Philox's four

# Part of the numbers: the trees that sum a tile and the tiles. Changing any of them changes the last bits of every
# result. Samples read element by element take half a tile: eight addresses for each input would fill the registers.
# Two parts of the loop: one leaves a chip of 132 multiprocessors half empty at one pair, four cost 6 % at sixteen
# (H200, benchmarks/results/h200-sweep.csv).
TILE, ODD_TILE, NUM_WARPS, PARTS = 256, 128, 1, 2
SUM_BLOCK, SUM_WARPS = 512, 4
MOST_SLABS = 2**13  # a grid's second axis ends at 65535, and a slab takes up to 8 of it


@dataclass(frozen=True)
class Layout:
    slabs: int
    loop: int
    inner: int
    labels: str  # "none", "dense" (consecutive along inner) or "strided"
    label_batch: int = 0
    label_slab: int = 0
    plane: int = 1  # inner positions i split into i // plane, i % plane // line and i % line
    line: int = 1
    step_plane: int = 0
    step_line: int = 0
    step: int = 0

    @property
    def aligned(self) -> bool:
        return self.inner % VECTOR == 0

    @property
    def tile(self) -> int:
        return TILE if self.aligned else ODD_TILE

    def grid(self, batch: int, parts: int) -> tuple[int, int, int]:
        return -(-self.inner // self.tile), self.slabs * self.parts(parts), batch

    def parts(self, wanted: int) -> int:
        """In how many the loop is cut: no more than it has steps."""
        return min(wanted, self.loop)

    def label_arguments(self) -> tuple[int, ...]:
        return (
            self.label_batch, self.label_slab, self.plane, self.line, self.step_plane, self.step_line, self.step
        )  # fmt: skip


def layout_of(shape: torch.Size, regions: Tensor | None) -> Layout:
    """The walk over latents of `shape` for a contiguous label map; without one, over axis 1."""
    sizes = list(shape[1:])
    if regions is None:
        return Layout(1, sizes[0], prod(sizes[1:]), "none")
    shared = [i for i, size in enumerate(sizes) if size > 1 and regions.shape[i + 1] == 1]
    if shared and prod(sizes[: shared[0]]) <= MOST_SLABS:
        axis = shared[0]
        slabs, loop, inner = prod(sizes[:axis]), sizes[axis], sizes[axis + 1 :]
    else:
        axis = 0
        slabs, loop, inner = sizes[0], 1, sizes[1:]
    steps = [0 if size == 1 else stride for size, stride in zip(regions.shape, regions.stride(), strict=True)]
    inner_steps = steps[axis + 2 :]
    label_inner = prod(regions.shape[axis + 2 :])
    batch_step, slab_step = steps[0], 0 if slabs == 1 else label_inner
    if label_inner == prod(inner):
        return Layout(slabs, loop, prod(inner), "dense", batch_step, slab_step)
    sizes3, steps3 = [1] * (3 - len(inner)) + inner, [0] * (3 - len(inner)) + inner_steps
    plane, line = sizes3[1] * sizes3[2], sizes3[2]
    return Layout(slabs, loop, prod(inner), "strided", batch_step, slab_step, plane, line, *steps3)


def labels_by_sample(regions: Tensor | None) -> Tensor | None:
    """A label map as the kernels read it: contiguous, and starting where eight labels can be read at once."""
    if regions is None or (regions.is_contiguous() and regions.data_ptr() % VECTOR == 0):
        return regions
    return regions.clone(memory_format=torch.contiguous_format)


def by_sample(x: Tensor, aligned: bool) -> Tensor:
    """`x` itself if every sample is contiguous (halves of a batch are), else a contiguous copy.

    Where the kernel reads whole vectors a misaligned view is copied too, so that which variant runs, and with
    it every bit, depends on shapes and dtypes alone.
    """
    if not x[0].is_contiguous():
        x = x.contiguous()
    if aligned and (x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16):
        x = x.clone(memory_format=torch.contiguous_format)
    return x
