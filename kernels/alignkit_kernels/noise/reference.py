"""Keyed noise in plain torch: the meaning of the kernels beside it."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ..philox import normals, sample_words, uniforms
from ..sources import GIVEN, KEYED

PART = 2**15  # counters at a time of all samples together, for each thread: what they become stays in its cache


def from_words(shape: list[int], keys: Tensor, dtype: torch.dtype, made: Callable[[Tensor], Tensor]) -> Tensor:
    """What is `made` of the words of each element, fp32 rounded to `dtype`."""
    elements, batch = prod(shape[1:]), keys.shape[0]
    found = torch.empty(batch, -(-elements // 4) * 4, dtype=dtype, device=keys.device)
    on_cpu = keys.device.type == "cpu"
    step = 4 * max(PART * torch.get_num_threads() // max(batch, 1), 1) if on_cpu else max(found.shape[1], 1)
    for start in range(0, found.shape[1], step):
        part = found[:, start : start + step]
        part.copy_(made(sample_words(part.shape[1], keys, start // 4)))
    return found[:, :elements].reshape(shape).contiguous()


def keyed_normal(shape: list[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    return from_words(shape, keys, dtype, normals)


def keyed_part(shape: list[int], keys: Tensor, dtype: torch.dtype, axis: int, start: int, full_size: int) -> Tensor:
    """The part [start, start + shape[axis]) along `axis` of what the whole latents' noise is."""
    whole = [full_size if i == axis else size for i, size in enumerate(shape)]
    return keyed_normal(whole, keys, dtype).narrow(axis, start, shape[axis]).contiguous()


def keyed_uniform(shape: list[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    return from_words(shape, keys, dtype, uniforms)


def noise_of(source: str, noise: Tensor, clean: Tensor, columns: list[Tensor]) -> Tensor:
    """The noise tensor of any source, in `clean`'s dtype. `columns` are (a, s, c, d), each [B, 1, ...]."""
    if source == GIVEN:
        return noise.to(clean.dtype)
    if source == KEYED:
        return keyed_normal(list(clean.shape), noise, clean.dtype)
    a, s, _, _ = columns
    return (noise.to(clean.dtype) - a * clean) / s


def coefficient_columns(coefficients: Tensor, dtype: torch.dtype, dims: int) -> list[Tensor]:
    """a, s, c, d of [B, 4], each shaped to broadcast over a latent of `dims` axes."""
    return [x.reshape(-1, *[1] * (dims - 1)) for x in coefficients.to(dtype).unbind(1)]


def add_noise(clean: Tensor, coefficients: Tensor, source: str, noise: Tensor) -> Tensor:
    wide = clean.to(torch.promote_types(clean.dtype, torch.float32))
    columns = coefficient_columns(coefficients, wide.dtype, wide.dim())
    a, s, _, _ = columns
    return (a * wide + s * noise_of(source, noise, wide, columns)).to(clean.dtype)
