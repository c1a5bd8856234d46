"""Every preference loss, as plain torch over per-sample fp64 numbers: the only copy of the loss maths.

Conventions, the same in every head: errors and gaps are **means** over elements, a logit is

    z = -(beta / 2) * (gap_w - gap_l)

so it is positive when the policy moved towards the winner more than towards the loser, compared with the
reference. Heads return one loss a pair; the caller takes the mean. `docs/kernels.md` converts other packages'
beta. Logits are differences taken in fp64, never of rounded means.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import InputError, is_number

__all__ = [
    "LocalDPOLoss", "PairMeans", "auto_beta", "dpo", "hinge", "ipo", "local_dpo", "logits_of", "loser_safeguard",
    "pair_means", "poly_dpo", "region_dpo", "region_means", "robust_dpo", "scale_gradient", "segment_dpo", "sft",
    "strength_eta", "winner_guarded",
]  # fmt: skip


def logits_of(gap_w: Tensor, gap_l: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's logit (arXiv:2311.12908) from mean gaps of any shape; beta is finite and above 0."""
    _check_beta(beta)
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


def winner_guarded(logits: Tensor, error_w: Tensor, beta: float, weight: float | Tensor | None = 1.0) -> Tensor:
    """log(1 + exp(-z) + exp(weight beta E_w / 2)): THERMoDPO (arXiv:2608.20011) in our reading, of its abstract and of
    notes on it; the paper itself was not at hand.

    There it is tau log(1 + exp((D_w - D_l) / tau) + exp(w E_w / tau)) with D = E - E_reference; this is that with
    tau = 2 / beta, divided by tau. The gradient is shared out between -z and the guard by softmax, so as the winner's
    own error rises, its descent takes the preference's place.

    logits, error_w: fp64 [B]; error_w is the winner's mean error, differentiable. weight: 0 and above and finite, or a
    tensor [B] of such; theirs is (1 - t)**2 at noise level t, which is for the caller to pass. None takes the guard's
    term out and leaves `dpo`; a weight of 0 does not, it leaves the constant log(2 + exp(-z)).
    """
    _check_beta(beta)
    if weight is None:
        return dpo(logits)
    if isinstance(weight, Tensor):
        if weight.shape != logits.shape:
            raise InputError(f"weight must be a tensor {list(logits.shape)}, one a pair, got {list(weight.shape)}")
        _require(lambda x: (x >= 0) & (x < math.inf), "weight must hold finite numbers of 0 and above", weight)
        weight = weight.to(logits.device, logits.dtype, non_blocking=True)
    elif not 0 <= weight < math.inf:
        raise InputError(f"weight is {weight}, expected a finite number of 0 and above, or None for no guard")
    guard = 0.5 * beta * weight * error_w
    return torch.logsumexp(torch.stack((torch.zeros_like(logits), -logits, guard)), dim=0)


def poly_dpo(logits: Tensor, alpha: float) -> Tensor:
    """-log p + alpha (1 - p), p = sigmoid(z): Poly-DPO (ViPO, ICLR 2026, arXiv:2604.24953).

    Its derivative by z is -(1 - p)(1 + alpha p). alpha above 0 pulls harder at pairs that are already right, below 0
    less; at 0 it is `dpo`, and below -1 it would push pairs with p > -1 / alpha back, so -1 <= alpha, finite.
    """
    if not -1 <= alpha < math.inf:
        raise InputError(f"alpha is {alpha}, expected a finite number of -1 and above")
    return dpo(logits) + alpha * torch.sigmoid(-logits)


def auto_beta(mean_gap: float | None, beta_min: float, beta_max: float) -> float:
    """The beta at which a typical pair makes one logit: 2 / mean_gap, held to [beta_min, beta_max].

    mean_gap: the mean of |gap_w - gap_l| over earlier pairs; None or 0, when nothing has moved yet, gives beta_max.
    The idea is that of SimpleTuner and DIAL (arXiv:2609.11507); the rule is ours.
    """
    if not 0 < beta_min <= beta_max < math.inf:
        raise InputError(f"beta_min and beta_max are {beta_min} and {beta_max}, expected 0 < beta_min <= beta_max")
    if mean_gap is None:
        return float(beta_max)
    if not 0 <= mean_gap < math.inf:
        raise InputError(f"mean_gap is {mean_gap}, expected a finite number of 0 and above, or None")
    return float(min(max(2 / mean_gap, beta_min), beta_max)) if mean_gap else float(beta_max)


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
    check_preference(preference, list(gap_w.shape))
    sign = preference.to(gap_w.dtype)
    elements = (sign.abs() * count).sum(1)
    labelled = elements > 0
    gap = (sign * (gap_w - gap_l)).sum(1) / torch.where(labelled, elements, 1.0)
    return torch.where(labelled, dpo(logits_of(gap, torch.zeros_like(gap), beta)), 0.0)


