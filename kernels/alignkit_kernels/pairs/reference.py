"""Both sides of a pair in plain torch: the meaning of the kernel beside it."""

import torch
from torch import Tensor

from ..errors.reference import (
    compute_dtype,
    gap_terms,
    region_counts,
    region_sums,
    scaled_by_region,
    target_of,
)
from ..noise.reference import keyed_normal
from ..sources import GIVEN, KEYED


def targets_of(
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The targets of winner and loser. No noise for the loser means the winner's noise."""
    if noise_l is None:
        if source_w == KEYED:  # of both, and drawn once
            source_w, noise_w = GIVEN, keyed_normal(list(clean_w.shape), noise_w, dtype)
        source_l, noise_l = source_w, noise_w
    return (
        target_of(clean_w, coefficients, source_w, noise_w, dtype),
        target_of(clean_l, coefficients, source_l, noise_l, dtype),
    )


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
    """fp64 [6, B, R]: count, error_w, error_l, gap_w, gap_l (0 without references), cross.

    highest: what labels above it count as; 1 makes a mask of them.
    """
    regions = None if regions is None else regions.clamp(max=highest)
    dtype = compute_dtype(pred_w, pred_l, reference_w, reference_l, clean_w, clean_l)
    target_w, target_l = targets_of(clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, dtype)

    def sums(terms: Tensor) -> Tensor:
        return region_sums(terms, regions, num_regions)

    residual_w, residual_l = pred_w.to(dtype) - target_w, pred_l.to(dtype) - target_l
    cross = sums(residual_w * residual_l)
    error_w, error_l = sums(residual_w.square_()), sums(residual_l.square_())
    gap_w = gap_l = torch.zeros_like(error_w)
    if reference_w is not None and reference_l is not None:
        gap_w = sums(gap_terms(pred_w.to(dtype), reference_w.to(dtype), target_w))
        gap_l = sums(gap_terms(pred_l.to(dtype), reference_l.to(dtype), target_l))
    return torch.stack((region_counts(pred_w, regions, num_regions), error_w, error_l, gap_w, gap_l, cross))


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
    """d(loss)/d(pred) of each side: 2 * g[region] * (its residual) + g_cross[region] * (the other's residual)."""
    out = (
        torch.empty_like(pred_w, memory_format=torch.contiguous_format),
        torch.empty_like(pred_l, memory_format=torch.contiguous_format),
    )
    inputs = pred_w, pred_l, clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, regions
    write_gradients(out, grad, None, *inputs)
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
    """Fill `out` with the gradients.

    grads: fp64 [6, B, R], of the sums; or, with `upstream`, what a pair's residuals of winner and loser are multiplied
    by, [2, B, R], times what follows: upstream is by_loss [], importance [B] (None: 1) and by_pair [B], and the factor
    of a pair by_loss * importance / B + by_pair, of which a missing gradient counts 0.
    """
    dtype = compute_dtype(pred_w, pred_l, clean_w, clean_l)
    regions = None if regions is None else regions.clamp(max=highest)
    target_w, target_l = targets_of(clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, dtype)
    residual_w = torch.sub(pred_w.to(dtype), target_w, out=target_w)
    residual_l = torch.sub(pred_l.to(dtype), target_l, out=target_l)
    if upstream is None:
        _, error_w, error_l, gap_w, gap_l, cross = grads
        dpred_w = scaled_by_region(residual_w.clone(), 2 * (error_w + gap_w), regions)
        dpred_l = scaled_by_region(residual_l.clone(), 2 * (error_l + gap_l), regions)
        dpred_w += scaled_by_region(residual_l, cross, regions)
        dpred_l += scaled_by_region(residual_w, cross, regions)
    else:
        by_loss, importance, by_pair = (None if x is None else x.to(dtype) for x in upstream)
        batch = pred_w.shape[0]
        factor = torch.zeros(batch, dtype=dtype, device=pred_w.device)
        if by_loss is not None:
            factor = factor + by_loss / batch * (1 if importance is None else importance)
        if by_pair is not None:
            factor = factor + by_pair
        weight_w, weight_l = grads * factor[:, None]
        dpred_w = scaled_by_region(residual_w, weight_w, regions, highest)
        dpred_l = scaled_by_region(residual_l, weight_l, regions, highest)
    for x, gradient in zip(out, (dpred_w, dpred_l), strict=True):
        x.copy_(gradient)
