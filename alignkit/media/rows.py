"""Tables that users write: JSON Lines, CSV and Parquet files as numbered rows."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from alignkit.errors import DataError
from alignkit.json_text import TwiceError, read_json
from alignkit.media.names import VIDEO_SUFFIXES

# In a text of several lines: what a row of a table holds, and hardly ever a prompt or a caption.
FILE_IN_A_ROW = re.compile(rf"({'|'.join(map(re.escape, VIDEO_SUFFIXES))})[,\r\n]", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The rows of a file in their order, each with its line, and the columns that any of them has.

    A row that cannot be read stands as a text that says what is wrong with its line ("is not JSON …").
    In a Parquet file the line is the row, from 1.
    """

    columns: list[str]
    rows: list[tuple[int, dict[str, Any] | str]]


def read_table(file: Path, what: str, suffixes: tuple[str, ...], columns: tuple[str, ...] = ()) -> Table:
    """Read a file that is one of `suffixes` (".jsonl", ".csv", ".parquet"); of a Parquet file, which may hold columns
    that Python cannot, the rows hold `columns` alone.

    Raises DataError, in one line that starts with `what` ("captions file") and the file, if it cannot be read.
    """
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        raise DataError(f"{what} {file}: expected {', '.join(suffixes[:-1])} or {suffixes[-1]}, not '{file.suffix}'")
    if suffix == ".parquet":
        return _parquet(file, what, columns)
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
            row = read_json(line)
        except TwiceError as error:
            row = str(error)
        except (ValueError, RecursionError) as error:
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


def _refuse_twice(columns: list[str], table: str) -> None:
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise DataError(f"{table}: has two columns with the name {twice[0]!r}")


def _csv(file: Path, what: str, text: str) -> Table:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # 131,072 characters unless told
    # Not text.splitlines(), which divides a line at characters that a prompt may hold.
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{what} {file}, line {reader.line_num}: {error}") from error
    columns = [name.strip() for name in lines[0][1]] if lines else []
    _refuse_twice(columns, f"{what} {file}")
    rows: list[tuple[int, dict[str, Any] | str]] = []
    row: dict[str, Any] | str
    for number, cells in lines[1:]:
        if any(cells[len(columns) :]):
            row = "has more values than there are columns (put a text that holds commas in double quotes)"
        elif any(FILE_IN_A_ROW.search(cell) for cell in cells if "\n" in cell or "\r" in cell):
            row = "ends a text that holds other rows: a double quote is missing in one of the lines before"
        else:
            row = dict(zip(columns, cells, strict=False))
        rows.append((number, row))
    return Table(columns, rows)


def _parquet(file: Path, what: str, columns: tuple[str, ...]) -> Table:
    try:
        names = pyarrow.parquet.read_schema(file).names
        read = [name for name in names if name in columns]
        _refuse_twice(read, f"{what} {file}")
        table = pyarrow.parquet.read_table(file, columns=read)
        return Table(names, list(enumerate(table.to_pylist(), start=1)))
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what} {file} cannot be read as Parquet ({' '.join(str(error).split())})") from error
