"""LocalDPO's loss straight from predictions."""

import torch
from torch import Tensor

from . import losses
from .checks import InputError
from .losses import LocalDPOLoss
from .pairs import pair_region_errors
from .sources import NoiseSource


def local_dpo_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    noise_w: NoiseSource,
    noise_l: NoiseSource | None = None,
    *,
    regions: Tensor | None = None,
    strength: Tensor | None = None,
    ref_error_w: Tensor | None = None,
    ref_error_l: Tensor | None = None,
    beta: float = 5000.0,
    strength_range: tuple[float, float] = (0.75, 0.90),
    weight_region: float = 1.0,
    weight_global: float = 1.0,
    weight_sft: float = 0.1,
    weight_region_sft: float = 0.0,
) -> LocalDPOLoss:
    """The LocalDPO loss of B pairs; one fused pass over the predictions, then `losses.local_dpo`.

    pred, ref, clean of winner and loser: [B, C, F, H, W], [B, F, C, H, W] or [B, C, H, W], any float dtypes.
    coefficients: [B, 4] rows (a, s, c, d), shared by a pair. noise_l=None: the winner's noise.
    regions: uint8 or bool mask, 1 inside the corrupted region, every axis equal to the latents' or 1; labels
    of 2 and above (padding) count nowhere. None: no region term.
    strength: [B], the pairs' corruption strength; None means factor 1. Best left on the CPU, where a value
    outside strength_range raises at once.
    ref_w, ref_l may both be None when `ref_error_w`, `ref_error_l`, the reference's errors [B, R] from an
    earlier `region_errors` with the same inputs, are given (R = 2 with regions, else 1).

    Differentiable in pred_w and pred_l, once. Raises InputError when something does not fit.
    """
    stored = ref_error_w is not None and ref_error_l is not None
    if (ref_w is None) != (ref_l is None) or (ref_w is None) != stored or (ref_error_w is None) == stored:
        raise InputError(
            "pass either the reference's predictions (ref_w and ref_l) or its stored errors "
            "(ref_error_w and ref_error_l, with ref_w = ref_l = None)"
        )
    errors = pair_region_errors(
        pred_w, pred_l, clean_w, clean_l, coefficients, noise_w, noise_l,
        reference_w=ref_w, reference_l=ref_l, regions=regions, num_regions=None if regions is None else 2,
    )  # fmt: skip
    gap_w, gap_l = errors.gap_w, errors.gap_l
    if stored:
        gap_w = errors.error_w - _stored("ref_error_w", ref_error_w, errors.error_w)
        gap_l = errors.error_l - _stored("ref_error_l", ref_error_l, errors.error_l)
    return losses.local_dpo(
        errors.error_w, errors.error_l, gap_w, gap_l, errors.count,
        strength=strength, beta=beta, strength_range=strength_range, weight_region=weight_region,
        weight_global=weight_global, weight_sft=weight_sft, weight_region_sft=weight_region_sft,
    )  # fmt: skip


def _stored(name: str, x: Tensor, like: Tensor) -> Tensor:
    if x.dtype != torch.float64 or x.shape != like.shape:
        raise InputError(
            f"{name} is {x.dtype} {list(x.shape)}, expected float64 {list(like.shape)}: "
            "the sums that region_errors returned"
        )
    return x.to(like.device, non_blocking=True)
