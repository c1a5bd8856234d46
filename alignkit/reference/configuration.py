"""docs/reference/configuration.md: every key of every section."""

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alignkit.config import OBJECTIVES, Config
from alignkit.reference.markdown import WRITTEN, code, doc, table

NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
LONG = 60
"""Characters from which on a default stands below its table."""
HEAD = """# Configuration

A configuration is a YAML file of sections; `section.key=value` on the command line overrides a key (the value is YAML).
Unknown keys, values of another type or out of range, and keys that do not go together are refused in one line before
anything is loaded. A path may begin with `~`, and is taken from where the command runs. `alignkit configs` lists the
files that come with alignkit, `alignkit init` prints one."""


def sections(around: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Every section: its full name, what is said of it, and its class; those that it holds come after it."""
    for name, field in around.model_fields.items():
        for section in _sections_in(field.annotation):
            yield prefix + name, field.description or "", section
            yield from sections(section, f"{prefix}{name}.")


def page() -> str:
    lines = [WRITTEN, "", HEAD]
    for name, about, section in sections():
        lines += ["", f"## {name}", "", *([f"{about[0].upper()}{about[1:]}.", ""] if about else []), doc(section), ""]
        fields = section.model_fields.items()
        lines += table(("key", "type", "default", ""), (_row(key, field) for key, field in fields))
        for key, field in fields:
            if _is_long(field.default):
                lines += ["", f"`{field.alias or key}` by default:", "", "```", field.default, "```"]
        if name == "objective":
            lines += ["", *_objectives()]
    return "\n".join(lines) + "\n"


def _row(key: str, field: FieldInfo) -> tuple[str, str, str, str]:
    kind = f"{_kind(field.annotation)}{_bounds(field.metadata)}"
    return code(field.alias or key), kind, _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    return "below" if _is_long(default) else code(_value(default))


def _is_long(default: Any) -> bool:
    return isinstance(default, str) and len(default) > LONG


def _value(value: Any) -> str:
    """As one writes it in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _kind(annotation: Any) -> str:
    """A type in words, with the bounds of what is in it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [bound for part in inner[1:] for bound in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _kind(inner[0]) + _bounds(extra)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_kind, inner))
    if origin is Literal:
        return ", ".join(map(code, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {_kind(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_kind, inner))}]"
    if origin is dict:
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    """What pydantic holds a value to: " ≥ 0 and ≤ 1"."""
    limits = [
        f"{sign} {getattr(part, name):.20g}" for part in metadata for name, sign in SIGNS.items() if hasattr(part, name)
    ]
    lengths = [f", at least {part.min_length} long" for part in metadata if hasattr(part, "min_length")]
    return (f" {' and '.join(limits)}" if limits else "") + "".join(lengths)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _objectives() -> list[str]:
    """Which keys each objective reads, and their values there."""
    rows = []
    for name, keys in OBJECTIVES.items():
        rows.append((code(name), ", ".join(code(f"{key}: {_value(value)}") for key, value in keys.items()) or "none"))
    return table(("name", "reads, with these defaults"), rows)
