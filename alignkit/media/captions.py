"""Captions of a folder of videos: which files they may stand in, and what can be wrong with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.media.names import located
from alignkit.media.rows import is_unicode, read_table
from alignkit.moment import end_if_of_the_moment

CAPTION_FILES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
VIDEO_KEYS = ("video", "file_name", "filename", "video_path", "path", "file")
TEXT_KEYS = ("caption", "text", "prompt", "description")


NOTE = "note"
"""The `kind` of what is said, and of which no clip or row is the worse."""


@dataclass(frozen=True)
class Problem:
    """Something in the user's data that was left out, and why, in words for people.

    `video` is the video's name, or file and line ("captions.jsonl:7") where no video can be named. `kind` sorts
    what `alignkit.given.validation` finds (a `Kind` there).
    """

    video: str
    reason: str
    kind: str = ""


@dataclass(frozen=True)
class Caption:
    """One video's caption and where it was read ("captions.jsonl:7"). The text may be empty."""

    text: str
    where: str


def read_captions(file: Path) -> tuple[dict[str, Caption], list[Problem]]:
    """Read a .jsonl or .csv file of captions: video as the file names it -> caption.

    A line that cannot be used becomes a Problem with its line number; of two captions for one video the
    first is kept. Raises DataError if the file cannot be read at all or lacks the columns.
    """
    captions: dict[str, Caption] = {}
    problems: list[Problem] = []
    table = read_table(file, "captions file", (".jsonl", ".csv"))
    for needed in (VIDEO_KEYS, TEXT_KEYS):
        if file.suffix.lower() == ".csv" and not set(needed) & set(table.columns):
            raise DataError(
                f"captions file {file}: its first line has the columns {', '.join(table.columns) or '(none)'}; "
                f"one of {', '.join(needed)} is needed"
            )
    for number, row in table.rows:
        where = f"{file.name}:{number}"
        if isinstance(row, str):
            problems.append(Problem(where, f"line {number} {row}"))
            continue
        differing = _differing(row)
        if differing:
            problems.append(Problem(where, f"line {number}: {differing}"))
            continue
        video, text = _first(row, VIDEO_KEYS), _first(row, TEXT_KEYS)
        if not isinstance(video, str) or not video.strip():
            problems.append(Problem(where, f"line {number} names no video (one of: {', '.join(VIDEO_KEYS)})"))
            continue
        video = Path(video).as_posix()
        if video in captions:
            problems.append(Problem(video, f"second caption at {where}; {captions[video].where} is kept"))
            continue
        if text is not None and not isinstance(text, str):
            problems.append(Problem(where, f"line {number}: the caption is not a text but {text!r:.60}"))
            text = None
        if text is not None and not is_unicode(text):
            problems.append(Problem(where, f"line {number}: the caption holds half a character: {text!r:.60}"))
            text = None
        captions[video] = Caption(" ".join((text or "").split()), where)
    return captions, problems


def caption_beside(video: Path) -> Caption | None:
    """The caption in the .txt file beside a video, None if there is no such file.

    Raises DataError if the file is no UTF-8 text.
    """
    file = located(video.with_suffix(".txt"))
    if not file.is_file():
        return None
    try:
        return Caption(" ".join(file.read_text(encoding="utf-8-sig").split()), file.name)
    except (OSError, UnicodeDecodeError) as error:
        end_if_of_the_moment(file, error)
        raise DataError(f"its caption file {file.name} cannot be read as UTF-8 text ({error})") from error


def _differing(row: dict[str, Any]) -> str | None:
    """What is wrong with a row that names two videos or has two captions, in columns that are both read."""
    for one, other in (("video", "file_name"), ("caption", "text")):
        values = [row.get(column) for column in (one, other)]
        a, b = (" ".join(value.split()) if isinstance(value, str) else "" for value in values)
        within = one == "video" and (f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}"))  # with its folder or not
        if a and b and a != b and not within:
            return f"its {one} and its {other} differ; keep one of the columns"
    return None


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)
