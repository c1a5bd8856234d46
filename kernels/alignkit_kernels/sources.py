"""The three things noise can be: given, regenerated from a key, or implied by a cached network input."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import InputError, check_like, describe
from .streams import Stream

GIVEN, KEYED, PATH = "given", "keyed", "path"


@dataclass(frozen=True)
class NoiseKey:
    """Noise as a pure function of what it is for; see `philox`.

    seed: the run's 64-bit seed, an int or an int64 tensor of one element.
    sample_ids: int64 [B], 0 <= id < 2**32, assigned (row numbers of a store), never hashed.
    draw: epoch or rollout number, an int or int64 [B], 0 <= draw < 2**32.
    stream: what the noise is for.
    """

    seed: int | Tensor
    sample_ids: Tensor
    draw: int | Tensor
    stream: int = Stream.TRAINING


@dataclass(frozen=True)
class PathState:
    """Noise implied by a network input of a sampler: noise = (state - a * clean) / s.

    state: the latents' shape; keep it in fp32, the division magnifies its rounding by 1 / s (so s > 0).
    """

    state: Tensor


NoiseSource: TypeAlias = Tensor | NoiseKey | PathState


def key_rows(key: NoiseKey, batch: int, device: torch.device) -> Tensor:
    """int64 [B, 4] on the device, rows (seed, sample id, draw, stream): a new key compiles nothing anew."""
    ids = key.sample_ids
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 1:
        raise InputError(f"NoiseKey.sample_ids must be an int64 tensor [B], got {describe(ids)}")
    if ids.shape[0] != batch:
        raise InputError(f"NoiseKey.sample_ids has {ids.shape[0]} ids for a batch of {batch}; pass one each")
    _check_word("sample_ids", ids)
    _check_word("draw", key.draw)
    _check_word("stream", key.stream)
    words = {"seed": key.seed, "sample_ids": ids, "draw": key.draw, "stream": key.stream}
    # words that are all on the host travel in one copy and start no kernel
    on_host = all(not isinstance(word, Tensor) or word.device.type == "cpu" for word in words.values())
    place = torch.device("cpu") if on_host else device
    rows = torch.stack([_word(name, word, batch, place) for name, word in words.items()], dim=1)
    return rows.to(device, non_blocking=True)


def noise_inputs(name: str, noise: NoiseSource, clean: Tensor) -> tuple[str, Tensor]:
    """A checked noise source in the form the ops take: which of the three, and the tensor that holds it."""
    if isinstance(noise, NoiseKey):
        return KEYED, key_rows(noise, clean.shape[0], clean.device)
    if isinstance(noise, PathState):
        check_like(f"{name}.state", noise.state, "clean", clean)
        return PATH, noise.state
    if isinstance(noise, Tensor):
        check_like(name, noise, "clean", clean)
        return GIVEN, noise
    raise InputError(f"{name} must be a Tensor, a NoiseKey or a PathState, got {describe(noise)}")


def _word(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        signed = (int(value) + 2**63) % 2**64 - 2**63  # a seed may use all 64 bits
        return torch.full((batch,), signed, dtype=torch.int64, device=device)
    if value.is_floating_point() or value.numel() not in (1, batch):
        raise InputError(f"NoiseKey.{name} must be an int or int64 [B] or [1], got {describe(value)}")
    return value.reshape(-1).to(device, torch.int64, non_blocking=device.type == "cuda").expand(batch)


def _check_word(name: str, value: int | Tensor) -> None:
    """Refuse what does not fit a counter word, where looking is free: device tensors are not waited for."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = int(value.min()), int(value.max())
    else:
        low = high = int(value)
    if low < 0 or high >= 2**32:
        raise InputError(f"NoiseKey.{name} holds {low if low < 0 else high}, expected 0 <= {name} < 2**32")
