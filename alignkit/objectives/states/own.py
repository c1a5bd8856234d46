"""`noise.source: initial`, `path` and `inversion`: each side at states of its own path, with the noise they imply.

`initial`: the noise that the side was made from, regenerated in registers from its key. `path`, `inversion`: network
inputs that were stored with the pair. Diffusion-APO (arXiv 2605.07503) says that training noise follows the paths of
inference; how is our reading (docs/apo.md).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.objectives.laws import Law, PathPoints
from alignkit.objectives.states.noised import Noised
from alignkit.stores.origins import Trajectory, keys_of, noise_key, signed
from alignkit.stores.pairs import PairBatch, Side
from alignkit_kernels import NoiseKey, NoiseSource, PathState, Stream, add_keyed_noise, keyed_rand, keyed_randn


def own(config: Config, law: Law, batch: PairBatch, epochs: Tensor) -> Noised:
    """Winner and loser at the same point of the path: one of those at which the pair has states, where it has any."""
    assert batch.side_w is not None and batch.side_l is not None
    source = config.noise.source
    paths = [[_path(source, side, i) for i in range(len(batch))] for side in (batch.side_w, batch.side_l)]
    stored = torch.tensor([w is not None or l is not None for w, l in zip(*paths, strict=True)])
    points, column = _points(law, batch, epochs, stored)
    ends = None
    if config.noise.path_between:
        points, ends = _between(config, law, batch, epochs, points)
    keys = _keys(config, batch, epochs)
    sides = [
        _side(clean, points, key, path, column, ends)
        for clean, key, path in zip((batch.winner, batch.loser), keys, paths, strict=True)
    ]
    (winner, noise_w), (loser, noise_l) = sides
    coefficients = points.coefficients.to(batch.winner.device)
    return Noised(winner, loser, coefficients, points.timesteps, noise_w, noise_l, points.weight, points.rows)


def _path(source: str, side: Side, i: int) -> Trajectory | None:
    """The states that a side is shown at; with `initial`, none of a side that has noise of its own."""
    return None if source == "initial" and side.origins[i].key else side.paths[i]


def _points(law: Law, batch: PairBatch, epochs: Tensor, stored: Tensor) -> tuple[PathPoints, Tensor]:
    """The pairs' points, and for those of `stored` which of their path rows it is, int64 [B]."""
    if not stored.any():
        return law.draw(batch.ids, epochs), torch.zeros(len(batch), dtype=torch.int64)
    assert batch.path_rows is not None
    among = law.draw(batch.ids, epochs, batch.path_rows)
    assert among.rows is not None
    column = (batch.path_rows == among.rows[:, None]).long().argmax(dim=1)
    if stored.all():
        return among, column
    free = law.draw(batch.ids, epochs)

    names = "coefficients", "timesteps", "rows", "weight"
    both: dict[str, Any] = {name: (getattr(among, name), getattr(free, name)) for name in names}

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(stored.view(-1, *[1] * (a.dim() - 1)), a, b)

    chosen = {name: choose(a, b) for name, (a, b) in both.items() if a is not None and b is not None}
    return PathPoints(**chosen), column


def _between(
    config: Config, law: Law, batch: PairBatch, epochs: Tensor, points: PathPoints
) -> tuple[PathPoints, Tensor]:
    """Points a keyed share of the way on to the next row, and their shares of the states at both rows, fp64 [B, 2].

    A first-order solver's states are a·x̂0 + s·ε̂ with the same x̂0 and ε̂ at both ends of its step: a line for Euler,
    an arc for DDIM. So any point between is a sum of its ends, by the shares that make its own (a, s) of theirs.
    """
    key = NoiseKey(config.train.seed, batch.ids, epochs, Stream.TIMESTEP)  # whose first number chose the row
    u = keyed_rand((len(batch), 2), key, device="cpu", dtype=torch.float64)[:, 1]
    assert points.rows is not None
    coefficients, timesteps = law.model.between(points.rows, u, len(law.schedule))
    ends = torch.stack([law.schedule.coefficients[points.rows + step, :2] for step in (0, 1)], dim=2)  # [B, (a, s), 2]
    shares = torch.linalg.solve(ends, coefficients[:, :2, None])[:, :, 0]
    return replace(points, coefficients=coefficients, timesteps=timesteps), shares


def _keys(config: Config, batch: PairBatch, epochs: Tensor) -> list[Tensor]:
    """Words of the noise key of each side, int64 [B, 4]: its own; for a real video beside its own regenerated copy, the
    noise that the copy's path began with, since outside the mask both are one; else the pair's fresh noise."""
    assert batch.side_w is not None and batch.side_l is not None
    own_w, own_l = (keys_of(side.origins) for side in (batch.side_w, batch.side_l))
    seed, stream = torch.full_like(own_w[:, 0], signed(config.train.seed)), torch.full_like(epochs, Stream.TRAINING)
    fresh = torch.stack([seed, batch.ids, epochs, stream], dim=1)
    result = []
    for words, other, side in ((own_w, own_l, batch.side_l), (own_l, own_w, batch.side_w)):
        copied = torch.tensor([origin.kind == "regenerated" for origin in side.origins])
        none = words[:, 1:2] < 0
        result.append(torch.where(none, torch.where(copied[:, None], other, fresh), words))
    return result


def _side(
    clean: Tensor,
    points: PathPoints,
    key: Tensor,
    paths: list[Trajectory | None],
    column: Tensor,
    shares: Tensor | None,
) -> tuple[Tensor, NoiseSource]:
    """The noised side, fp32 [B, ...], and its noise."""
    coefficients = points.coefficients.to(clean.device)
    noise = noise_key(key)
    if not any(paths):
        return add_keyed_noise(clean, coefficients, noise), noise
    states = [
        None if path is None else _state(path, int(column[i]), None if shares is None else shares[i])
        for i, path in enumerate(paths)
    ]
    whole = [state for state in states if state is not None]
    if len(whole) == len(states):
        state = torch.stack(whole).to(clean.device)
        return state, PathState(state)
    # some of each: what the key and the states imply, written out, is the same number for a pair in any company
    state = add_keyed_noise(clean, coefficients, noise)
    implied = keyed_randn(clean.shape, noise, device=clean.device)
    for i, given in enumerate(states):
        if given is not None:
            a, s = points.coefficients[i, :2].tolist()
            state[i] = given.to(clean.device)
            implied[i] = (state[i] - a * clean[i]) / s
    return state, implied


def _state(path: Trajectory, column: int, shares: Tensor | None) -> Tensor:
    if shares is None:
        return path.states[column]
    assert path.following is not None
    here, there = shares.tolist()
    return here * path.states[column] + there * path.following[column]
