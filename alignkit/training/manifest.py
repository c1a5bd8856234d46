"""What a checkpoint's folder says of itself: its name, and the manifest of SHA-256 hashes that was written with it.

No torch is imported, so that a run can be looked at without starting one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from alignkit.moment import end_if_of_the_moment, listed

MANIFEST, DIGEST = "manifest.json", "digest"
FORMAT = 2
DAMAGED, BEFORE, PARTIAL = "damaged-", "before-reshape-", ".partial-"


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def candidates(folder: Path) -> list[Path]:
    """Every checkpoint in `folder` that has its final name, the newest first."""
    return [path for path in reversed(listed(folder, "step-*")) if path.name[5:].isdigit()]


def step_of(path: Path) -> int:
    """The number at the end of a checkpoint's name, also of one that was set aside."""
    found = re.search(r"step-(\d+)", path.name)
    assert found, path
    return int(found[1])


def damage(path: Path, share: slice = slice(None), *, hashed: bool = True) -> str | None:
    """What is wrong with the manifest of a checkpoint, or with that `share` of the files it lists, or None.

    hashed: read every byte of them; else only whether they are there. Raises what reading raises.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest.get(DIGEST, found := digest(manifest)) != found:
        return "its manifest is not as it was written"
    if manifest["step"] != step_of(path):
        return f"its manifest is of step {manifest['step']}"
    for name in sorted(manifest["files"])[share]:
        file = path / name
        try:
            file.stat()  # from Python 3.14 on is_file() takes what cannot be looked at for what is not there
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        if hashed and file_hash(file) != manifest["files"][name]:
            return f"{name} does not match its hash"
    listed = shards(manifest["files"])
    if listed != manifest.get("shards", listed):
        return f"its manifest lists {listed} of {manifest['shards']} processes' shards"
    return None


UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def described(path: Path, look: Callable[[], str | None], *more: type[Exception]) -> str | None:
    """What look() finds wrong with the checkpoint `path`, which may be damaged in any way. Raises MomentError where the
    machine cannot read it."""
    try:
        return look()
    except UNREADABLE + more as error:
        end_if_of_the_moment(path, error)
        return f"its manifest cannot be read ({type(error).__name__})"


def shards(names: Iterable[str]) -> int:
    """How many processes' parts of the optimizer's states there are."""
    return sum(name.endswith("optim_states.pt") for name in names)


def digest(manifest: dict[str, Any]) -> str:
    """Of all of a manifest but this; those of before have none."""
    content = {name: value for name, value in manifest.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
