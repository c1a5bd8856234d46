"""LocalDPO's loss straight from predictions."""

from torch import Tensor

from .preference import PreferenceLoss, preference_loss
from .sources import NoiseSource


def local_dpo_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    *,
    reference_w: Tensor | None = None,
    reference_l: Tensor | None = None,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    noise_w: NoiseSource,
    noise_l: NoiseSource | None = None,
    regions: Tensor | None = None,
    strength: Tensor | None = None,
    reference_error_w: Tensor | None = None,
    reference_error_l: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float | Tensor = 5000.0,
    strength_range: tuple[float, float] = (0.75, 0.90),
    weight_region: float = 1.0,
    weight_global: float = 1.0,
    weight_sft: float = 0.1,
    weight_region_sft: float = 0.0,
) -> PreferenceLoss:
    """`preference_loss` with the head of LocalDPO (arXiv:2601.04068): formula in `losses.local_dpo`, arguments there.

    strength: [B], the pairs' corruption strength; None means factor 1. Best left on the CPU, where a value outside
    strength_range raises at once.
    """
    return preference_loss(
        pred_w, pred_l, head="local_dpo", reference_w=reference_w, reference_l=reference_l, clean_w=clean_w,
        clean_l=clean_l, coefficients=coefficients, noise_w=noise_w, noise_l=noise_l, regions=regions,
        strength=strength, reference_error_w=reference_error_w, reference_error_l=reference_error_l, weight=weight,
        beta=beta, strength_range=strength_range, weight_region=weight_region, weight_global=weight_global,
        weight_sft=weight_sft, weight_region_sft=weight_region_sft,
    )  # fmt: skip
