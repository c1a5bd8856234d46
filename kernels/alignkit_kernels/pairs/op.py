"""`pair_region_errors` as torch sees it: an op, its backward, their shapes, and what implements them."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import reference as plain

if dispatch.HAVE_TRITON:
    from . import launch


@torch.library.custom_op("alignkit::pair_region_errors", mutates_args=())
def pair_region_errors(
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
    highest: int = 255,
) -> Tensor:
    run = launch if dispatch.runs_kernels(pred_w) else plain
    return run.forward(
        pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, coefficients,
        source_w, noise_w, source_l, noise_l, regions, num_regions, highest,
    )  # fmt: skip


@torch.library.custom_op("alignkit::pair_region_errors_backward", mutates_args=())
def pair_region_errors_backward(
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
    run = launch if dispatch.runs_kernels(pred_w) else plain
    return run.backward(
        grad, pred_w, pred_l, clean_w, clean_l, coefficients, source_w, noise_w, source_l, noise_l, regions
    )


@pair_region_errors.register_fake
def _(pred_w: Tensor, *args: Any) -> Tensor:
    return pred_w.new_empty((6, pred_w.shape[0], args[11]), dtype=torch.float64)


@pair_region_errors_backward.register_fake
def _(grad: Tensor, pred_w: Tensor, pred_l: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(pred_w, memory_format=torch.contiguous_format),
        torch.empty_like(pred_l, memory_format=torch.contiguous_format),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred_w, pred_l, _, _, clean_w, clean_l, coefficients, *sources, regions, _, _ = inputs
    source_w, noise_w, source_l, noise_l = sources
    ctx.sources = source_w, source_l
    ctx.save_for_backward(pred_w, pred_l, clean_w, clean_l, coefficients, noise_w, noise_l, regions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source_w, source_l = ctx.sources
    pred_w, pred_l, clean_w, clean_l, coefficients, noise_w, noise_l, regions = ctx.saved_tensors
    dpred_w, dpred_l = pair_region_errors_backward(
        grad, pred_w, pred_l, clean_w, clean_l, coefficients,
        source_w, noise_w, source_l, noise_l, regions,
    )  # fmt: skip
    return dpred_w, dpred_l, *[None] * 12


pair_region_errors.register_autograd(_backward, setup_context=_save)
