"""Where a video of a pair came from, and what is known of the path that led to it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit_kernels import NoiseKey

Kind = Literal["real", "regenerated", "rollout", "given"]


@dataclass(frozen=True)
class Origin:
    """One side's origin.

    kind: "real"; "regenerated" (LocalDPO's loser); "rollout" (sampled by a model); "given" (a user's own, of which
    nothing is known).
    key: (seed, sample id, draw, stream) of the keyed noise it was made from; None for real and given ones.
    first: the row of the schedule that this noise was put in at: 0 for rollouts, N − k for regenerated ones.
    recipe: of regenerated and sampled ones, how: schedule (fingerprint), solver, steps, guidance, dynamic,
    negative_prompt, network (fingerprint), regime (engine, dtype, attention, batch), versions.
    """

    kind: Kind
    key: tuple[int, int, int, int] | None = None
    first: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        stored = json.loads(text)
        return cls(**stored | {"key": tuple(stored["key"]) if stored["key"] else None})


REAL, GIVEN = Origin("real"), Origin("given")


@dataclass(frozen=True)
class Trajectory:
    """Network inputs on the path that led to one side, at the pair's S rows of the schedule.

    states, following: fp32 [S, ...], into those rows' steps, and into the ones after them (at the last row: the video
    itself); following is None where it was not asked for. error: relative root-mean-square error of solving back from
    the noisiest state, of an inversion; None of a rollout, which was there.
    """

    states: Tensor
    following: Tensor | None = None
    error: float | None = None


def keys_of(origins: list[Origin]) -> Tensor:
    """Words of the noise keys, int64 [B, 4]; a row of −1 where an origin has none."""
    words = [(signed(origin.key[0]), *origin.key[1:]) if origin.key else (-1,) * 4 for origin in origins]
    return torch.tensor(words, dtype=torch.int64)


def noise_key(words: Tensor) -> NoiseKey:
    """The key of each row of int64 [B, 4], as `keys_of` gives them."""
    seed, ids, draw, stream = words.unbind(dim=1)
    return NoiseKey(seed, ids, draw, stream)


def signed(seed: int) -> int:
    """A 64-bit seed, which may use all of its bits, as the int64 with those bits."""
    return (seed + 2**63) % 2**64 - 2**63
