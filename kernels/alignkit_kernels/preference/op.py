"""`preference_loss` as torch sees it: an op from predictions to the loss, its backward, and what implements them."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..errors.reference import compute_dtype
from ..pairs import reference as plain_pairs
from . import reference as plain
from .reference import NUMBERS, Settings

if dispatch.HAVE_TRITON:
    from ..pairs import launch as pairs_launch
    from . import launch


def halves(pred: Tensor, pred_l: Tensor | None) -> tuple[Tensor, Tensor]:
    """Winner's and loser's predictions; without a loser's they are stacked, winners first."""
    if pred_l is not None:
        return pred, pred_l
    batch = pred.shape[0] // 2
    return pred[:batch], pred[batch:]


@torch.library.custom_op("alignkit::preference_loss", mutates_args=())
def preference_loss(
    pred: Tensor,
    pred_l: Tensor | None,
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
    highest: int,
    sums: Tensor | None,
    reference_error_w: Tensor | None,
    reference_error_l: Tensor | None,
    beta: Tensor | None,
    strength: Tensor | None,
    importance: Tensor | None,
    guard: Tensor | None,
    preference: Tensor | None,
    head: str,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], loss of each pair [B], NUMBERS [12, B], all fp64, and the residuals' weights [2, B, R]."""
    pred_w, pred_l = halves(pred, pred_l)
    kernels = dispatch.runs_kernels(pred_w)
    if sums is None:
        sums = (pairs_launch if kernels else plain_pairs).forward(
            pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, coefficients,
            source_w, noise_w, source_l, noise_l, regions, num_regions, highest,
        )  # fmt: skip
    stored = None if reference_error_w is None else (reference_error_w, reference_error_l)
    return (launch if kernels else plain).head(
        head, sums, stored, Settings(*settings), beta, strength, importance, guard, preference,
        pred_w[0].numel(), compute_dtype(pred_w, pred_l, clean_w, clean_l),
    )  # fmt: skip


@torch.library.custom_op("alignkit::preference_loss_backward", mutates_args=())
def preference_loss_backward(
    by_loss: Tensor | None,
    by_pair: Tensor | None,
    weights: Tensor,
    importance: Tensor | None,
    pred: Tensor,
    pred_l: Tensor | None,
    clean_w: Tensor,
    clean_l: Tensor,
    coefficients: Tensor,
    source_w: str,
    noise_w: Tensor,
    source_l: str,
    noise_l: Tensor | None,
    regions: Tensor | None,
    highest: int,
) -> list[Tensor]:
    """The gradient of a stacked prediction, or those of winner and loser."""
    sides = halves(pred, pred_l)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pred, pred_l) if x is not None]
    run = pairs_launch if dispatch.runs_kernels(pred) else plain_pairs
    run.write_gradients(
        halves(*out, *[None] * (2 - len(out))), weights, (by_loss, importance, by_pair), *sides, clean_w, clean_l,
        coefficients, source_w, noise_w, source_l, noise_l, regions, highest,
    )  # fmt: skip
    return out


@preference_loss.register_fake
def _(
    pred: Tensor,
    pred_l: Tensor | None,
    reference_w: Any,
    reference_l: Any,
    clean_w: Tensor,
    clean_l: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_regions = clean_w.shape[0], args[6]
    doubles = pred.new_empty((), dtype=torch.float64)
    dtype = compute_dtype(pred, pred_l, clean_w, clean_l)
    return (
        doubles, doubles.new_empty(batch), doubles.new_empty(len(NUMBERS), batch),
        pred.new_empty((2, batch, num_regions), dtype=dtype),
    )  # fmt: skip


@preference_loss_backward.register_fake
def _(
    by_loss: Any, by_pair: Any, weights: Any, importance: Any, pred: Tensor, pred_l: Tensor | None, *args: Any
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pred, pred_l) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, pred_l, _, _, clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, regions = inputs[:12]
    importance, weights = inputs[19], output[3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.sources, ctx.highest = (source_w, source_l), inputs[13]
    ctx.save_for_backward(weights, importance, pred, pred_l, clean_w, clean_l, coefficients, noise_w, noise_l, regions)


def _backward(ctx: Any, by_loss: Tensor | None, by_pair: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    weights, importance, pred, pred_l, clean_w, clean_l, coefficients, noise_w, noise_l, regions = ctx.saved_tensors
    source_w, source_l = ctx.sources
    if by_loss is None and by_pair is None:
        return (None,) * 24
    by_pair = None if by_pair is None else by_pair.contiguous()  # that of a sum is one number, expanded
    found = preference_loss_backward(
        by_loss, by_pair, weights, importance, pred, pred_l, clean_w, clean_l, coefficients,
        source_w, noise_w, source_l, noise_l, regions, ctx.highest,
    )  # fmt: skip
    return *found, *[None] * (24 - len(found))


preference_loss.register_autograd(_backward, setup_context=_save)
