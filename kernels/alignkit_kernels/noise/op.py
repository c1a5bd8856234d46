"""The noise ops as torch sees them: shapes for the compiler, and what implements them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("alignkit::keyed_normal", mutates_args=())
def keyed_normal(shape: Sequence[int], words: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return reference.keyed_normal(shape, words, dtype)


@torch.library.custom_op("alignkit::keyed_uniform", mutates_args=())
def keyed_uniform(shape: Sequence[int], words: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return reference.keyed_uniform(shape, words, dtype)


@torch.library.custom_op("alignkit::add_noise", mutates_args=())
def add_noise(clean: Tensor, coefficients: Tensor, source: str, noise: Sequence[Tensor]) -> Tensor:
    return reference.add_noise(clean, coefficients, source, noise)


@keyed_normal.register_fake
@keyed_uniform.register_fake
def _(shape: Sequence[int], words: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return words[0].new_empty(shape, dtype=dtype)


@add_noise.register_fake
def _(clean: Tensor, coefficients: Tensor, source: str, noise: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(clean, memory_format=torch.contiguous_format)
