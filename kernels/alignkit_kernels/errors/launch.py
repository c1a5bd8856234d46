"""Starts the kernels of `region_errors`; the same signatures as the reference's."""

import torch
from torch import Tensor

from ..dispatch import launch
from ..launch import TRITON_DTYPE, launch_for, stages_for
from ..layout import NUM_WARPS, PARTS, SUM_BLOCK, SUM_WARPS, by_sample, labels_by_sample, layout_of
from ..tiles import sum_tiles_kernel
from .kernel import region_errors_backward_kernel, region_errors_kernel
from .reference import compute_dtype


def forward(
    pred: Tensor,
    reference: Tensor | None,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
    num_regions: int,
) -> Tensor:
    """fp64 [3, B, R]: count, error, gap (0 without a reference). Two launches."""
    regions = labels_by_sample(regions)
    layout = layout_of(pred.shape, regions)
    dtype = compute_dtype(pred, reference, clean)
    pred, clean, noise = (by_sample(x, layout.aligned) for x in (pred, clean, noise))
    reference_row = 0
    if reference is not None:
        reference = by_sample(reference, layout.aligned)
        reference_row = reference.stride(0)
    batch = pred.shape[0]
    grid = layout.grid(batch, PARTS)
    partial = pred.new_empty((3, batch, num_regions, grid[0] * grid[1]), dtype=dtype)
    with torch.cuda.device_of(pred):
        launch(
            region_errors_kernel, grid,
            pred, reference, clean, noise, coefficients.contiguous(), regions, partial,
            pred.stride(0), reference_row, clean.stride(0), noise.stride(0),
            batch, layout.loop, layout.parts(PARTS), layout.inner, num_regions, *layout.label_arguments(), 255,
            SOURCE=source, LABELS=layout.labels, HAS_REFERENCE=reference is not None,
            DTYPE=TRITON_DTYPE[dtype], ALIGNED=layout.aligned,
            TILE=layout.tile, STAGES=stages_for(launch_for(pred.device).stages, layout.aligned), num_warps=NUM_WARPS,
        )  # fmt: skip
        return sum_tiles(partial)


def sum_tiles(partial: Tensor) -> Tensor:
    """fp64 sums over the last axis of partial sums [Q, B, R, programs]. One launch."""
    sums = partial.new_empty(partial.shape[:-1], dtype=torch.float64)
    launch(
        sum_tiles_kernel, (sums.numel(),), partial, sums, partial.shape[-1],
        BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
    )  # fmt: skip
    return sums


def backward(
    grad: Tensor,
    pred: Tensor,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
) -> Tensor:
    """d(loss)/d(pred), contiguous, in pred's dtype. One launch."""
    regions = labels_by_sample(regions)
    layout = layout_of(pred.shape, regions)
    pred, clean, noise = (by_sample(x, layout.aligned) for x in (pred, clean, noise))
    dpred = torch.empty_like(pred, memory_format=torch.contiguous_format)
    choice = launch_for(pred.device)
    with torch.cuda.device_of(pred):
        launch(
            region_errors_backward_kernel, layout.grid(pred.shape[0], choice.backward_parts),
            grad.contiguous(), pred, clean, noise, coefficients.contiguous(), regions, dpred,
            pred.stride(0), clean.stride(0), noise.stride(0), dpred.stride(0),
            pred.shape[0], layout.loop, layout.parts(choice.backward_parts), layout.inner, grad.shape[2],
            *layout.label_arguments(), 255,
            SOURCE=source, LABELS=layout.labels, DTYPE=TRITON_DTYPE[compute_dtype(pred, clean)],
            ALIGNED=layout.aligned, TILE=layout.tile, STAGES=stages_for(choice.stages, layout.aligned),
            num_warps=choice.backward_warps,
        )  # fmt: skip
    return dpred
