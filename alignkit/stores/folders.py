"""Where a run keeps its pairs, what shape their videos have, and the list of what could not be used."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignkit.config import Config, ModelSection
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.media.captions import Problem
from alignkit.media.videos import VideoSpec
from alignkit.models import VideoModel, load_model
from alignkit.progress import say
from alignkit.sharing import one_at_a_time
from alignkit.stores.pairs import MEMBERS, PairStore
from alignkit.stores.store import StoreInfo, block_file, has_blocks, skipped_rows

SPLITS = ("train", "heldout")
SKIPPED = "skipped.jsonl"
NAMED = 3


def pairs_folder(config: Config, split: str) -> Path:
    return (config.pairs.folder or config.output.dir / "pairs") / split


def source_folder(config: Config) -> Path:
    """What a stored pair's `source` is relative to; the sources of ranked pairs are absolute paths."""
    return config.data.videos or Path()


def video_spec(config: Config) -> VideoSpec:
    data = config.data
    return VideoSpec(data.height, data.width, data.num_frames, data.fps)


def stored_dtype(config: Config, network: torch.dtype) -> str:
    """What latents and text are stored in (`pairs.dtype`), for a network that runs in `network`.

    By itself fp32 where the network does, or where noise is solved for, which magnifies their rounding; else fp16: more
    digits than bf16, and range enough for latents.
    """
    if config.pairs.dtype != "auto":
        return config.pairs.dtype
    return "fp32" if network == torch.float32 or config.noise.source != "shared" else "fp16"


def encoding_terms(section: ModelSection) -> dict[str, bool]:
    """How videos are encoded and decoded, for the terms of what holds them; empty where it is done as ever."""
    return {"vae_tiling": True} if section.vae_tiling else {}


def latent_grid(config: Config) -> tuple[int, int, int]:
    """(F, H, W) of the model's latents of one video, known before any weights are loaded. Raises ConfigError for
    sizes that the model cannot take."""
    spec = video_spec(config)
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    return model.latent_grid(spec.num_frames, spec.height, spec.width)


def check_size(config: Config, model: VideoModel, store: PairStore) -> None:
    """Raises DataError for pairs of another size than `data` has, by which memory and time are planned, videos sampled
    and clips decoded."""
    if not len(store):
        return
    data, stored = config.data, list(store[0].winner.shape)
    wanted = list(model.latent_shape(data.num_frames, data.height, data.width))
    if stored != wanted:
        raise DataError(
            f"{store.folder}: its pairs have latents of {stored}, but data.num_frames, data.height and data.width "
            f"({data.num_frames}, {data.height}, {data.width}) are {wanted}; set them to what the pairs were made "
            "with, or build the pairs again"
        )


def check_membership(folder: Path, rows: list[list[Any]], what: str) -> None:
    """Blocks made from other `what` than today's would carry the wrong ids: DataError."""
    if settled(folder, rows):
        return
    stored, now = stored_members(folder), json.loads(json.dumps(rows))
    raise DataError(
        f"{folder}: was built from other {what} than there are now ({_what_differs(stored, now)}); put them back, "
        "choose another folder or output.dir, or delete that one"
    )


def settled(folder: Path, rows: list[list[Any]]) -> bool:
    """Whether the blocks in `folder` are made from `rows`; where there are none they will be."""
    if not (folder / MEMBERS).exists() or not has_blocks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MEMBERS, rows)
        return True
    return stored_members(folder) == json.loads(json.dumps(rows))


def stored_members(folder: Path) -> list[list[Any]]:
    """What the blocks in `folder` were made from."""
    file = folder / MEMBERS
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); delete {folder} and build again") from None


def check_order(folder: Path, members: list[list[Any]]) -> None:
    """Raises DataError where the blocks in `folder` were made from other members, by the first value of each, or in
    another order: pairs' ids, and so their noise, go by their places."""
    if settled(folder, members) or [row[0] for row in stored_members(folder)] == [row[0] for row in members]:
        return
    check_membership(folder, members, "videos, captions or masks")


def follow_members(folder: Path, info: StoreInfo, members: list[list[Any]]) -> None:
    """Where members are the same ones as before, by the first value of each, and some of their other values changed, as
    a mended mask or caption does, have the blocks of those made again; other blocks stay. Raises as `check_order`."""
    with one_at_a_time(folder / ".members.lock"):
        if settled(folder, members):
            return
        check_order(folder, members)
        stored, now = stored_members(folder), json.loads(json.dumps(members))
        changed = [i for i, (old, new) in enumerate(zip(stored, now, strict=True)) if old != new]
        each = info.pairs // len(members)
        blocks = sorted({row // info.block_size for i in changed for row in range(i * each, (i + 1) * each)})
        for block in blocks:
            block_file(folder, block).unlink(missing_ok=True)
        write_json(folder / MEMBERS, members)  # after that: a kill before it does this again
    names = ", ".join(str(now[i][0]) for i in changed[:NAMED])
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    again = f"{len(blocks)} of {info.blocks} blocks are made again"
    say(f"{folder}: video, caption or mask changed of {names}{more}: {again}")


def _what_differs(stored: list[list[Any]], now: list[list[Any]]) -> str:
    before, after = ([str(row[0]) for row in rows] for rows in (stored, now))
    told = [
        f"{len(names)} {word}: {', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)}"
        for word, names in (
            ("more", [name for name in after if name not in before]),
            ("fewer", [name for name in before if name not in after]),
        )
        if names
    ]
    return "; ".join(told) or "the same in another order"


def show_pairs(
    preview: Callable[[VideoModel, PairStore], None] | None,
    model: VideoModel,
    folder: Path,
    blocks: Sequence[int] | None = None,
) -> None:
    """Call `preview` with the store in `folder`, or with `blocks` of it; a block may hold nothing to look at."""
    if preview is None:
        return
    try:
        store = PairStore(folder, blocks)
    except DataError:
        return
    preview(model, store)


def say_skipped(problems: list[Problem]) -> None:
    """What cannot be used and why, on the terminal."""
    for problem in problems:
        say(f"skipped {problem.video}: {problem.reason}")


def write_skipped(config: Config, problems: list[Problem] | None) -> None:
    """The same in skipped.jsonl, before anything is made, and once it is known that anything may be. None: nothing."""
    if problems is None:
        return
    file = config.output.dir / SKIPPED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, [asdict(problem) for problem in problems])


def add_skipped_pairs(config: Config) -> None:
    """Pairs that could not be made join skipped.jsonl."""
    made = [problem for split in SPLITS for problem in skipped_rows(pairs_folder(config, split))]
    file = config.output.dir / SKIPPED
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    write_lines(file, [row for row in before if Problem(**row) not in made] + [asdict(problem) for problem in made])
