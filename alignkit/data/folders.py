"""Where a run keeps its pairs, what shape their videos have, and the list of what could not be used."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from alignkit.config import Config
from alignkit.data.captions import Problem
from alignkit.data.pairs import skipped_pairs
from alignkit.data.videos import VideoSpec
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.progress import say

SPLITS = ("train", "heldout")
SKIPPED = "skipped.jsonl"


def pairs_folder(config: Config, split: str) -> Path:
    return config.output.dir / "pairs" / split


def source_folder(config: Config) -> Path:
    """What a stored pair's `source` is relative to; the sources of ranked pairs are absolute paths."""
    return config.data.videos or Path()


def video_spec(config: Config) -> VideoSpec:
    data = config.data
    return VideoSpec(data.height, data.width, data.num_frames, data.fps)


def stored_dtype(config: Config, network: torch.dtype) -> str:
    """What latents and text are stored in (`pairs.dtype`), for a network that runs in `network`.

    By itself fp32 where the network does, else fp16: more digits than bf16, and range enough for latents.
    """
    if config.pairs.dtype != "auto":
        return config.pairs.dtype
    return "fp32" if network == torch.float32 else "fp16"


def check_membership(folder: Path, rows: list[list]) -> None:
    """Blocks made from other videos or texts than today's would carry the wrong ids: DataError."""
    file = folder / "rows.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, rows)
        return
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); delete {folder} and build again") from None
    if stored != json.loads(json.dumps(rows)):
        raise DataError(
            f"{folder}: was built from other videos, captions or masks than there are now; choose another output.dir "
            "or delete that folder"
        )


def write_skipped(config: Config, problems: list[Problem]) -> None:
    """List what cannot be used and why, on the terminal and in skipped.jsonl, before anything is made."""
    file = config.output.dir / SKIPPED
    write_lines(file, [asdict(problem) for problem in problems])
    for problem in problems:
        say(f"skipped {problem.video}: {problem.reason}")


def add_skipped_pairs(config: Config) -> None:
    """Pairs that could not be made join skipped.jsonl."""
    made = [problem for split in SPLITS for problem in skipped_pairs(pairs_folder(config, split))]
    file = config.output.dir / SKIPPED
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    write_lines(file, [row for row in before if Problem(**row) not in made] + [asdict(problem) for problem in made])
    for problem in made:
        say(f"left out {problem.video}: {problem.reason}")
