"""The three things noise can be: given, regenerated from a key, or implied by a cached network input."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import InputError, check_like, describe
from .streams import Stream

GIVEN, KEYED, PATH = "given", "keyed", "path"
NOT_WORDS = torch.bool, torch.complex64, torch.complex128


@dataclass(frozen=True, eq=False)  # equality of tensors is no truth value; `is` decides
class NoiseKey:
    """Noise as a pure function of what it is for; see `philox`.

    seed: the run's 64-bit seed, an int or an int64 tensor of one element.
    sample_ids: int64 [B], 0 <= id < 2**32, assigned (row numbers of a store), never hashed.
    draw: epoch or rollout number, an int or int64 [B], 0 <= draw < 2**32.
    stream: what the noise is for, an int or int64 [B].
    """

    seed: int | Tensor
    sample_ids: Tensor
    draw: int | Tensor
    stream: int | Tensor = Stream.TRAINING


@dataclass(frozen=True, eq=False)
class PathState:
    """Noise implied by a network input of a sampler: noise = (state - a * clean) / s.

    state: the latents' shape; keep it in fp32, the division magnifies its rounding by 1 / s (so s > 0).
    """

    state: Tensor


NoiseSource: TypeAlias = Tensor | NoiseKey | PathState


def key_rows(key: NoiseKey, batch: int, device: torch.device) -> Tensor:
    """int64 [B, 4] on the device, rows (seed, sample id, draw, stream): a new key compiles nothing anew."""
    ids = key.sample_ids
    if not isinstance(ids, Tensor) or ids.dtype in NOT_WORDS or ids.is_floating_point() or ids.dim() != 1:
        raise InputError(f"NoiseKey.sample_ids must be an int64 tensor [B], got {describe(ids)}")
    if ids.shape[0] != batch:
        raise InputError(f"NoiseKey.sample_ids has {ids.shape[0]} ids for a batch of {batch}; pass one each")
    words = {"seed": key.seed, "sample_ids": ids, "draw": key.draw, "stream": key.stream}
    for name, word in words.items():
        _check_word(name, word, batch)
    tensors = [word for word in words.values() if isinstance(word, Tensor)]
    if torch.compiler.is_compiling() or any(word.device.type != "cpu" for word in tensors):
        return torch.stack([_word(word, batch, device) for word in words.values()], dim=1)
    # words that are all on the host travel in one copy and start no kernel
    columns = [word.reshape(-1).tolist() if isinstance(word, Tensor) else [_signed(word)] for word in words.values()]
    columns = [column * batch if len(column) == 1 else column for column in columns]
    return torch.tensor(list(zip(*columns, strict=True))).to(device, non_blocking=True)


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


def _signed(word: int) -> int:
    return (int(word) + 2**63) % 2**64 - 2**63  # a seed may use all 64 bits


def _word(word: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(word, Tensor):
        return torch.full((batch,), _signed(word), dtype=torch.int64, device=device)
    return word.reshape(-1).to(device, torch.int64, non_blocking=device.type == "cuda").expand(batch)


def _check_word(name: str, word: int | Tensor, batch: int) -> None:
    """Whole numbers, one or one a sample; and, where looking is free, that they fit a counter word. Device tensors are
    not waited for."""
    if isinstance(word, Tensor):
        if word.is_floating_point() or word.dtype in NOT_WORDS or word.numel() not in (1, batch):
            raise InputError(f"NoiseKey.{name} must be an int or int64 [B] or [1], got {describe(word)}")
        if word.device.type != "cpu" or torch.compiler.is_compiling():
            return
        values = word.reshape(-1).tolist()
    elif isinstance(word, bool) or not isinstance(word, int):
        raise InputError(f"NoiseKey.{name} must be an int or int64 [B] or [1], got {word!r}")
    else:
        values = [int(word)]  # an IntEnum is no number to dynamo
    if name == "seed":
        return
    for value in values:
        if not 0 <= value < 2**32:
            raise InputError(f"NoiseKey.{name} holds {value}, expected 0 <= {name} < 2**32")
