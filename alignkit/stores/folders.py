"""Where a run keeps its pairs, what shape their videos have, and the list of what could not be used."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import torch

from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.media.captions import Problem
from alignkit.media.videos import VideoSpec
from alignkit.models import VideoModel, load_model
from alignkit.progress import say
from alignkit.stores.pairs import MEMBERS, PairStore
from alignkit.stores.store import has_blocks, skipped_rows

SPLITS = ("train", "heldout")
SKIPPED = "skipped.jsonl"


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


def latent_grid(config: Config) -> tuple[int, int, int]:
    """(F, H, W) of the model's latents of one video, known before any weights are loaded. Raises ConfigError for
    sizes that the model cannot take."""
    spec = video_spec(config)
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    return model.latent_grid(spec.num_frames, spec.height, spec.width)


def check_membership(folder: Path, rows: list[list], what: str = "videos, captions or masks") -> None:
    """Blocks made from other videos or texts (`what`) than today's would carry the wrong ids: DataError."""
    file = folder / MEMBERS
    if not file.exists() or not has_blocks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, rows)
        return
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); delete {folder} and build again") from None
    now = json.loads(json.dumps(rows))
    if stored != now:
        (old, new), *_ = [pair for pair in zip_longest(stored, now) if pair[0] != pair[1]]
        raise DataError(
            f"{folder}: was built from other {what} than there are now; put them back, choose another folder or "
            f"output.dir, or delete that one (the first that differs: {_shown(old)}, now {_shown(new)})"
        )


def _shown(row: list | None) -> str:
    return "none" if row is None else f"{json.dumps(row, ensure_ascii=False):.100}"


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


def write_skipped(config: Config, problems: list[Problem]) -> None:
    """List what cannot be used and why, on the terminal and in skipped.jsonl, before anything is made."""
    file = config.output.dir / SKIPPED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, [asdict(problem) for problem in problems])
    for problem in problems:
        say(f"skipped {problem.video}: {problem.reason}")


def add_skipped_pairs(config: Config) -> None:
    """Pairs that could not be made join skipped.jsonl."""
    made = [problem for split in SPLITS for problem in skipped_rows(pairs_folder(config, split))]
    file = config.output.dir / SKIPPED
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    write_lines(file, [row for row in before if Problem(**row) not in made] + [asdict(problem) for problem in made])
