"""Starts the noise kernels; the same signatures as the reference's."""

from math import prod

import torch
from torch import Tensor

from ..dispatch import launch
from ..launch import TRITON_DTYPE, launch_for
from ..layout import VECTOR, by_sample
from .kernel import add_noise_kernel, keyed_kernel, keyed_part_kernel


def keyed_normal(shape: list[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    return _keyed(shape, keys, dtype, uniform=False)


def keyed_uniform(shape: list[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
    return _keyed(shape, keys, dtype, uniform=True)


def keyed_part(shape: list[int], keys: Tensor, dtype: torch.dtype, axis: int, start: int, full_size: int) -> Tensor:
    out, elements, choice = keys.new_empty(shape, dtype=dtype), prod(shape[1:]), launch_for(keys.device)
    step = prod(shape[axis + 1 :])
    with torch.cuda.device_of(keys):
        launch(
            keyed_part_kernel, (-(-elements // choice.noise_tile), 1, shape[0]), out, keys.contiguous(), elements,
            shape[axis] * step, start * step, (full_size - shape[axis]) * step,
            TILE=choice.noise_tile, num_warps=choice.noise_warps,
        )  # fmt: skip
    return out


def _keyed(shape: list[int], keys: Tensor, dtype: torch.dtype, uniform: bool) -> Tensor:
    out, elements, choice = keys.new_empty(shape, dtype=dtype), prod(shape[1:]), launch_for(keys.device)
    with torch.cuda.device_of(keys):
        launch(
            keyed_kernel, (-(-elements // choice.noise_tile), 1, shape[0]),
            out, keys.contiguous(), elements,
            UNIFORM=uniform, ALIGNED=elements % VECTOR == 0, TILE=choice.noise_tile, num_warps=choice.noise_warps,
        )  # fmt: skip
    return out


def add_noise(clean: Tensor, coefficients: Tensor, source: str, noise: Tensor) -> Tensor:
    elements, choice = clean[0].numel(), launch_for(clean.device)
    aligned = elements % VECTOR == 0
    clean, noise = by_sample(clean, aligned), by_sample(noise, aligned)
    out = torch.empty_like(clean, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(clean):
        launch(
            add_noise_kernel, (-(-elements // choice.noise_tile), 1, clean.shape[0]),
            clean, noise, coefficients.contiguous(), out, clean.stride(0), noise.stride(0), elements,
            SOURCE=source, DTYPE=TRITON_DTYPE[torch.promote_types(clean.dtype, torch.float32)], ALIGNED=aligned,
            TILE=choice.noise_tile, num_warps=choice.noise_warps,
        )  # fmt: skip
    return out
