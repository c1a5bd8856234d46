"""Names of files as users write them down, and as a file system has them."""

import os
import unicodedata
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")


def composed(name: str) -> str:
    """One spelling for names that look the same: a file system may hold "é" as one character, a text as two."""
    return unicodedata.normalize("NFC", name)


def located(path: Path) -> Path:
    """`path`, or, where there is no such file, the one whose name differs in how Unicode composes it alone."""
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        step = found / part
        if not os.path.exists(step):  # which says no, too, to a name that no file system takes
            try:
                same = [name for name in os.listdir(found) if composed(name) == composed(part)]
            except OSError:
                same = []
            if len(same) != 1:
                return path
            step = found / same[0]
        found = step
    return found


def written_file(folder: Path, written: str) -> Path:
    """What a table in `folder` names: the file of that very name, else of the name between its blanks, else of the one
    with ~ as the user's folder."""
    for name in (written, written.strip()):
        if os.path.exists(folder / name):
            return folder / name
    return located(folder / os.path.expanduser(written.strip()))
