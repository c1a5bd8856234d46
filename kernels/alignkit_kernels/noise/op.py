"""The noise ops as torch sees them: shapes for the compiler, and what implements them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from . import reference as plain

if dispatch.HAVE_TRITON:
    from . import launch


@torch.library.custom_op("alignkit::keyed_normal", mutates_args=())
def keyed_normal(shape: Sequence[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    run = launch if dispatch.runs_kernels(keys) else plain
    return run.keyed_normal(shape, keys, dtype)


@torch.library.custom_op("alignkit::keyed_part", mutates_args=())
def keyed_part(shape: Sequence[int], keys: Tensor, dtype: torch.dtype, axis: int, start: int, full_size: int) -> Tensor:
    run = launch if dispatch.runs_kernels(keys) else plain
    return run.keyed_part(shape, keys, dtype, axis, start, full_size)


@torch.library.custom_op("alignkit::keyed_uniform", mutates_args=())
def keyed_uniform(shape: Sequence[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    run = launch if dispatch.runs_kernels(keys) else plain
    return run.keyed_uniform(shape, keys, dtype)


@torch.library.custom_op("alignkit::add_noise", mutates_args=())
def add_noise(clean: Tensor, coefficients: Tensor, source: str, noise: Tensor) -> Tensor:
    run = launch if dispatch.runs_kernels(clean) else plain
    return run.add_noise(clean, coefficients, source, noise)


@keyed_normal.register_fake
@keyed_part.register_fake
@keyed_uniform.register_fake
def _(shape: Sequence[int], keys: Tensor, dtype: torch.dtype, *part: int) -> Tensor:
    return keys.new_empty(shape, dtype=dtype)


@add_noise.register_fake
def _(clean: Tensor, coefficients: Tensor, source: str, noise: Tensor) -> Tensor:
    return torch.empty_like(clean, memory_format=torch.contiguous_format)
