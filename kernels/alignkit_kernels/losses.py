"""Every preference loss, as plain torch over per-sample fp64 numbers: the only copy of the loss maths.

Conventions, the same in every head: errors and gaps are **means** over elements, a logit is

    z = -(beta / 2) * (gap_w - gap_l)

so it is positive when the policy moved towards the winner more than towards the loser, compared with the
reference. Heads return one loss a pair; the caller takes the mean. `docs/kernels.md` converts other packages'
beta. Logits are differences taken in fp64, never of rounded means.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import InputError


def logits_of(gap_w: Tensor, gap_l: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's logit (arXiv:2311.12908) from mean gaps of any shape; beta is finite and above 0."""
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta}, expected a finite number above 0")
    return -0.5 * beta * (gap_w - gap_l)


def dpo(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(z) (arXiv:2305.18290). `label_smoothing` is the chance of a swapped label, 0 to below 0.5,
    as in conservative DPO."""
    _check_smoothing(label_smoothing)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_dpo(logits: Tensor, label_smoothing: float) -> Tensor:
    """The unbiased estimate of the clean loss under swapped labels (arXiv:2403.00409)."""
    _check_smoothing(label_smoothing)
    swapped = label_smoothing * logsigmoid(-logits) - (1 - label_smoothing) * logsigmoid(logits)
    return swapped / (1 - 2 * label_smoothing)


def ipo(logits: Tensor) -> Tensor:
    """(z - 1/2)**2: the loss of IPO (arXiv:2310.12036) times beta**2, to have the scale of the others."""
    return (logits - 0.5) ** 2


def hinge(logits: Tensor) -> Tensor:
    """max(0, 1 - z) (SLiC, arXiv:2305.10425)."""
    return torch.relu(1 - logits)


def sft(error_w: Tensor) -> Tensor:
    """The winner's own mean error: supervised fine-tuning."""
    return error_w


def region_dpo(gap_w: Tensor, gap_l: Tensor, count: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """One sigmoid per region: the mean of `dpo` over a pair's non-empty regions, [B] from sums [B, R]."""
    held = (count > 0).to(count.dtype)
    per_region = dpo(logits_of(*region_means(gap_w, gap_l, count), beta), label_smoothing)
    return (held * per_region).sum(1) / held.sum(1).clamp(min=1)


def segment_dpo(gap_w: Tensor, gap_l: Tensor, count: Tensor, preference: Tensor, beta: float) -> Tensor:
    """One sigmoid over the labelled segments: DenseDPO (arXiv:2506.03517) in our reading.

    gap_w, gap_l, count: sums [B, R] of the two videos, R segments. preference [B, R]: +1 where the first
    video is better, -1 where the second is, 0 for a tie or no label. A pair with no label contributes 0.
    """
    if preference.shape != gap_w.shape or preference.dtype == torch.bool:
        raise InputError(
            f"preference must be numbers {list(gap_w.shape)}, one of -1, 0 and 1 a segment, got {preference.dtype} "
            f"{list(preference.shape)}"
        )
    _require(((preference == 0) | (preference.abs() == 1)).all(), "preference must hold -1, 0 and 1 alone", preference)
    sign = preference.to(gap_w.dtype)
    elements = (sign.abs() * count).sum(1)
    labelled = elements > 0
    gap = (sign * (gap_w - gap_l)).sum(1) / torch.where(labelled, elements, 1.0)
    return torch.where(labelled, dpo(logits_of(gap, torch.zeros_like(gap), beta)), 0.0)


def loser_safeguard(error_w: Tensor, cross: Tensor, mu: float = 0.0) -> Tensor:
    """How much of the loser's gradient to keep, [B] in [0, 1], from sums [B, R]; one number a pair (arXiv:2511.03317).

    With g the gradients of the two errors by the predictions: clip((1 - mu) |g_w|**2 / (g_w . g_l), 0, 1)
    where g_w . g_l > 0, else 1. To first order the winner's error then does not rise, as far as winner and
    loser share their Jacobian. It is a constant of the step: no gradient flows through it. Apply it with
    `scale_gradient`.
    """
    if not 0 <= mu <= 1:
        raise InputError(f"mu is {mu}, expected 0 <= mu <= 1")
    own, shared = error_w.detach().sum(1), cross.detach().sum(1)
    ratio = (1 - mu) * own / torch.where(shared > 0, shared, 1.0)
    return torch.where(shared > 0, ratio.clamp(0.0, 1.0), 1.0)


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x` itself, with its gradient multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def region_means(gap_w: Tensor, gap_l: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Means of two sums over the same elements; 0 for an empty region."""
    elements = count.clamp(min=1)
    return gap_w / elements, gap_l / elements


class PairMeans(NamedTuple):
    """A pair's errors and gaps as means over elements, fp64 [B] (`region_empty` bool [B]).

    Over all regions, and, as `region_*`, inside the mask: 0 where the mask is empty or missing.
    """

    error_w: Tensor
    error_l: Tensor
    gap_w: Tensor
    gap_l: Tensor
    region_error_w: Tensor
    region_gap_w: Tensor
    region_gap_l: Tensor
    region_empty: Tensor


def pair_means(error_w: Tensor, error_l: Tensor, gap_w: Tensor, gap_l: Tensor, count: Tensor) -> PairMeans:
    """Means from sums [B, R]: R = 2 (0 outside the mask, 1 inside), or R = 1 for no mask at all.

    The mask's mean is taken per sample, so that a pair's numbers do not depend on its batch.
    """
    if count.shape[1] > 2:
        raise InputError(f"the sums are of {count.shape[1]} regions, expected outside and inside a mask, or one")
    elements = count.sum(1).clamp(min=1)
    inside = slice(1, 2)  # empty without a mask, and then the sums below are 0
    held = count[:, inside].sum(1)
    whole = (x.sum(1) / elements for x in (error_w, error_l, gap_w, gap_l))
    region = (x[:, inside].sum(1) / held.clamp(min=1) for x in (error_w, gap_w, gap_l))
    return PairMeans(*whole, *region, held == 0)


class LocalDPOLoss(NamedTuple):
    """`loss` is the scalar mean to call backward on; everything else is fp64 [B] (`region_empty` bool [B]).

    Errors and gaps are means over elements: `error_*` and `gap_*` over all regions, `region_gap_*` inside
    the mask.
    """

    loss: Tensor
    loss_per_pair: Tensor
    logits_region: Tensor
    logits_global: Tensor
    error_w: Tensor
    error_l: Tensor
    gap_w: Tensor
    gap_l: Tensor
    region_gap_w: Tensor
    region_gap_l: Tensor
    region_empty: Tensor


def local_dpo(
    error_w: Tensor,
    error_l: Tensor,
    gap_w: Tensor,
    gap_l: Tensor,
    count: Tensor,
    *,
    strength: Tensor | None = None,
    beta: float = 5000.0,
    strength_range: tuple[float, float] = (0.75, 0.90),
    weight_region: float = 1.0,
    weight_global: float = 1.0,
    weight_sft: float = 0.1,
    weight_region_sft: float = 0.0,
) -> LocalDPOLoss:
    """LocalDPO's loss from sums [B, R]: R = 2 (0 outside the mask, 1 inside), or R = 1 for no mask at all.

        weight_region * dpo(z_region) + weight_global * dpo(z_global) + weight_sft * E_w
            + weight_region_sft * (1 + eta) * E_w inside the mask
        z_region = -(beta / 2) (1 + eta) (gap_w - gap_l inside the mask)

    A pair whose mask is empty (or missing) contributes 0 to the region terms and is flagged in `region_empty`.
    """
    means = pair_means(error_w, error_l, gap_w, gap_l, count)
    factor = 1 + strength_eta(strength, strength_range, like=means.error_w)
    logits_region = factor * logits_of(means.region_gap_w, means.region_gap_l, beta)
    logits_global = logits_of(means.gap_w, means.gap_l, beta)
    per_pair = (
        weight_region * torch.where(means.region_empty, 0.0, dpo(logits_region))
        + weight_global * dpo(logits_global)
        + weight_sft * sft(means.error_w)
        + weight_region_sft * factor * sft(means.region_error_w)
    )
    return LocalDPOLoss(
        per_pair.mean(), per_pair, logits_region, logits_global, means.error_w, means.error_l,
        means.gap_w, means.gap_l, means.region_gap_w, means.region_gap_l, means.region_empty,
    )  # fmt: skip


def strength_eta(strength: Tensor | None, strength_range: tuple[float, float], like: Tensor) -> Tensor:
    """eta = (alpha - low) / (high - low) in [0, 1]; 0 without a strength or with low == high.

    A strength outside the range is refused: at once where looking is free, by a device assertion on a GPU.
    """
    low, high = strength_range
    if not low <= high:
        raise InputError(f"strength_range is ({low}, {high}), expected low <= high")
    if strength is None:
        return torch.zeros_like(like)
    if not isinstance(strength, Tensor) or strength.shape != like.shape:
        got = list(strength.shape) if isinstance(strength, Tensor) else type(strength).__name__
        raise InputError(f"strength must be a tensor {list(like.shape)}, one number a pair, got {got}")
    # an fp32 strength of k / N may lie one rounding outside a range given in fp64
    fits = (strength >= low - 1e-6) & (strength <= high + 1e-6)
    _require(fits.all(), f"strength must lie in strength_range = [{low}, {high}]", strength)
    if low == high:
        return torch.zeros_like(like)
    alpha = strength.to(like.device, like.dtype, non_blocking=True)
    return ((alpha - low) / (high - low)).clamp(0.0, 1.0)


def _require(fulfilled: Tensor, message: str, given: Tensor) -> None:
    if fulfilled.device.type == "cpu" and not torch.compiler.is_compiling():
        if not fulfilled:
            raise InputError(f"{message}, got {given.tolist()}")
    else:
        torch._assert_async(fulfilled, message)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5")
