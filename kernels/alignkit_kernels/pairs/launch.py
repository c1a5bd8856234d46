"""Starts the kernels of `pair_region_errors`; the same signatures as the reference's."""

import torch
from torch import Tensor

from ..dispatch import launch
from ..errors.launch import sum_tiles
from ..errors.reference import compute_dtype
from ..launch import TRITON_DTYPE, launch_for, unroll_for
from ..layout import NUM_WARPS, by_sample, labels_by_sample, layout_of
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
) -> Tensor:
    """fp64 [6, B, R]: count, error_w, error_l, gap_w, gap_l (0 without references), cross. Two launches."""
    regions = labels_by_sample(regions)
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, noise_w, noise_l)
    ]
    dtype = compute_dtype(*tensors[:6])
    batch, tiles = pred_w.shape[0], layout.tiles
    partial = pred_w.new_empty((6, batch, num_regions, tiles), dtype=dtype)
    unroll = unroll_for(launch_for(pred_w.device).pair_unroll, layout.aligned, source_w, source_l)
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_kernel, batch * tiles,
            *tensors, coefficients.contiguous(), regions, partial,
            *(0 if x is None else x.stride(0) for x in tensors),
            batch, layout.slabs, layout.loop, layout.inner, num_regions, *layout.label_arguments(),
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None,
            LABELS=layout.labels, HAS_REFERENCE=reference_w is not None,
            DTYPE=TRITON_DTYPE[dtype], ALIGNED=layout.aligned,
            TILE=layout.tile, UNROLL=unroll, num_warps=NUM_WARPS,
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
    regions = labels_by_sample(regions)
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, clean_w, clean_l, noise_w, noise_l)
    ]
    dpred_w, dpred_l = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pred_w, pred_l))
    unroll = unroll_for(launch_for(pred_w.device).pair_unroll, layout.aligned, source_w, source_l)
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_backward_kernel, pred_w.shape[0] * layout.tiles,
            grad.contiguous(), *tensors, coefficients.contiguous(), regions, dpred_w, dpred_l,
            *(0 if x is None else x.stride(0) for x in tensors),
            pred_w.shape[0], layout.slabs, layout.loop, layout.inner, grad.shape[2], *layout.label_arguments(),
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None, LABELS=layout.labels,
            DTYPE=TRITON_DTYPE[compute_dtype(*tensors[:4])], ALIGNED=layout.aligned,
            TILE=layout.tile, UNROLL=unroll, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dpred_w, dpred_l
