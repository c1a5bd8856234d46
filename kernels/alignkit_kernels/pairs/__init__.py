"""Winner and loser in one pass, with the noise they share drawn once."""

from typing import NamedTuple

from torch import Tensor

from ..checks import InputError, check_coefficients, check_latents, check_like, check_regions
from ..sources import NoiseSource, PathState, noise_inputs
from . import op


class PairRegionErrors(NamedTuple):
    """Sums over the elements of each region, fp64 [B, R]. Gaps are None without references.

    `cross` is the sum of (pred_w - y_w) * (pred_l - y_l), which `losses.loser_safeguard` needs.
    """

    error_w: Tensor
    error_l: Tensor
    gap_w: Tensor | None
    gap_l: Tensor | None
    cross: Tensor
    count: Tensor  # type: ignore[assignment]  # nobody counts in a tuple of tensors


def pair_region_errors(
    pred_w: Tensor,
    pred_l: Tensor,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    noise_w: NoiseSource,
    noise_l: NoiseSource | None = None,
    *,
    reference_w: Tensor | None = None,
    reference_l: Tensor | None = None,
    regions: Tensor | None = None,
    num_regions: int | None = None,
) -> PairRegionErrors:
    """`region_errors` of the winner and of the loser, and their cross term, in one pass.

    Shapes and dtypes as in `region_errors`; winner and loser share coefficients (one timestep a pair) and the
    label map. `noise_l=None` means the winner's noise, which is then read or regenerated once; with a
    `PathState` each side has its own state, so `noise_l` is required. References come in pairs or not at all.

    Differentiable in pred_w and pred_l, once. Raises InputError when something does not fit.
    """
    check_latents("pred_w", pred_w)
    for name, x in (("pred_l", pred_l), ("clean_w", clean_w), ("clean_l", clean_l)):
        check_like(name, x, "pred_w", pred_w)
    check_coefficients(coefficients, clean_w)
    if (reference_w is None) != (reference_l is None):
        missing = "reference_w" if reference_w is None else "reference_l"
        raise InputError(f"{missing} is None but the other side's reference is given; pass both or neither")
    if reference_w is not None and reference_l is not None:
        check_like("reference_w", reference_w, "pred_w", pred_w)
        check_like("reference_l", reference_l, "pred_l", pred_l)
    regions, num_regions = check_regions(regions, num_regions, pred_w)
    count, error_w, error_l, gap_w, gap_l, cross = op.pair_region_errors(
        pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, coefficients,
        *pair_noise(noise_w, noise_l, clean_w, clean_l), regions, num_regions,
    )  # fmt: skip
    if reference_w is None:
        gap_w = gap_l = None
    return PairRegionErrors(error_w, error_l, gap_w, gap_l, cross, count)


def pair_noise(
    noise_w: NoiseSource, noise_l: NoiseSource | None, clean_w: Tensor, clean_l: Tensor
) -> tuple[str, Tensor, str, Tensor | None]:
    """Both sides' checked noise sources in the form the ops take; no tensor for the loser's is the winner's noise."""
    source_w, tensor_w = noise_inputs("noise_w", noise_w, clean_w)
    if noise_l is not None:
        return source_w, tensor_w, *noise_inputs("noise_l", noise_l, clean_l)
    if isinstance(noise_w, PathState):
        raise InputError("noise_l is required when noise_w is a PathState: each side has its own state")
    return source_w, tensor_w, source_w, None
