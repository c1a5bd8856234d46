"""The head of a preference loss in plain torch: the meaning of the kernel beside it, by the functions of `losses`.

An op's implementation runs below autograd, so slopes are written out here; tests hold them to autograd through
`losses`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import losses


class Settings(NamedTuple):
    """The numbers of a head, in the order in which the kernel takes them. shape: label smoothing, or Poly-DPO's alpha.
    guard: the winner's weight in `winner_guarded`. mu: the safeguard's, below 0 for none."""

    beta: float
    low: float
    high: float
    weight_region: float
    weight_global: float
    weight_sft: float
    weight_region_sft: float
    shape: float
    guard: float
    mu: float


NUMBERS = (
    "logits_region", "logits_global", "error_w", "error_l", "gap_w", "gap_l", "region_error_w", "region_gap_w",
    "region_gap_l", "region_count", "kept", "ignored",
)  # fmt: skip


def dpo_slope(z: Tensor, smoothing: float) -> Tensor:
    return smoothing * z.sigmoid() - (1 - smoothing) * (-z).sigmoid()


def robust_dpo_slope(z: Tensor, smoothing: float) -> Tensor:
    return (-(1 - smoothing) * (-z).sigmoid() - smoothing * z.sigmoid()) / (1 - 2 * smoothing)


# Heads that are a function of one logit: loss and slope, of the logit and of the head's shape.
ONE_LOGIT: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "dpo": (losses.dpo, dpo_slope),
    "robust_dpo": (losses.robust_dpo, robust_dpo_slope),
    "ipo": (lambda z, shape: losses.ipo(z), lambda z, shape: 2 * (z - 0.5)),
    "hinge": (lambda z, shape: losses.hinge(z), lambda z, shape: -(z < 1).to(z.dtype)),
    "poly_dpo": (losses.poly_dpo, lambda z, alpha: -(-z).sigmoid() * (1 + alpha * z.sigmoid())),
}


def head(
    name: str,
    sums: Tensor,
    stored: tuple[Tensor, Tensor] | None,
    settings: Settings,
    beta: Tensor | None,
    strength: Tensor | None,
    importance: Tensor | None,
    guard: Tensor | None,
    preference: Tensor | None,
    elements: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From sums [6, B, R] to the loss [], the loss of each pair [B], NUMBERS [12, B], all fp64, and what the residuals
    of winner and loser are multiplied by, `dtype` [2, B, R]."""
    count, error_w, error_l, gap_w, gap_l, cross = sums
    if stored is not None:
        gap_w, gap_l = error_w - stored[0], error_l - stored[1]
    scale = -0.5 * (settings.beta if beta is None else beta.to(torch.float64))
    difference = gap_w - gap_l
    mask = count.shape[1] == 2
    held = count[:, 1] if mask else torch.zeros_like(count[:, 0])
    some, some_held = count.sum(1).clamp(min=1), held.clamp(min=1)
    whole = [x.sum(1) / some for x in (error_w, error_l, gap_w, gap_l)]
    inside = [x[:, 1] / some_held if mask else torch.zeros_like(held) for x in (error_w, gap_w, gap_l)]
    factor = 1 + losses.strength_eta(strength, (settings.low, settings.high), like=held)
    z, z_region = scale * (whole[2] - whole[3]), scale * (inside[1] - inside[2])

    # slopes by each region's error_w and gap_w; that by its gap_l is minus the second
    by_error, by_gap = torch.zeros_like(count), torch.zeros_like(count)
    if name == "local_dpo":
        z_region = factor * z_region
        loss = settings.weight_global * losses.dpo(z)
        loss = loss + torch.where(held > 0, settings.weight_region * losses.dpo(z_region), 0.0)
        by_gap += (settings.weight_global * dpo_slope(z, 0.0) * scale / some)[:, None]
        if mask:
            slope = settings.weight_region * factor * dpo_slope(z_region, 0.0) * scale / some_held
            by_gap[:, 1] += torch.where(held > 0, slope, 0.0)
    elif name in ONE_LOGIT:
        value, derivative = ONE_LOGIT[name]
        loss = value(z, settings.shape)
        by_gap += (derivative(z, settings.shape) * scale / some)[:, None]
    elif name == "winner_guarded":
        guarding = -scale * (settings.guard if guard is None else guard.to(torch.float64))
        terms = torch.stack((torch.zeros_like(z), -z, guarding * whole[0]))
        loss, shares = torch.logsumexp(terms, dim=0), terms.softmax(dim=0)
        by_gap += (-shares[1] * scale / some)[:, None]
        by_error += (shares[2] * guarding / some)[:, None]
    elif name == "region_dpo":
        filled, means = count > 0, scale * difference / count.clamp(min=1)
        regions = filled.sum(1).clamp(min=1)
        loss = torch.where(filled, losses.dpo(means, settings.shape), 0.0).sum(1) / regions
        slope = dpo_slope(means, settings.shape) * scale / count.clamp(min=1) / regions[:, None]
        by_gap += torch.where(filled, slope, 0.0)
    elif name == "segment_dpo":
        assert preference is not None
        sign = preference.to(torch.float64)
        labelled = (sign.abs() * count).sum(1)
        elements_labelled = torch.where(labelled > 0, labelled, 1.0)
        preferred = scale * (sign * difference).sum(1) / elements_labelled
        loss = torch.where(labelled > 0, losses.dpo(preferred), 0.0)
        slope = torch.where(labelled > 0, dpo_slope(preferred, 0.0), 0.0) * scale / elements_labelled
        by_gap += slope[:, None] * sign
    else:
        assert name == "sft", name
        loss = losses.sft(whole[0])
        by_error += (1 / some)[:, None]
    loss = loss + settings.weight_sft * whole[0] + settings.weight_region_sft * factor * inside[0]
    by_error += (settings.weight_sft / some)[:, None]
    if mask:
        by_error[:, 1] += settings.weight_region_sft * factor / some_held

    kept = torch.ones_like(loss)
    if settings.mu >= 0:
        rises, falls = (by_error + by_gap).clamp(min=0), by_gap.clamp(min=0)
        kept = losses.loser_safeguard(error_w, cross, settings.mu, weight_w=rises, weight_l=falls)
    weights = torch.stack((2 * (by_error + by_gap), -2 * kept[:, None] * by_gap)).to(dtype)
    numbers = torch.stack((z_region, z, *whole, *inside, held, kept, elements - count.sum(1)))
    total = loss if importance is None else importance.to(torch.float64) * loss
    return total.mean(), loss, numbers, weights
