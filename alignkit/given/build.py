"""`alignkit pairs` from ranked videos: rows of prompt, chosen and rejected become pairs in latent space."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import alignkit
from alignkit.apo.inversions import add_inversions, inversion_terms
from alignkit.config import Config
from alignkit.errors import ConfigError, DataError
from alignkit.given.preferences import Preference, read_preferences
from alignkit.given.validation import NothingLeftError, split_preferences, validate_preferences
from alignkit.media.captions import Problem
from alignkit.media.masks import mask_digest, mask_on_grid, read_mask
from alignkit.media.usable import decoders
from alignkit.media.videos import VideoFacts, VideoSpec, decode_clip, decode_with_facts
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.models.context import TokenGroup
from alignkit.objectives.laws import Law
from alignkit.objectives.states.checks import check_noise
from alignkit.progress import progress, say
from alignkit.remembered import memory
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
from alignkit.stores.pairs import LATENT_DTYPES, Pair, PairStore, fault_of
from alignkit.stores.store import StoreInfo


@dataclass(frozen=True)
class Given:
    """A row that can be used: its pair's id, and digests of its two videos' pictures and of its mask."""

    pair_id: int
    row: Preference
    digests: tuple[str, str]
    mask: str | None


def build_given_pairs(
    config: Config,
    device: torch.device,
    show: bool = True,
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    group: TokenGroup | None = None,
) -> dict[str, int]:
    """Encode every pair that is not stored yet; returns how many pairs each split holds.

    Any number of processes may call this at once. A pair's id is its row's number in `data.pairs`; those of
    `data.heldout_pairs` are counted on behind it. A row without a mask is compared as a whole: its mask is all ones.
    preview(model, store) is called with the first block of each split when it is there, and with the whole store at
    the end. group: this process's, whose first it is, where others follow its network.
    """
    splits, problems = find_given(config, show)
    if show:
        say_skipped(problems)
        say(f"{len(splits['train'])} pairs to train on, {len(splits['heldout'])} held out")
        if config.objective.name == "local_dpo" and not any(given.mask for given in splits["train"]):
            say("no pair has a mask, so both terms of local_dpo are the same; objective.name=dpo is for such pairs")
        say(f"loading {config.model.family}'s VAE and text encoder from {config.model.path}")
    inverted = config.noise.source == "inversion"
    dtype = working_dtype(config.model, device)
    model = load_model(config.model, with_transformer=inverted, device=device, dtype=dtype, group=group)
    law = check_noise(config, model)
    shared = StoreInfo(
        kind="given",
        family=model.family,
        model=model.fingerprint() if inverted else None,
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        pairs=0,
        block_size=config.pairs.block_size,
        dtype=stored_dtype(config, dtype),
        made={
            "videos": asdict(video_spec(config)),
            "max_sequence_length": config.model.max_sequence_length,
            **encoding_terms(config.model),
        }
        | (inversion_terms(config, model) if inverted else {}),
    )
    planned = {}
    for split, rows in splits.items():
        info = replace(shared, pairs=len(rows))
        members = [[given.pair_id, given.row.prompt, *given.digests, given.mask] for given in rows]
        check_store(pairs_folder(config, split), info, members)
        make = partial(_make_rows, config, model, law, LATENT_DTYPES[info.dtype], rows)
        planned[split] = info, members, make
    for split, (info, members, make) in planned.items():
        folder, title = pairs_folder(config, split), f"encoding {split} pairs"
        accepted = partial(write_skipped, config, problems if show and split == SPLITS[0] else None)
        build_store(folder, model, info, members, make, title, preview=preview, accepted=accepted, show=show)
    if show:
        add_skipped_pairs(config)
    return {split: len(rows) for split, rows in splits.items()}


def find_given(config: Config, show: bool = True) -> tuple[dict[str, list[Given]], list[Problem]]:
    """The rows of each split, and what is wrong with the others.

    The first process looks, and leaves what it found in the user's cache for the others and for a build that is
    started again; it is looked at again when a file changed. Raises DataError, after listing the problems, when no row
    is left.
    """
    assert config.data.pairs is not None
    if config.noise.source in ("initial", "path"):
        raise ConfigError(
            f"noise.source: {config.noise.source!r} needs to know where videos come from, and nothing is known of "
            "given ones: use inversion or shared"
        )
    grid = latent_grid(config)  # refuses sizes that the model cannot take before a video is looked at
    check_noise(config, load_model(config.model, with_transformer=False, with_encoders=False))
    files = [file for file in (config.data.pairs, config.data.heldout_pairs) if file]
    alike = len({file.name for file in files}) < len(files)
    (train, problems), *other = (read_preferences(file, str(file) if alike else None) for file in files)
    heldout, more = other[0] if other else (None, [])
    problems += more
    try:
        splits, more = _validated(config, files, grid, train, heldout, show)
    except DataError as error:
        if show:
            say_skipped(problems + (error.problems if isinstance(error, NothingLeftError) else []))
        raise
    return splits, problems + more


def _validated(
    config: Config, files: list[Path], grid: tuple[int, int, int], train: list[Preference],
    heldout: list[Preference] | None, show: bool,
) -> tuple[dict[str, list[Given]], list[Problem]]:  # fmt: skip
    """The rows of each split that can be used, and what is wrong with the others. What was found of a video before is
    remembered in the user's cache; processes take turns, so that each is decoded once."""
    spec = video_spec(config)
    asked = [[str(file.absolute()) for file in files], asdict(spec), decoders()]
    code = [file for folder in ("given", "media") for file in (Path(alignkit.__path__[0]) / folder).glob("*.py")]
    with (
        memory("pairs", asked, code) as known,
        progress("checking pairs", len(train) + len(heldout or []), show=show) as bar,
    ):
        findings = validate_preferences(train, spec, grid=grid, heldout=heldout, watch=bar.advance, known=known)
    keys, kept, held, offset = findings.keys, findings.train, findings.heldout, 0
    if heldout is None:
        kept, held = split_preferences(kept, keys, config.data.heldout, config.pairs.seed)
    else:
        offset = max((row.number for row in train), default=-1) + 1
    splits = {
        split: [
            Given(first + row.number, row, (keys[row.chosen], keys[row.rejected]), mask_digest(row.mask))
            for row in rows
        ]
        for split, rows, first in (("train", kept, 0), ("heldout", held, offset))
    }
    return splits, findings.problems


