"""Starts the kernels of `pair_region_errors`; the same signatures as the reference's."""

import torch
from torch import Tensor

from ..dispatch import launch
from ..errors.launch import sum_tiles
from ..errors.reference import compute_dtype
from ..launch import ODD_UNROLL, TRITON_DTYPE, launch_for
from ..layout import Layout, by_sample, layout_of
from ..tiles import NUM_WARPS, TILE
from .kernel import pair_region_errors_backward_kernel, pair_region_errors_kernel


def unroll_of(layout: Layout, device: torch.device) -> int:
    return launch_for(device).pair_unroll if layout.aligned else ODD_UNROLL


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
    regions = None if regions is None else regions.contiguous()
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, noise_w, noise_l)
    ]
    dtype = compute_dtype(*tensors[:6])
    batch, tiles = pred_w.shape[0], layout.tiles(TILE)
    partial = pred_w.new_empty((6, batch, num_regions, tiles), dtype=dtype)
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_kernel, batch * tiles,
            *tensors, coefficients.contiguous(), regions, partial,
            *(0 if x is None else x.stride(0) for x in tensors),
            batch, layout.slabs, layout.loop, layout.inner, num_regions, *layout.label_arguments(),
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None,
            LABELS=layout.labels, HAS_REFERENCE=reference_w is not None,
            DTYPE=TRITON_DTYPE[dtype], ALIGNED=layout.aligned, TILE=TILE,
            UNROLL=unroll_of(layout, pred_w.device), num_warps=NUM_WARPS,
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
    regions = None if regions is None else regions.contiguous()
    layout = layout_of(pred_w.shape, regions)
    tensors = [
        None if x is None else by_sample(x, layout.aligned)
        for x in (pred_w, pred_l, clean_w, clean_l, noise_w, noise_l)
    ]
    dpred_w, dpred_l = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pred_w, pred_l))
    with torch.cuda.device_of(pred_w):
        launch(
            pair_region_errors_backward_kernel, pred_w.shape[0] * layout.tiles(TILE),
            grad.contiguous(), *tensors, coefficients.contiguous(), regions, dpred_w, dpred_l,
            *(0 if x is None else x.stride(0) for x in tensors),
            pred_w.shape[0], layout.slabs, layout.loop, layout.inner, grad.shape[2], *layout.label_arguments(),
            SOURCE_W=source_w, SOURCE_L=source_l, SHARED=noise_l is None, LABELS=layout.labels,
            DTYPE=TRITON_DTYPE[compute_dtype(*tensors[:4])], ALIGNED=layout.aligned, TILE=TILE,
            UNROLL=unroll_of(layout, pred_w.device), num_warps=NUM_WARPS,
        )  # fmt: skip
    return dpred_w, dpred_l
