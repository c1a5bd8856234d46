"""Checks of what the caller passes. Every message names the argument, what it is, and what it should be."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_REGIONS = 255


class InputError(ValueError):
    """An argument that cannot be used; the message names it and says what to do."""


FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def is_number(value: object) -> TypeGuard[float]:
    """A tuple of types, no union: torch 2.8 cannot trace `isinstance` with one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_tensor(name: str, x: Tensor) -> None:
    """What torch can make of a tensor and the ops cannot take: each would fail elsewhere, or pass and be wrong."""
    if type(x).__name__ == "DTensor":
        raise InputError(f"{name} is a DTensor; pass {name}.to_local(), or full_tensor() where it is sharded")
    if x.dtype not in FLOATS:
        raise InputError(f"{name} is {describe(x)}, expected float16, bfloat16, float32 or float64")
    if x.device.type == "mps":
        raise InputError(f"{name} is on {x.device}, which has no float64 for the sums; move the latents to the CPU")
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise InputError(
            f"{name} is inside a transform of torch.func (grad, vjp, jvp, vmap ...), which the fused ops do not take; "
            "use backward() or torch.autograd.grad on plain tensors"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise InputError(f"{name} has a tangent: forward-mode derivatives do not exist; use backward()")


def check_latents(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() not in (4, 5):
        raise InputError(
            f"{name} must be a floating-point tensor [B, C, F, H, W], [B, F, C, H, W] or [B, C, H, W], "
            f"got {describe(x)}"
        )
    check_tensor(name, x)
    if x.numel() == 0:
        raise InputError(f"{name} has no elements: {describe(x)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` is a floating-point tensor with the shape and device of `other`; dtypes may differ."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(f"{name} must be a floating-point tensor, got {describe(x)}")
    check_tensor(name, x)
    if x.shape != other.shape:
        raise InputError(f"{name} is {list(x.shape)} but {other_name} is {list(other.shape)}; they must be the same")
    if x.device != other.device:
        raise InputError(f"{name} is on {x.device} but {other_name} is on {other.device}; move one of them")


def check_coefficients(coefficients: Tensor, clean: Tensor) -> None:
    expected = [clean.shape[0], 4]
    if not isinstance(coefficients, Tensor) or coefficients.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"coefficients must be a float32 or float64 tensor {expected} of rows (a, s, c, d), "
            f"got {describe(coefficients)}"
        )
    if list(coefficients.shape) != expected:
        raise InputError(
            f"coefficients are {list(coefficients.shape)}, expected {expected}: one row (a, s, c, d) for each sample"
        )
    if coefficients.device != clean.device:
        raise InputError(f"coefficients are on {coefficients.device} but the latents are on {clean.device}; move them")


def check_regions(regions: Tensor | None, num_regions: int | None, pred: Tensor) -> tuple[Tensor | None, int]:
    """The label map as uint8 and the number of regions; no map is one region that holds everything."""
    if regions is None:
        if num_regions not in (None, 1):
            raise InputError(f"num_regions is {num_regions} but regions is None; pass the label map")
        return None, 1
    if num_regions is None:
        raise InputError("num_regions is required with regions (reading it off the labels would stall a GPU)")
    if not 1 <= num_regions <= MAX_REGIONS:
        raise InputError(f"num_regions is {num_regions}, expected 1 to {MAX_REGIONS}")
    if not isinstance(regions, Tensor) or regions.dtype not in (torch.uint8, torch.bool):
        raise InputError(f"regions must be a uint8 or bool tensor of labels, got {describe(regions)}")
    fits = regions.dim() == pred.dim() and all(r in (1, p) for r, p in zip(regions.shape, pred.shape, strict=True))
    if not fits:
        raise InputError(
            f"regions are {list(regions.shape)} but pred is {list(pred.shape)}; every axis must be equal "
            "or 1 (for example [B, 1, F, H, W] with channels first, [B, F, 1, H, W] with frames first)"
        )
    if regions.device != pred.device:
        raise InputError(f"regions are on {regions.device} but pred is on {pred.device}; move them")
    # an axis that `expand` repeated is read once, not written out
    regions = regions[tuple(slice(1) if step == 0 else slice(None) for step in regions.stride())]
    return (regions.view(torch.uint8) if regions.dtype == torch.bool else regions), num_regions


Shard = tuple[int, int, int]
"""axis, start, full_size: where a part lies in the whole, along one axis of [B, ...]."""


def check_shard(shard: Shard, shape: Sequence[int]) -> Shard:
    ints = isinstance(shard, tuple) and len(shard) == 3 and all(isinstance(x, int) for x in shard)
    if not ints:
        raise InputError(f"shard must be three ints (axis, start, full_size), got {shard!r}")
    axis, start, full_size = shard
    if not 1 <= axis < len(shape):
        raise InputError(f"shard's axis is {axis}, expected 1 to {len(shape) - 1}: latents are [B, ...]")
    if not 0 <= start <= full_size - shape[axis]:
        raise InputError(
            f"shard starts at {start} of {full_size}, but the part has {shape[axis]} along axis {axis}: it does not fit"
        )
    return shard


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}".replace("torch.", "")
    return type(x).__name__
