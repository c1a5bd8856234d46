"""Keyed noise: the same numbers wherever, whenever and beside whatever they are drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import InputError, Shard, check_coefficients, check_latents, check_shard
from ..sources import NoiseKey, NoiseSource, key_rows, noise_inputs
from . import op


def keyed_randn(
    shape: Sequence[int],
    key: NoiseKey,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    shard: Shard | None = None,
) -> Tensor:
    """Standard normal noise of `shape` = [B, ...] that depends on the key and the place in the sample alone.

    Row b is sample `key.sample_ids[b]`; element i of a row is element i of the contiguous sample, so the same
    sample drawn with another batch, block size or number of ranks is the same. Normals are made in fp32 and
    rounded to `dtype`. `device` defaults to where the ids are.

    shard: (axis, start, full_size): `shape` is a part of latents that have full_size along `axis` (of [B, ...], so 1
    and above), from `start` on; its noise is that part of the whole's.

    Raises InputError when the shape does not start with the number of ids, or a word of the key does not fit.
    """
    if not dtype.is_floating_point:
        raise InputError(f"keyed_randn makes floating-point noise, not {dtype}")
    shape, keys = _request(shape, key, device)
    if shard is None:
        return op.keyed_normal(shape, keys, dtype)
    return op.keyed_part(shape, keys, dtype, *check_shard(shard, shape))


def keyed_rand(
    shape: Sequence[int],
    key: NoiseKey,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1) of `shape` = [B, ...]: the top 24 bits of the words `keyed_randn` uses.

    `dtype` is float32 or float64 (a narrower one would round up to 1). Raises InputError as `keyed_randn`.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"keyed_rand makes float32 or float64, not {dtype}, which would round up to 1")
    return op.keyed_uniform(*_request(shape, key, device), dtype)


def add_keyed_noise(clean: Tensor, coefficients: Tensor, key: NoiseSource, *, shard: Shard | None = None) -> Tensor:
    """x_t = a * clean + s * noise in one pass; keyed noise is never stored.

    clean: [B, C, F, H, W], [B, F, C, H, W] or [B, C, H, W]; coefficients: [B, 4] rows (a, s, c, d); key: usually a
    `NoiseKey`, but any noise source works; shard: as in `keyed_randn`, and then keyed noise is stored. Computed in fp32
    (fp64 for fp64), returned in `clean`'s dtype. Not differentiable. Raises InputError when shapes, dtypes or devices
    do not fit.
    """
    check_latents("clean", clean)
    check_coefficients(coefficients, clean)
    return op.add_noise(clean, coefficients, *noise_inputs("key", part_of(key, clean, shard), clean))


def part_of(noise: NoiseSource, clean: Tensor, shard: Shard | None) -> NoiseSource:
    """Keyed noise of a part of the latents as a tensor; any other source, and that of whole latents, as it is."""
    if shard is None:
        return noise
    check_shard(shard, clean.shape)
    if not isinstance(noise, NoiseKey):
        return noise
    wide = torch.promote_types(clean.dtype, torch.float32)
    return keyed_randn(clean.shape, noise, device=clean.device, dtype=wide, shard=shard)


def _request(shape: Sequence[int], key: NoiseKey, device: torch.device | str | None) -> tuple[list[int], Tensor]:
    shape = list(shape)
    if not isinstance(key, NoiseKey):
        raise InputError(f"key must be a NoiseKey, got {type(key).__name__}")
    if not shape or min(shape) < 1:
        raise InputError(f"shape is {shape}, expected [B, ...] with every size at least 1")
    if device is None and isinstance(key.sample_ids, Tensor):  # of anything else the key's own check says what it is
        device = key.sample_ids.device
    return shape, key_rows(key, shape[0], torch.device(device or "cpu"))
