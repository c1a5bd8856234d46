"""`region_errors` as torch sees it: an op, its backward, their shapes, and what implements them."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import reference as plain

if dispatch.HAVE_TRITON:
    from . import launch


@torch.library.custom_op("alignkit::region_errors", mutates_args=())
def region_errors(
    pred: Tensor,
    reference: Tensor | None,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
    num_regions: int,
) -> Tensor:
    run = launch if dispatch.runs_kernels(pred) else plain
    return run.forward(pred, reference, clean, coefficients, source, noise, regions, num_regions)


@torch.library.custom_op("alignkit::region_errors_backward", mutates_args=())
def region_errors_backward(
    grad: Tensor,
    pred: Tensor,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
) -> Tensor:
    run = launch if dispatch.runs_kernels(pred) else plain
    return run.backward(grad, pred, clean, coefficients, source, noise, regions)


@region_errors.register_fake
def _(pred: Tensor, *args: Any) -> Tensor:
    return pred.new_empty((3, pred.shape[0], args[6]), dtype=torch.float64)


@region_errors_backward.register_fake
def _(grad: Tensor, pred: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, _, clean, coefficients, source, noise, regions, _ = inputs
    ctx.source = source
    ctx.save_for_backward(pred, clean, coefficients, noise, regions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pred, clean, coefficients, noise, regions = ctx.saved_tensors
    dpred = region_errors_backward(grad, pred, clean, coefficients, ctx.source, noise, regions)
    return dpred, None, None, None, None, None, None, None


region_errors.register_autograd(_backward, setup_context=_save)
