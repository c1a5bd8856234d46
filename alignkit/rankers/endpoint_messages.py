"""What an endpoint is sent, and what is read from what comes back. Formats only, nothing is sent here."""

import base64
import io
import json
import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from alignkit.errors import DataError
from alignkit.json_text import DECODER
from alignkit.media.videos import upright_frames

VERDICTS = ("first", "second", "tie")
MOST_BRACES = 500  # in a text that is searched: what follows each is read to its end
LONGEST_SHOWN = 80  # characters of what came back, in an error
VIDEO_TYPES = {".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska", ".avi": "video/x-msvideo"}
Part = dict[str, object]  # of a message


def video_parts(video: Path, send: Literal["frames", "video"], frames: int) -> list[Part]:
    """One video as parts of a message. Raises DataError for a file that cannot be read."""
    if send == "video":
        try:
            content = video.read_bytes()
        except OSError as error:
            raise DataError(f"{video}: cannot be read ({error.strerror}); make it again") from None
        kind = VIDEO_TYPES.get(video.suffix.lower(), "video/mp4")
        return [{"type": "video_url", "video_url": {"url": _data_url(kind, content)}}]
    pictures = list(upright_frames(video))
    chosen = np.linspace(0, len(pictures) - 1, min(frames, len(pictures))).round().astype(int)
    urls = [_data_url("image/jpeg", _jpeg(pictures[i])) for i in chosen]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    # Faults of the encoder's would be taken for the video's: finest usual quality, colours not halved in size.
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def content_of(question: str, first: list[Part], second: list[Part]) -> list[Part]:
    """The message of one question."""

    def text(words: str) -> Part:
        return {"type": "text", "text": words}

    return [text("The first video:"), *first, text("The second video:"), *second, text(question)]


def as_json(text: str) -> object:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def error_of(body: str) -> tuple[str, set[str]]:
    """What an error's body says, for people, and its code and type."""
    answer = as_json(body)
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return (error if isinstance(error, str) else body), set()
    message = error.get("message")
    return (message if isinstance(message, str) else body), {str(error.get(name)) for name in ("code", "type")}


def text_of(answer: Any) -> tuple[str | None, str]:
    """The text of a chat completion, None where it has none, and why it has ended ("" where it does not say)."""
    try:
        choice = answer["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (TypeError, KeyError, IndexError):
        return None, ""
    return text if isinstance(text, str) else None, str(end or "")


def verdict_in(text: str) -> str | None:
    """The verdict of the JSON in a text: alone, fenced or in prose. None where there is none, or two that differ."""
    if text.count("{") > MOST_BRACES:
        return None
    found = set()
    place = text.find("{")
    while place >= 0:
        try:
            value, place = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
        else:
            if "better" in value:
                found.add(str(value["better"]).strip().lower())
        place = text.find("{", place)
    return found.pop() if len(found) == 1 and found <= set(VERDICTS) else None


def shown(text: str) -> str:
    """In quotes, on one line, at most `LONGEST_SHOWN` characters, without control characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 50 * LONGEST_SHOWN]).split())
    return repr(words if len(words) <= LONGEST_SHOWN else words[: LONGEST_SHOWN - 1] + "…")


def seconds_to_wait(retry_after: str | None) -> float:
    """Of the header Retry-After, which holds seconds or a date; 0 where it says nothing that can be understood."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(retry_after or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date; one without a zone
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
