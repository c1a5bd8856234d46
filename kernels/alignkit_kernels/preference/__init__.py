"""Every preference loss in one call: one pass over the predictions, one over the sums, one for the gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses
from ..checks import InputError, Shard, check_coefficients, check_latents, check_like, check_regions
from ..noise import part_of
from ..pairs import pair_noise
from ..pairs.op import pair_region_errors
from ..sources import NoiseKey, NoiseSource
from . import op
from .checks import HEADS, check_head, check_references, host_beta, number, per_pair
from .reference import NUMBERS, Settings

__all__ = ["HEADS", "PreferenceLoss", "preference_loss"]


class PreferenceLoss(NamedTuple):
    """`loss` is the scalar mean to call backward on; gradients flow through it and through `loss_per_pair` alone, the
    rest is for logs. All fp64, [B] but for `loss`; `region_empty` is bool.

    loss_per_pair: before `weight`.
    logits_global, logits_region: z over all elements, and inside the mask (for `local_dpo` times 1 + eta).
    error_*, gap_*: means over elements; region_*: inside the mask, 0 without one.
    kept: how much of the loser's gradient the safeguard kept; 1 without it.
    ignored: elements whose label is `num_regions` or above, which count nowhere.
    """

    loss: Tensor
    loss_per_pair: Tensor
    logits_region: Tensor
    logits_global: Tensor
    error_w: Tensor
    error_l: Tensor
    gap_w: Tensor
    gap_l: Tensor
    region_error_w: Tensor
    region_gap_w: Tensor
    region_gap_l: Tensor
    region_empty: Tensor
    kept: Tensor
    ignored: Tensor


def preference_loss(
    pred: Tensor,
    pred_l: Tensor | None = None,
    *,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    noise_w: NoiseSource,
    noise_l: NoiseSource | None = None,
    head: str = "local_dpo",
    reference_w: Tensor | None = None,
    reference_l: Tensor | None = None,
    reference_error_w: Tensor | None = None,
    reference_error_l: Tensor | None = None,
    regions: Tensor | None = None,
    num_regions: int | None = None,
    weight: Tensor | None = None,
    beta: float | Tensor = 5000.0,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    guard_weight: float | Tensor = 1.0,
    preference: Tensor | None = None,
    strength: Tensor | None = None,
    strength_range: tuple[float, float] = (0.75, 0.90),
    weight_region: float = 1.0,
    weight_global: float = 1.0,
    weight_sft: float | None = None,
    weight_region_sft: float = 0.0,
    loser_safeguard: float | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    shard: Shard | None = None,
) -> PreferenceLoss:
    """The loss of B pairs by any head of `losses`, in three kernel launches forward and one backward.

    pred, pred_l: the policy's predictions for winners and losers, [B, C, F, H, W], [B, F, C, H, W] or [B, C, H, W]; or
        `pred` alone, [2B, ...] with the winners first, which is read where it is and gets one gradient. Any float
        dtypes, here and below.
    clean_w, clean_l, reference_w, reference_l: like a side's predictions. The reference's predictions are for every
        head but `sft`, or else its stored errors: reference_error_w and reference_error_l, fp64 [B, R], the sums of an
        earlier `region_errors` with the same inputs.
    coefficients: [B, 4] rows (a, s, c, d), shared by a pair. noise_l=None: the winner's noise.
    head: `local_dpo`, `dpo`, `robust_dpo`, `ipo`, `hinge`, `poly_dpo`, `winner_guarded`, `region_dpo`, `segment_dpo` or
        `sft`; formulas and sources in `losses`.
    regions: a uint8 or bool mask, inside where it is not 0, every axis equal to the latents' or 1. With `num_regions`
        (`region_dpo`, `segment_dpo`) labels, of which those of num_regions and above are ignored and counted.
    weight: [B], what each pair's loss is multiplied by in the mean. beta: a number, or a tensor of one element, which
        is not looked at on the host.
    label_smoothing (`dpo`, `robust_dpo`, `region_dpo`), alpha (`poly_dpo`), guard_weight (`winner_guarded`; a number or
        [B]), preference (`segment_dpo`; [B, R] of -1, 0, 1), strength, strength_range, weight_region, weight_global
        (`local_dpo`): the head's own, refused with another.
    weight_sft, weight_region_sft: of the winner's mean error, and of that inside the mask times 1 + eta, added to any
        head's loss. weight_sft=None is 0.1 for `local_dpo`, 0 for the others.
    loser_safeguard: mu of `losses.loser_safeguard`, with the weights of this very loss; None for none.
    process_group: of those that hold parts of the same latents, cut along any axis; sums are added up over it before
        the head, so the loss is the whole's, and the gradient the part's of it.
    shard: (axis, start, full_size), where this part lies in the whole, as in `keyed_randn`; needed with keyed noise,
        which is then that of the whole, and stored.

    Once differentiable, in the predictions. Raises InputError when something does not fit. A call starts 3 kernels
    forward and 1 backward; a weight, strength, stored error or guard that is on the host costs a copy.
    """
    check_latents("pred" if pred_l is None else "pred_w", pred)
    if pred_l is None and pred.shape[0] % 2:
        raise InputError(f"pred is {list(pred.shape)} and pred_l is None: stacked predictions are [2B, ...]")
    pred_w, loser = op.halves(pred, pred_l)
    for name, x in (("pred_l", loser), ("clean_w", clean_w), ("clean_l", clean_l)):
        check_like(name, x, "pred_w", pred_w)
    check_coefficients(coefficients, clean_w)
    own: dict[str, object] = {
        "strength": strength, "weight_region": weight_region, "weight_global": weight_global, "alpha": alpha,
        "label_smoothing": label_smoothing, "guard_weight": guard_weight, "preference": preference,
        "num_regions": num_regions,
    }  # fmt: skip
    check_head(head, weight_region_sft, own)
    if preference is not None and num_regions is None and isinstance(preference, Tensor) and preference.dim() == 2:
        num_regions = preference.shape[1]
    mask = num_regions is None  # what is not 0 is inside, whatever number it is
    highest = 1 if mask else 255
    regions, num_regions = check_regions(regions, 2 if mask and regions is not None else num_regions, pred_w)
    check_references(head, (reference_w, reference_l), (reference_error_w, reference_error_l), pred_w, num_regions)

    batch, device = pred_w.shape[0], pred_w.device
    losses.check_range(strength_range)
    if strength is not None:
        losses.check_strength(strength, strength_range, batch)
    if preference is not None:
        losses.check_preference(preference, [batch, num_regions])
        preference = preference.to(device, non_blocking=True).contiguous()
    beta, beta_tensor = host_beta(beta, device)
    default_sft = 0.1 if head == "local_dpo" else 0.0
    settings = Settings(
        beta, *strength_range, weight_region, weight_global,
        default_sft if weight_sft is None else number("weight_sft", weight_sft),
        number("weight_region_sft", weight_region_sft), alpha if head == "poly_dpo" else label_smoothing,
        0.0 if isinstance(guard_weight, Tensor) else guard_weight,
        -1.0 if loser_safeguard is None else number("loser_safeguard", loser_safeguard, 0, 1),
    )  # fmt: skip
    guard = per_pair("guard_weight", guard_weight if isinstance(guard_weight, Tensor) else None, batch, device)
    keyed = any(isinstance(noise, NoiseKey) for noise in (noise_w, noise_l))
    if process_group is not None and keyed and shard is None:
        raise InputError("keyed noise with process_group needs shard: without, every part draws that of the first")
    noise_w = part_of(noise_w, clean_w, shard)
    noise_l = None if noise_l is None else part_of(noise_l, clean_l, shard)
    noises = pair_noise(noise_w, noise_l, clean_w, clean_l)
    inputs = reference_w, reference_l, clean_w, clean_l, coefficients, *noises
    sums: Tensor | None = None
    elsewhere: Tensor | int = 0
    if process_group is not None:
        sums, elsewhere = _whole(process_group, pred_w, loser, *inputs, regions, num_regions, highest)
    loss, each, numbers, _ = op.preference_loss(
        pred, pred_l, *inputs, regions, num_regions, highest, sums,
        *(None if x is None else x.to(device, non_blocking=True) for x in (reference_error_w, reference_error_l)),
        beta_tensor, per_pair("strength", strength, batch, device), per_pair("weight", weight, batch, device), guard,
        preference, head, list(map(float, settings)),
    )  # fmt: skip
    found = dict(zip(NUMBERS, numbers.unbind(), strict=True))
    if process_group is not None:
        found["ignored"] = found["ignored"] + elsewhere
    return PreferenceLoss(loss, each, region_empty=found.pop("region_count") == 0, **found)


@torch.no_grad()
def _whole(group: Any, pred_w: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Sums over all parts of the latents, and how many elements of a sample the other parts have."""
    sums = pair_region_errors(pred_w, *inputs)
    elements = torch.full((), float(pred_w[0].numel()), dtype=torch.float64, device=sums.device)
    total = torch.cat((sums.flatten(), elements.reshape(1)))
    torch.distributed.all_reduce(total, group=group)
    return total[:-1].view_as(sums), total[-1] - elements
