"""Preference pairs that users bring: a table with the columns prompt, chosen and rejected."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.media.names import written_file
from alignkit.media.rows import is_unicode, read_table

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """One row: for `prompt`, the video `chosen` is better than `rejected`; `mask` may say where they differ.

    `number` is the row's number in its file, from 0, unreadable rows counted too; `where` is its place for
    people ("pairs.jsonl:7").
    """

    number: int
    where: str
    prompt: str
    chosen: Path
    rejected: Path
    mask: Path | None


def read_preferences(file: Path, shown: str | None = None) -> tuple[list[Preference], list[Problem]]:
    """The rows of a .jsonl, .csv or .parquet file, and the lines that cannot be used, with the reason.

    shown: what to call the file in a row's `where`; its name unless told.

    Columns: prompt (a text), chosen and rejected (paths of videos), and if wanted mask (a path that
    `alignkit.media.masks.read_mask` can read). Paths are absolute, in ~, or relative to the file's own folder; whether
    they exist is not looked at here. Other columns are ignored.

    Raises DataError if the file cannot be read, lacks a column, has one that is nearly called mask, or has no row that
    can be used.
    """
    file = Path(file)
    shown = shown or file.name
    table = read_table(file, "preference file", (".jsonl", ".csv", ".parquet"), (*COLUMNS, "mask"))
    problems = [Problem(f"{shown}:{line}", row) for line, row in table.rows if isinstance(row, str)]
    if not set(COLUMNS) <= set(table.columns):
        raise DataError(
            f"preference file {file}: it has the columns {', '.join(table.columns) or '(none)'}; "
            f"{', '.join(COLUMNS)} are needed, and mask may be there" + _first_of(problems)
        )
    for name in table.columns:
        alike = difflib.SequenceMatcher(None, name.lower(), "mask").ratio()
        if name != "mask" and alike > 0.8:  # "task" has 0.75, "masked" 0.8
            raise DataError(f"preference file {file}: unknown column {name!r}; did you mean 'mask'? Rename it")
    preferences = []
    for number, (line, row) in enumerate(table.rows):
        if isinstance(row, str):
            continue
        where = f"{shown}:{line}"
        try:
            preferences.append(_preference(number, where, row, file.parent))
        except DataError as error:
            problems.append(Problem(where, str(error)))
    if not preferences:
        raise DataError(f"preference file {file}: holds no row that can be used" + _first_of(problems))
    return preferences, problems


def _first_of(problems: list[Problem]) -> str:
    if not problems:
        return ""
    more = f", and {len(problems) - 1} more such lines" if len(problems) > 1 else ""
    return f" ({problems[0].video}: {problems[0].reason}{more})"


def _preference(number: int, where: str, row: dict[str, Any], folder: Path) -> Preference:
    prompt, chosen, rejected = (_text(row, column) for column in COLUMNS)
    written = row.get("mask")
    unmasked = written is None or (isinstance(written, str) and not written.strip())
    mask = None if unmasked else written_file(folder, _text(row, "mask"))
    return Preference(
        number, where, " ".join(prompt.split()), written_file(folder, chosen), written_file(folder, rejected), mask
    )


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise DataError(f"has no {column}")
    if not isinstance(value, str):
        raise DataError(f"its {column} is not a text but {value!r:.60}")
    if not value.strip():
        raise DataError(f"its {column} is empty")
    if not is_unicode(value):
        raise DataError(f"its {column} holds half a character: {value!r:.60}")
    return value