def _make_rows(
    config: Config, model: VideoModel, law: Law, stored: torch.dtype, tasks: list[Given], rows: range,
    advance: Callable[[int], None],
) -> Made:  # fmt: skip
    spec = video_spec(config)
    made, problems = [], []
    for given in (tasks[number] for number in rows):
        row = given.row
        try:
            chosen, facts = decode_with_facts(row.chosen, spec)
            mask = model.region_layout(_mask_of(row, facts, spec, model))
            # one by one: a video has the same latents, bit for bit, in every pair
            winner, loser = (model.encode_video(v[None])[0].cpu() for v in (chosen, decode_clip(row.rejected, spec)))
        except DataError as error:  # the file changed since it was validated
            problems.append(Problem(row.where, str(error)))
            advance(1)
            continue
        (text,) = model.encode_text([row.prompt])
        pair = Pair(given.pair_id, str(row.chosen.absolute()), row.prompt, text, winner, loser, mask)
        (pair,) = add_inversions(config, model, law, [pair])
        fault = fault_of(pair, stored)
        if fault:
            problems.append(Problem(row.where, fault))
        else:
            made.append(pair)
        advance(1)
    return made, problems


def _mask_of(row: Preference, facts: VideoFacts, spec: VideoSpec, model: VideoModel) -> Tensor:
    grid = model.latent_grid(spec.num_frames, spec.height, spec.width)
    if row.mask is None:
        return torch.ones(grid, dtype=torch.uint8)
    return mask_on_grid(read_mask(row.mask, facts, spec), grid)
