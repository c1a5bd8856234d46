"""Starts the kernels of `pair_region_errors`; the same signatures as the reference's."""

import torch
from torch import Tensor

from ..dispatch import launch
from ..errors.launch import sum_tiles
from ..errors.reference import compute_dtype
from ..launch import TRITON_DTYPE, launch_for, stages_for
from ..layout import NUM_WARPS, PARTS, by_sample, labels_by_sample, layout_of
from .kernel import pair_region_errors_backward_kernel, pair_region_errors_kernel


def forward(
    pred_w: Tensor,
    pred_l: Tensor,
    reference_w: Tensor | None,
    reference_l: Tensor | None,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    regions: Tensor | None,
    num_regions: int,
    highest: int = 255,
) -> Tensor:
    """fp64 [6, B, R]: count, error_w, error_l, gap_w, gap_l (0 without references), cross. Two launches.

    highest: what labels above it count as; 1 makes a mask of them.
    """
    regions = labels_by_sample(regions)
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, noise_w, noise_l)
    ]
    dtype = compute_dtype(*tensors[:6])
    batch = pred_w.shape[0]
    grid = layout.grid(batch, PARTS)
    partial = pred_w.new_empty((6, batch, num_regions, grid[0] * grid[1]), dtype=dtype)
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_kernel, grid,
            *tensors, coefficients.contiguous(), regions, partial,
            *(0 if x is None else x.stride(0) for x in tensors),
            batch, layout.loop, layout.parts(PARTS), layout.inner, num_regions, *layout.label_arguments(), highest,
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None,
            LABELS=layout.labels, HAS_REFERENCE=reference_w is not None,
            DTYPE=TRITON_DTYPE[dtype], ALIGNED=layout.aligned, TILE=layout.tile,
            STAGES=stages_for(launch_for(pred_w.device).stages, layout.aligned), num_warps=NUM_WARPS,
        )  # fmt: skip
        return sum_tiles(partial)


def backward(
    grad: Tensor,
    pred_w: Tensor,
    pred_l: Tensor,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    regions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d(loss)/d(pred) of winner and loser, contiguous, each in its prediction's dtype. One launch."""
    out = (
        torch.empty_like(pred_w, memory_format=torch.contiguous_format),
        torch.empty_like(pred_l, memory_format=torch.contiguous_format),
    )
    inputs = pred_w, pred_l, clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, regions
    write_gradients(out, grad.contiguous(), None, *inputs)
    return out


def write_gradients(
    out: tuple[Tensor, Tensor],
    grads: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    pred_w: Tensor,
    pred_l: Tensor,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    regions: Tensor | None,
    highest: int = 255,
) -> None:
    """Fill `out`, two tensors of one stride and of contiguous samples, with the gradients. One launch.

    grads: fp64 [6, B, R], of the sums; or, with `upstream`, what a pair's residuals of winner and loser are multiplied
    by, [2, B, R], times what follows: upstream is by_loss [], importance [B] (None: 1) and by_pair [B], and the factor
    of a pair by_loss * importance / B + by_pair, of which a missing gradient counts 0.
    """
    regions = labels_by_sample(regions)
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, clean_w, clean_l, noise_w, noise_l)
    ]
    choice = launch_for(pred_w.device)
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_backward_kernel, layout.grid(pred_w.shape[0], choice.backward_parts),
            grads, *(upstream or (None, None, None)), *tensors, coefficients.contiguous(), regions, *out,
            *(0 if x is None else x.stride(0) for x in tensors), out[0].stride(0),
            pred_w.shape[0], layout.loop, layout.parts(choice.backward_parts), layout.inner, grads.shape[2],
            *layout.label_arguments(), highest,
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None, LABELS=layout.labels,
            GRADS=upstream is None, DTYPE=TRITON_DTYPE[compute_dtype(*tensors[:4])], ALIGNED=layout.aligned,
            TILE=layout.tile, STAGES=stages_for(choice.stages, layout.aligned), num_warps=choice.backward_warps,
        )  # fmt: skip
