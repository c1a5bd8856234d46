"""comparisons.jsonl: which videos of a folder people are asked about.

One line each: {"id": "000", "prompt": "…", "a": "videos/3.mp4", "b": "videos/7.mp4"}, paths inside the folder; and
optionally "kind_a" and "kind_b", the method that made each, for win rates alone: people are not told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.files import write_lines
from alignkit.json_text import TwiceError, read_json
from alignkit.media.rows import is_unicode
from alignkit.rankers.protocol import Comparison

FILE = "comparisons.jsonl"
REQUIRED = ("id", "prompt", "a", "b")
KINDS = ("kind_a", "kind_b")


@dataclass(frozen=True)
class Pair(Comparison):
    """kind_a, kind_b: which method made the videos, None where that is not said."""

    kind_a: str | None = None
    kind_b: str | None = None


def write_comparisons(folder: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write the file, whole or not at all, and return its path. Raises DataError as `read_comparisons` does."""
    file, lines = folder / FILE, [dict(row) for row in rows]
    _checked(folder, file, list(enumerate(lines, 1)))
    write_lines(file, lines)
    return file


def read_comparisons(folder: Path) -> list[Pair]:
    """The comparisons in the order of the file.

    Raises DataError, in one line with the file and the line, for what cannot be used: no file, no comparison, no video,
    bad JSON, a missing or unknown key, an id twice, a path that leads out of the folder.
    """
    file = folder / FILE
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: holds no {FILE}; name a folder that was made to be ranked by people") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); write it again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, read_json(line)))
            except TwiceError as error:
                raise DataError(f"{file}:{number}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}:{number}: is not JSON ({error}); mend or delete the line") from None
    return _checked(folder, file, rows)


def _checked(folder: Path, file: Path, rows: list[tuple[int, Any]]) -> list[Pair]:
    if not rows:
        raise DataError(f"{file}: holds no comparison; write a line for each two videos to be compared")
    pairs: dict[str, Pair] = {}
    for number, row in rows:
        where = f"{file}:{number}"
        _check_row(row, where)
        if row["id"] in pairs:
            raise DataError(f"{where}: the id {row['id']!r} is there twice; give each comparison its own")
        a, b = (_video(folder, row[side], f"{where}: {side!r}") for side in "ab")
        pairs[row["id"]] = Pair(row["id"], row["prompt"], a, b, *(row.get(key) for key in KINDS))
    return list(pairs.values())


def _check_row(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f'{where}: is no comparison; write {{"id": "000", "prompt": "…", "a": "1.mp4", "b": "2.mp4"}}')
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        raise DataError(f"{where}: lacks {missing[0]!r}; every comparison has {', '.join(REQUIRED)}")
    for key, value in row.items():
        if key not in (*REQUIRED, *KINDS):
            raise DataError(f"{where}: does not know the key {key!r}; the keys are {', '.join((*REQUIRED, *KINDS))}")
        if not isinstance(value, str) or not is_unicode(value) or "\0" in value or (key != "prompt" and not value):
            raise DataError(f"{where}: {key!r} is {value!r}; it has to be a text")
    if ("kind_a" in row) != ("kind_b" in row):
        raise DataError(f"{where}: has one of kind_a and kind_b; give both or neither")


def _video(folder: Path, name: str, where: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(path, folder):
        raise DataError(f"{where}: {name!r} leads out of the folder; put the video into {folder}")
    try:
        found = path.is_file()
    except OSError:  # a name that is too long, for example
        found = False
    if not found:
        raise DataError(f"{where}: there is no video {name!r}; put it back or delete the line")
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Also after every link on the way is followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False
