"""Whether what a command is to read is there, looked at before anything heavy is imported."""

from pathlib import Path
from typing import Any

from alignkit.config.sections import ModelSection
from alignkit.config.whole import Config
from alignkit.errors import DataError, ModelError

FOLDERS = {"data.videos": "video folder ", "data.rollouts": "", "pairs.mask.files": ""}
READ = {
    "pairs": ("data.videos", "data.pairs", "data.heldout_pairs", "data.rollouts", "pairs.mask.files"),
    "rollout": ("data.prompts",),
    "validate": (
        "data.videos", "data.pairs", "data.heldout_pairs", "data.rollouts", "data.prompts", "pairs.mask.files",
    ),
}  # fmt: skip
"""By command, the keys whose files it cannot do without. Later ones read stores, whose sources may be gone by then."""


def check_places(command: str, config: Config) -> None:
    """Raises DataError for a file or folder that the command reads and that is missing, ModelError for a model's."""
    for key in READ.get(command, ()):
        place: Any = config
        for name in key.split("."):
            place = getattr(place, name)
        if place is None:
            continue
        if key in FOLDERS and not place.is_dir():
            raise DataError(f"{key}: {FOLDERS[key]}{place} does not exist or is not a folder")
        if not place.exists():
            raise DataError(f"{key}: {place} does not exist")
    if command not in ("report", "rank"):
        check_model_place(config.model)


def check_model_place(section: ModelSection) -> None:
    """Raises ModelError where `path` is plainly a folder's and there is none."""
    if section.path.startswith((".", "/", "~")) and not Path(section.path).expanduser().is_dir():
        raise ModelError(f"model.path: {section.path}: no such folder")
