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


def residuals(
    preds: tuple[Tensor, Tensor],
    cleans: tuple[Tensor, Tensor],
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Targets and pred - target of winner and loser. No noise for the loser means the winner's noise."""
    if noise_l is None:
        source_l, noise_l = source_w, noise_w
    targets = (
        target_of(cleans[0], coefficients, source_w, noise_w, dtype),
        target_of(cleans[1], coefficients, source_l, noise_l, dtype),
    )
    return targets, (preds[0].to(dtype) - targets[0], preds[1].to(dtype) - targets[1])


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
    """fp64 [6, B, R]: count, error_w, error_l, gap_w, gap_l (0 without references), cross."""
    dtype = compute_dtype(pred_w, pred_l, reference_w, reference_l, clean_w, clean_l)
    (target_w, target_l), (residual_w, residual_l) = residuals(
        (pred_w, pred_l), (clean_w, clean_l), coefficients, source_w, noise_w, source_l, noise_l, dtype
    )

    def sums(terms: Tensor) -> Tensor:
        return region_sums(terms, regions, num_regions)

    error_w, error_l, cross = sums(residual_w**2), sums(residual_l**2), sums(residual_w * residual_l)
    gap_w = gap_l = torch.zeros_like(error_w)
    if reference_w is not None:
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
    """d(loss)/d(pred) of each side: 2 * g[region] * (its residual) + g_cross[region] * (the other's)."""
    dtype = compute_dtype(pred_w, pred_l, clean_w, clean_l)
    _, (residual_w, residual_l) = residuals(
        (pred_w, pred_l), (clean_w, clean_l), coefficients, source_w, noise_w, source_l, noise_l, dtype
    )
    _, error_w, error_l, gap_w, gap_l, cross = grad
    dpred_w = scaled_by_region(residual_w, 2 * (error_w + gap_w), regions)
    dpred_l = scaled_by_region(residual_l, 2 * (error_l + gap_l), regions)
    return (
        (dpred_w + scaled_by_region(residual_l, cross, regions)).to(pred_w.dtype),
        (dpred_l + scaled_by_region(residual_w, cross, regions)).to(pred_l.dtype),
    )
