"""Whether what a command is to read is there, looked at before anything heavy is imported."""

import os
from pathlib import Path
from typing import Any

from alignkit.config.demo import draws_clips
from alignkit.config.sections import ModelSection
from alignkit.config.whole import Config
from alignkit.errors import DataError, ModelError

FOLDERS = {"data.videos": "video folder ", "data.rollouts": "", "pairs.mask.files": ""}
PAIRS = ("data.videos", "data.captions", "data.pairs", "data.heldout_pairs", "data.rollouts", "pairs.mask.files")
READ = {
    "pairs": PAIRS,
    "run": PAIRS,
    "rollout": ("data.prompts",),
    "validate": (*PAIRS, "data.prompts"),
}
"""By command, the keys whose files it cannot do without. Others read stores, whose sources may be gone by then."""
NO_VIDEOS = "data.videos: not set; name the folder that holds the videos"
SPLITS = {"train": "train", "cache-reference": "train", "sample": "heldout", "eval": "heldout"}
"""Of the pairs, by the command that cannot do without them."""


def check_places(command: str, config: Config) -> None:
    """Raises DataError for a file or folder that the command reads and that is missing, ModelError for a model's."""
    data = config.data
    named = data.videos or data.pairs
    trains_alone = command == "run" and config.stages and not named
    for key in () if trains_alone else READ.get(command, ()):
        place: Any = config
        for name in key.split("."):
            place = getattr(place, name)
        if place is None or (key == "data.captions" and (data.pairs or not data.videos)):
            continue
        if key in FOLDERS and not place.is_dir():
            raise DataError(f"{key}: {FOLDERS[key]}{place} does not exist or is not a folder")
        if not place.exists():
            raise DataError(f"{key}: {place} does not exist")
    none_needed = trains_alone or (command == "run" and draws_clips(config))
    if command in ("pairs", "run") and not (named or data.rollouts or none_needed):
        raise DataError(NO_VIDEOS)
    if command != "rank":  # which reads no model where its videos are there
        check_model_place(config.model)


def check_model_place(section: ModelSection) -> None:
    """Raises ModelError where `path` is plainly a folder's and there is none, or where one of `lora` is missing."""
    if section.path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(section.path)):
        raise ModelError(f"model.path: {section.path}: no such folder")
    for folder in section.lora:
        if not folder.is_dir():
            raise ModelError(f"model.lora: {folder}: no such folder")


def store_read(command: str, config: Config) -> tuple[Path, str] | None:
    """The store that a command cannot do without: its folder, and what it holds. None where it reads none, or where a
    chain's stages are to say which."""
    if command == "rank":
        return config.data.rollouts or config.rollout.folder or config.output.dir / "rollouts", "rollouts"
    if command not in SPLITS or (config.stages and SPLITS[command] == "train"):
        return None
    return (config.pairs.folder or config.output.dir / "pairs") / SPLITS[command], "pairs"
