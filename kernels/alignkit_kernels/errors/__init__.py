"""Squared errors of a prediction, and how they differ from a reference's, by region."""

from typing import NamedTuple

from torch import Tensor

from ..checks import check_coefficients, check_latents, check_like, check_regions
from ..sources import NoiseSource, noise_inputs
from . import op


class RegionErrors(NamedTuple):
    """Sums over the elements of each region, fp64 [B, R]. `gap` is None without a reference."""

    error: Tensor
    gap: Tensor | None
    count: Tensor  # type: ignore[assignment]  # nobody counts in a tuple of tensors


def region_errors(
    pred: Tensor,
    clean: Tensor,
    coefficients: Tensor,
    noise: NoiseSource,
    *,
    reference: Tensor | None = None,
    regions: Tensor | None = None,
    num_regions: int | None = None,
) -> RegionErrors:
    """Per sample and region, with y = c * noise + d * clean:

        error = sum (pred - y)**2
        gap   = sum (pred - y)**2 - (reference - y)**2, computed without cancellation: 0 for equal predictions
        count = number of elements, channels included

    pred, clean, reference: [B, C, F, H, W], [B, F, C, H, W] or [B, C, H, W], each of any float dtype.
    coefficients: fp32 or fp64 [B, 4], rows (a, s, c, d) of x_t = a * clean + s * noise and of y.
    noise: a tensor like clean, a `NoiseKey` or a `PathState`.
    regions: uint8 (or bool) labels, every axis equal to pred's or 1; a label >= num_regions is ignored.
    num_regions: 1 to 255, required with regions.

    Differentiable in pred, once; reference, clean and noise are constants. Terms are fp32 (fp64 if a latent
    is), sums fp64. Raises InputError when something does not fit.
    """
    check_latents("pred", pred)
    check_like("clean", clean, "pred", pred)
    check_coefficients(coefficients, clean)
    if reference is not None:
        check_like("reference", reference, "pred", pred)
    regions, num_regions = check_regions(regions, num_regions, pred)
    source, tensor = noise_inputs("noise", noise, clean)
    count, error, gap = op.region_errors(pred, reference, clean, coefficients, source, tensor, regions, num_regions)
    return RegionErrors(error, None if reference is None else gap, count)
