"""Tables that users write: JSON Lines, CSV and Parquet files as numbered rows."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from alignkit.errors import DataError


@dataclass(frozen=True)
class Table:
    """The rows of a file in their order, each with its line, and the columns that any of them has.

    A row that cannot be read stands as a text that says what is wrong with its line ("is not JSON …").
    In a Parquet file the line is the row, from 1.
    """

    columns: list[str]
    rows: list[tuple[int, dict[str, Any] | str]]


def read_table(file: Path, what: str, suffixes: tuple[str, ...]) -> Table:
    """Read a file that is one of `suffixes` (".jsonl", ".csv", ".parquet").

    Raises DataError, in one line that starts with `what` ("captions file") and the file, if it cannot be read.
    """
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        raise DataError(f"{what} {file}: expected {', '.join(suffixes[:-1])} or {suffixes[-1]}, not '{file.suffix}'")
    if suffix == ".parquet":
        return _parquet(file, what)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {file} cannot be read as UTF-8 text ({error})") from error
    return _csv(file, what, text) if suffix == ".csv" else _json_lines(text)


def _json_lines(text: str) -> Table:
    rows: list[tuple[int, dict[str, Any] | str]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = f"is not JSON ({error})"
        else:
            if isinstance(row, dict):
                columns |= dict.fromkeys(row)
            else:
                row = 'is not a JSON object like {"column": …}'
        rows.append((number, row))
    return Table(list(columns), rows)


def is_unicode(text: str) -> bool:
    """False for halves of characters, which JSON can hold and no file of text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _csv(file: Path, what: str, text: str) -> Table:
    reader = csv.DictReader(text.splitlines(keepends=True))
    rows: list[tuple[int, dict[str, Any] | str]] = []
    try:
        for row in reader:
            if any(row.pop(None, ())):
                row = "has more values than there are columns (put a text that holds commas in double quotes)"
            rows.append((reader.line_num, row))
        return Table(list(reader.fieldnames or []), rows)
    except csv.Error as error:
        raise DataError(f"{what} {file}, line {reader.line_num}: {error}") from error


def _parquet(file: Path, what: str) -> Table:
    try:
        table = pyarrow.parquet.read_table(file)
        return Table(table.column_names, list(enumerate(table.to_pylist(), start=1)))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{what} {file} cannot be read as Parquet ({' '.join(str(error).split())})") from error
