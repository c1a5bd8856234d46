"""Gives pairs the states that lead to their videos, where `noise.source` or `noise.anchor` asks for inversion."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import AlignkitError
from alignkit.models import VideoModel, family_module
from alignkit.models.context import context_terms
from alignkit.objectives.laws import Law, stored_rows
from alignkit.schedules.inversion import EVALUATIONS, invert, round_trip_error
from alignkit.stores.origins import Trajectory
from alignkit.stores.pairs import Pair


def versions() -> dict[str, str]:
    """Of the libraries that compute a video's bits."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def inversion_terms(config: Config, model: VideoModel) -> dict[str, Any]:
    """What stored inversions depend on, for a store's terms."""
    noise = config.noise.model_dump(mode="json", exclude={"guided", "max_inversion_error"})
    return {
        "noise": noise | ({"expert": config.model.expert} if config.model.expert else {}),  # whose steps they are at
        "inverted_on": model.schedule(config.sampler.num_steps).fingerprint,
        "inverted_by": {
            "network": model.fingerprint(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.attention,
            "device": model.vae.device.type,
            "evaluations": EVALUATIONS,
            **context_terms(model),
            "negative_prompt": config.sampler.negative_prompt if config.noise.inversion_guidance > 1 else None,
            "seed": config.pairs.seed,
            **versions(),
        },
    }


def add_inversions(config: Config, model: VideoModel, law: Law, pairs: list[Pair]) -> list[Pair]:
    """`pairs` with a trajectory for every side that `noise` wants inverted and that has no inversion, at the rows that
    the other side's rollout has states at, or at `noise.path_steps` rows drawn for the pair.

    By the frozen `model`, one video after the other, so that a pair's numbers do not depend on its company.
    """
    return [_with_inversions(config, model, law, pair) for pair in pairs]


def _with_inversions(config: Config, model: VideoModel, law: Law, pair: Pair) -> Pair:
    kinds = {"w": pair.origin_w.kind, "l": pair.origin_l.kind}
    paths = {"w": pair.path_w, "l": pair.path_l}
    wanted = [
        side
        for side, other in (("w", "l"), ("l", "w"))
        if config.noise.inverts(kinds[side], kinds[other]) and getattr(paths[side], "error", None) is None
    ]
    if not wanted:
        return pair
    rows = pair.path_rows if config.noise.source != "inversion" else ()
    if not rows:
        rows = stored_rows(law, config.noise.path_steps, config.pairs.seed, pair.id, 0)
    videos = {"w": pair.winner, "l": pair.loser}
    found: dict[str, Any] = {f"path_{side}": _inverted(config, model, law, pair, videos[side], rows) for side in wanted}
    return replace(pair, path_rows=rows, **found)


def _inverted(
    config: Config, model: VideoModel, law: Law, pair: Pair, video: Tensor, rows: tuple[int, ...]
) -> Trajectory:
    device, schedule = model.vae.device, law.schedule
    clean = video[None].to(device)
    predict = _network(config, model, pair, device)
    seen: dict[int, Tensor] = {}

    def watch(row: int, state: Tensor) -> None:
        if row in rows or (row - 1 in rows and config.noise.path_between):
            seen[row] = state[0].cpu()

    top = invert(clean, predict, schedule, rows[0], watch)
    error = round_trip_error(clean, top, predict, schedule, rows[0]).item()
    following = torch.stack([seen[row + 1] for row in rows]) if config.noise.path_between else None
    return Trajectory(torch.stack([seen[row] for row in rows]), following, error)


def _network(config: Config, model: VideoModel, pair: Pair, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    family, guidance = family_module(model.family), config.noise.inversion_guidance
    if model.transformer is None:
        raise AlignkitError("inversion needs the network's weights")
    text = model.pad_text([pair.text]).to(device, model.dtype)
    negative = model.pad_text(model.encode_text([config.sampler.negative_prompt])).to(device, model.dtype)

    def predict(state: Tensor, timesteps: Tensor) -> Tensor:
        return family.guided(model.transformer, state, timesteps, text, negative, guidance)

    return predict