def loser_safeguard(
    error_w: Tensor,
    cross: Tensor,
    mu: float = 0.0,
    *,
    weight_w: Tensor | None = None,
    weight_l: Tensor | None = None,
) -> Tensor:
    """How much of the loser's gradient to keep, one number a pair, [B] in [0, 1]: Diffusion-SDPO (arXiv:2511.03317),
    with the region weights of the loss that is trained [ours].

        clip((1 - mu) sum_k weight_w,k error_w,k / sum_k weight_l,k cross_k, 0, 1)   where the denominator is above 0,
        1                                                                            elsewhere

    error_w, cross: sums [B, R]. weight_w, weight_l: numbers [B, R] of 0 and above, of one scale: weight_w,k is the
    derivative of the pair's loss by its error_w,k and gap_w,k together, weight_l,k minus that by its gap_l,k. None
    stands for ones. A constant of the step, through which no gradient flows; apply it with `scale_gradient`.

    Why. Let r be a prediction minus its target, and let winner and loser share their Jacobian J. A step of size h
    moves both predictions by -h J J^T (2 weight_w r_w - 2 keep weight_l r_l), weights taken by region. With J J^T
    taken for the identity, as the paper does, the winner's plain error |r_w|**2 changes by

        -4 h (sum_k weight_w,k error_w,k - keep sum_k weight_l,k cross_k) + O(h**2)

    which is at most -4 h mu sum_k weight_w,k error_w,k: at mu = 0 it does not rise to first order, at mu > 0 it falls
    by at least that share of what the winner's part of the step alone would bring. It is the error over the whole
    latent, each element counted once. One region's error may rise while another's falls more, and so may the weighted
    error sum_k weight_w,k error_w,k, whose own bound is sum_k weight_w,k**2 error_w,k over
    sum_k weight_w,k weight_l,k cross_k. With one region, or weights that are the same in all, the two agree.
    """
    if not 0 <= mu <= 1:
        raise InputError(f"mu is {mu}, expected 0 <= mu <= 1")
    own = _weighted_sum("weight_w", weight_w, error_w)
    shared = _weighted_sum("weight_l", weight_l, cross)
    ratio = (1 - mu) * own / torch.where(shared > 0, shared, 1.0)
    return torch.where(shared > 0, ratio.clamp(0.0, 1.0), 1.0)


def _weighted_sum(name: str, weight: Tensor | None, sums: Tensor) -> Tensor:
    sums = sums.detach()
    if weight is None:
        return sums.sum(1)
    if not isinstance(weight, Tensor) or weight.shape != sums.shape:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"{name} must be a tensor {list(sums.shape)}, one number a pair and region, got {got}")
    _require(lambda x: x >= 0, f"{name} must hold numbers of 0 and above", weight)
    return (weight.detach() * sums).sum(1)


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
    mean_w, mean_l, mean_gap_w, mean_gap_l = (x.sum(1) / elements for x in (error_w, error_l, gap_w, gap_l))
    region_w, region_gap_w, region_gap_l = (x[:, inside].sum(1) / held.clamp(min=1) for x in (error_w, gap_w, gap_l))
    return PairMeans(mean_w, mean_l, mean_gap_w, mean_gap_l, region_w, region_gap_w, region_gap_l, held == 0)


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
    if strength is None:
        check_range(strength_range)
        return torch.zeros_like(like)
    check_strength(strength, strength_range, like.shape[0])
    if low == high:
        return torch.zeros_like(like)
    alpha = strength.to(like.device, like.dtype, non_blocking=True)
    return ((alpha - low) / (high - low)).clamp(0.0, 1.0)


def check_range(strength_range: tuple[float, float]) -> None:
    low, high = strength_range
    if not low <= high:
        raise InputError(f"strength_range is ({low}, {high}), expected low <= high")


def check_strength(strength: Tensor, strength_range: tuple[float, float], batch: int) -> None:
    """One number a pair, in the range: looked at where that is free, else left to a device assertion."""
    check_range(strength_range)
    low, high = strength_range
    if not isinstance(strength, Tensor) or list(strength.shape) != [batch]:
        got = list(strength.shape) if isinstance(strength, Tensor) else type(strength).__name__
        raise InputError(f"strength must be a tensor [{batch}], one number a pair, got {got}")
    # an fp32 strength of k / N may lie one rounding outside a range given in fp64
    _require(
        lambda x: (x >= low - 1e-6) & (x <= high + 1e-6),
        f"strength must lie in strength_range = [{low}, {high}]",
        strength,
    )


def check_preference(preference: Tensor, shape: list[int]) -> None:
    if not isinstance(preference, Tensor) or list(preference.shape) != shape or preference.dtype == torch.bool:
        got = f"{preference.dtype} {list(preference.shape)}" if isinstance(preference, Tensor) else type(preference)
        raise InputError(f"preference must be numbers {shape}, one of -1, 0 and 1 a segment, got {got}")
    _require(lambda x: (x == 0) | (abs(x) == 1), "preference must hold -1, 0 and 1 alone", preference)


def _require(fits: Callable[[Tensor], Tensor], message: str, given: Tensor) -> None:
    """Every number of `given` fits: asked at once on the host, by a device assertion elsewhere."""
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        if not all(map(fits, given.flatten().tolist())):
            raise InputError(f"{message}, got {given.tolist()}")
    else:
        torch._assert_async(fits(given).all(), message)


def _check_beta(beta: float) -> None:
    if not is_number(beta):
        raise InputError(f"beta must be a number, got {beta!r}")
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta}, expected a finite number above 0")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5")
