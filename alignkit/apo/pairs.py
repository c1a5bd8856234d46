"""`alignkit pairs` from rollouts: rows that say which of two is better, by their numbers, become pairs.

One of the two may be a real video, an anchor, by its path.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.apo.inversions import add_inversions, inversion_terms, versions
from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.media.names import written_file
from alignkit.media.rows import read_table
from alignkit.media.videos import decode_clip
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.models.context import TokenGroup
from alignkit.moment import end_if_of_the_moment
from alignkit.objectives.laws import Law
from alignkit.objectives.states.checks import check_noise, sampler_terms
from alignkit.progress import say
from alignkit.stores.blocks import Made, build_store, check_store
from alignkit.stores.folders import (
    SPLITS,
    add_skipped_pairs,
    encoding_terms,
    latent_grid,
    pairs_folder,
    say_skipped,
    stored_dtype,
    video_spec,
    write_skipped,
)
from alignkit.stores.origins import REAL, Origin, Trajectory
from alignkit.stores.pairs import LATENT_DTYPES, Pair, PairStore, fault_of
from alignkit.stores.rollouts import RolloutStore
from alignkit.stores.store import StoreInfo

COLUMNS = ("chosen", "rejected")

Anchor = tuple[Path, str, tuple[int, ...]]
"""A real video, its prompt, and the rows of the schedule at which its inversion is kept."""


@dataclass(frozen=True)
class Ranking:
    """One row: `chosen` is better than `rejected`, each a rollout's number or, on one side, a video's path.

    pair_id: the row's number in its file, from 0; where: its place for people ("ranking.jsonl:7").
    """

    pair_id: int
    where: str
    prompt: str
    chosen: int | Path
    rejected: int | Path


def build_rollout_pairs(
    config: Config,
    device: torch.device,
    show: bool = True,
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    group: TokenGroup | None = None,
) -> dict[str, int]:
    """Make every pair that is not stored yet; returns how many pairs each split holds.

    Any number of processes may call this at once. A share `data.heldout` of the prompts is held out, with all their
    pairs. A pair's winner and loser keep their origins and the states of their paths; a real video gets its inversion
    where `noise.anchor` asks for it. preview(model, store) and group as in `build_given_pairs`.

    Raises DataError for rollouts of another sampler than the configuration's, and where no row can be used.
    """
    assert config.data.pairs is not None and config.data.rollouts is not None
    latent_grid(config)
    law, rollouts = check_rollouts(config)
    rankings, problems = read_rankings(config.data.pairs, rollouts)
    splits = split_prompts(rankings, config.data.heldout, config.pairs.seed)
    if show:
        say_skipped(problems)
        say(f"{len(splits['train'])} pairs to train on, {len(splits['heldout'])} held out; loading {config.model.path}")
    accepted = partial(write_skipped, config, problems if show else None)
    build_ranked(config, device, law, rollouts, splits, show=show, preview=preview, accepted=accepted, group=group)
    if show:
        add_skipped_pairs(config)
    return {split: len(rows) for split, rows in splits.items()}


def build_ranked(
    config: Config,
    device: torch.device,
    law: Law,
    rollouts: RolloutStore,
    splits: dict[str, list[Ranking]],
    *,
    show: bool = True,
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    accepted: Callable[[], None] = lambda: None,
    group: TokenGroup | None = None,
) -> None:
    """Every pair of `splits`, by split, that is not stored yet."""
    rankings = [row for rows in splits.values() for row in rows]
    anchored = any(isinstance(side, Path) for row in rankings for side in (row.chosen, row.rejected))
    inverted = config.noise.source == "inversion" or (anchored and config.noise.inverts("real", beside="rollout"))
    dtype = working_dtype(config.model, device)
    model = load_model(config.model, with_transformer=inverted, device=device, dtype=dtype, group=group)
    shared = StoreInfo(
        kind="rollouts",
        family=model.family,
        model=rollouts.info.model,
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        pairs=0,
        block_size=config.pairs.block_size,
        dtype=stored_dtype(config, dtype),
        made={
            "rollouts": rollouts.info.made,
            "states": config.noise.stores_states,
            "max_sequence_length": config.model.max_sequence_length,
            **(encoding_terms(config.model) if anchored else {}),
            **(inversion_terms(config, model) if inverted else {}),
        },
    )
    planned = {}
    for split, rows in splits.items():
        info = replace(shared, pairs=len(rows))
        members = [[row.pair_id, row.prompt, *map(_member, (row.chosen, row.rejected))] for row in rows]
        check_store(pairs_folder(config, split), info, members)
        planned[split] = info, members, partial(_make_rows, config, model, law, rollouts, rows, inverted)
    for split, (info, members, make) in planned.items():
        build_store(
            pairs_folder(config, split), model, info, members, make, f"making {split} pairs",
            negative_prompt=config.sampler.negative_prompt, preview=preview,
            accepted=accepted if split == SPLITS[0] else lambda: None, show=show,
        )  # fmt: skip


def check_rollouts(config: Config) -> tuple[Law, RolloutStore]:
    """The timestep law and the rollouts of `config`, if they go together; no weights are read.

    Raises ConfigError as `check_noise`, and DataError, naming the difference, for rollouts of another model, sampler,
    size or text length than the configuration's, of other versions, or without the states that it asks for.
    """
    assert config.data.rollouts is not None
    model, data = load_model(config.model, with_transformer=False, with_encoders=False), config.data
    law, rollouts = check_noise(config, model), RolloutStore(config.data.rollouts)
    stored = rollouts.info
    wanted: dict[str, Any] = {"family": model.family, "vae": model.fingerprint("vae"), "model": model.fingerprint()}
    wanted |= {"text_encoder": model.fingerprint("text_encoder")} | sampler_terms(config, model)
    wanted |= {
        "regime.latents": list(model.latent_shape(data.num_frames, data.height, data.width)),
        "regime.max_sequence_length": config.model.max_sequence_length,
        **{f"version of {name}": number for name, number in versions().items()},
    }
    for name, now in wanted.items():
        then = stored.made.get(name, getattr(stored, name, None))
        if then != now:
            raise DataError(
                f"data.rollouts: {rollouts.folder}: sampled with {name} = {then!r}, now it is {now!r}; put the "
                "configuration back to what it was, or sample again in another folder"
            )
    states = stored.made.get("states")
    if config.noise.stores_states and (states is None or (config.noise.path_between and not states["path_between"])):
        lacking = "none" if states is None else "none of those that follow"
        raise DataError(
            f"data.rollouts: {rollouts.folder}: of the states of its paths it holds {lacking}; sample again in another "
            "folder with this configuration"
        )
    return law, rollouts


def read_rankings(file: Path, rollouts: RolloutStore) -> tuple[list[Ranking], list[Problem]]:
    """The rows of a .jsonl, .csv or .parquet file, and what is wrong with the others.

    Columns: chosen and rejected, each the number of a rollout, one of them perhaps the path of a real video, absolute
    or relative to the file's own folder; prompt, if wanted, must then be the rollouts' own. Left out: rows with a
    number that no rollout has, of two prompts, of one video twice, and rows that repeat or contradict an earlier one.

    Raises DataError if the file cannot be read, lacks a column, or has no row that can be used.
    """
    table = read_table(file, "preference file", (".jsonl", ".csv", ".parquet"), (*COLUMNS, "prompt"))
    if not set(COLUMNS) <= set(table.columns):
        found = ", ".join(table.columns) or "(none)"
        raise DataError(f"preference file {file}: it has the columns {found}; {' and '.join(COLUMNS)} are needed")
    rankings: list[Ranking] = []
    problems: list[Problem] = []
    seen: dict[frozenset[int | Path], Ranking] = {}
    for number, (line, row) in enumerate(table.rows):
        where = f"{file.name}:{line}"
        try:
            ranking = _ranking(number, where, row, file.parent, rollouts)
            sides = frozenset((ranking.chosen, ranking.rejected))
            if sides in seen:
                kind = "repeats" if seen[sides].chosen == ranking.chosen else "contradicts"
                raise DataError(f"{kind} {seen[sides].where}, which is kept")
            seen[sides] = ranking
            rankings.append(ranking)
        except DataError as error:
            problems.append(Problem(where, str(error)))
    if not rankings:
        first = f" ({problems[0].video}: {problems[0].reason})" if problems else ""
        raise DataError(f"preference file {file}: holds no row that can be used{first}")
    return rankings, problems


def _ranking(number: int, where: str, row: dict[str, Any] | str, folder: Path, rollouts: RolloutStore) -> Ranking:
    if isinstance(row, str):
        raise DataError(row)
    sides = [_side(row, column, folder, rollouts) for column in COLUMNS]
    prompts = {rollouts.prompt_of(side) for side in sides if isinstance(side, int)}
    if not prompts:
        raise DataError("neither is a rollout; data.pairs without data.rollouts is for two videos")
    if len(prompts) > 1:
        raise DataError(f"its rollouts are of two prompts, {' and '.join(repr(p) for p in sorted(prompts)):.100}")
    if sides[0] == sides[1]:
        raise DataError(f"rollout {sides[0]} is on both sides")
    (prompt,) = prompts
    if row.get("prompt") and " ".join(str(row["prompt"]).split()) != prompt:
        raise DataError(f"its prompt {row['prompt']!r:.60} is not its rollouts', {prompt!r:.60}")
    return Ranking(number, where, prompt, *sides)


def _side(row: dict[str, Any], column: str, folder: Path, rollouts: RolloutStore) -> int | Path:
    value = row.get(column)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value not in rollouts:
            raise DataError(f"{column}: no rollout has the number {value}")
        return value
    if isinstance(value, str) and value.strip():
        return written_file(folder, value)
    raise DataError(f"{column}: expected a rollout's number or a video's path, got {value!r:.60}")


def broken_anchors(config: Config, rankings: list[Ranking]) -> list[Problem]:
    """What is wrong with the real videos that rankings name: each is decoded as building will."""
    problems = []
    for row in rankings:
        for side in (row.chosen, row.rejected):
            try:
                if isinstance(side, Path):
                    decode_clip(side, video_spec(config))
            except DataError as error:
                problems.append(Problem(row.where, str(error)))
    return problems


def split_prompts(rankings: list[Ranking], share: float, seed: int) -> dict[str, list[Ranking]]:
    """By split: about `share` of the prompts, drawn by `seed`, with all their pairs, and at least one on each side.

    Raises DataError for a single prompt.
    """
    by_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for row in rankings:
        by_prompt[row.prompt].append(row)
    if len(by_prompt) < 2:
        raise DataError("data.pairs: all usable rows are of one prompt, so none can be held out; rank another's too")
    count = min(max(1, round(len(by_prompt) * share)), len(by_prompt) - 1)
    prompts = list(by_prompt)
    held = {prompts[n] for n in np.random.default_rng([seed, 0x5911]).permutation(len(prompts))[:count]}
    split_of = {row.pair_id: SPLITS[row.prompt in held] for row in rankings}
    return {split: [row for row in rankings if split_of[row.pair_id] == split] for split in SPLITS}


def _member(side: int | Path) -> int | str:
    """Of a video its bytes: another under the same name is another."""
    if isinstance(side, int):
        return side
    try:
        with side.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        end_if_of_the_moment(side, error)
        return str(side)


def _make_rows(
    config: Config,
    model: VideoModel,
    law: Law,
    rollouts: RolloutStore,
    rankings: list[Ranking],
    inverted: bool,
    rows: range,
    advance: Callable[[int], None],
) -> Made:
    stored = LATENT_DTYPES[stored_dtype(config, working_dtype(config.model, model.vae.device))]
    made, problems = [], []
    anchors: dict[Anchor, Trajectory] = {}  # one real video may be named beside each of a prompt's rollouts
    for row in (rankings[number] for number in rows):
        try:
            pair = _pair(config, model, rollouts, row)
        except DataError as error:
            problems.append(Problem(row.where, str(error)))
            advance(1)
            continue
        if inverted:
            pair = _inverted(config, model, law, row, pair, anchors)
        fault = fault_of(pair, stored)
        if fault:
            problems.append(Problem(row.where, fault))
        else:
            made.append(pair)
        advance(1)
    return made, problems


def _inverted(
    config: Config, model: VideoModel, law: Law, row: Ranking, pair: Pair, anchors: dict[Anchor, Trajectory]
) -> Pair:
    """`pair` with its inversions; those of real videos at a prompt's rows are looked up in `anchors`, or added."""
    keys = {
        f"path_{side}": (video, row.prompt, pair.path_rows)
        for side, video in (("w", row.chosen), ("l", row.rejected))
        if isinstance(video, Path) and pair.path_rows
    }
    held: dict[str, Any] = {path: anchors[key] for path, key in keys.items() if key in anchors}
    pair = replace(pair, **held)
    (pair,) = add_inversions(config, model, law, [pair])
    anchors |= {key: getattr(pair, path) for path, key in keys.items()}
    return pair


