"""What the pages of the reference share."""

import inspect
from collections.abc import Iterable

WRITTEN = "<!-- Written by `python -m alignkit.reference` from the code: change the code, not this file. -->"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table; none without rows."""
    columns = list(columns)
    lines = [_row(row) for row in rows]
    return [_row(columns), _row(["---"] * len(columns)), *lines] if lines else []


def code(text: str) -> str:
    """As code; nothing of nothing."""
    return f"`{text}`" if text else ""


def doc(thing: object) -> str:
    """The docstring, without its indentation."""
    return inspect.getdoc(thing) or ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
