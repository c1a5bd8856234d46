"""JSON as it was meant: a key that stands twice in one object is refused, where Python takes the second in silence."""

import json
from typing import Any


class TwiceError(ValueError):
    """A key that stands twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TwiceError(f"holds the key {key!r} twice; keep one")
        found[key] = value
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def read_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, TwiceError among them, and RecursionError for what is nested too deep."""
    return DECODER.decode(text)