def _pair(config: Config, model: VideoModel, rollouts: RolloutStore, row: Ranking) -> Pair:
    spec = video_spec(config)
    grid = model.latent_grid(spec.num_frames, spec.height, spec.width)
    path_rows: tuple[int, ...] = ()
    sides: list[tuple[Tensor, Origin, Trajectory | None]] = []
    for side in (row.chosen, row.rejected):
        if isinstance(side, Path):
            sides.append((model.encode_video(decode_clip(side, spec)[None])[0].cpu(), REAL, None))
        else:
            rollout = rollouts.by_id(side)
            path = rollout.path if config.noise.stores_states else None
            path_rows = rollout.path_rows if path else path_rows
            sides.append((rollout.latents, rollout.origin, path))
    (winner, origin_w, path_w), (loser, origin_l, path_l) = sides
    (text,) = model.encode_text([row.prompt])
    source = " over ".join(
        f"rollout {side}" if isinstance(side, int) else str(side) for side in (row.chosen, row.rejected)
    )
    mask = model.region_layout(torch.ones(grid, dtype=torch.uint8))
    return Pair(
        row.pair_id, source, row.prompt, text, winner, loser, mask,
        origin_w=origin_w, origin_l=origin_l, path_rows=path_rows, path_w=path_w, path_l=path_l,
    )  # fmt: skip
