"""docs/reference/commands.md: every command with its arguments and options."""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from alignkit.cli import app
from alignkit.reference.markdown import WRITTEN, code, doc, table

HEAD = """# Commands

`alignkit COMMAND --help` says the same. Exit codes: 0 done; 2 something that you can mend, said in one line that begins
with `alignkit:`. Arguments in brackets may be left out; options may stand between them."""


class Word(NamedTuple):
    """An argument, or an option, of a command."""

    name: str
    optional: bool
    values: str
    default: str
    about: str
    is_option: bool


def page() -> str:
    lines = [WRITTEN, "", HEAD]
    for name, command in _commands(app):
        words = list(_words(command))
        arguments = [word for word in words if not word.is_option]
        usage = ["alignkit", name, *(f"[{word.name}]" if word.optional else word.name for word in arguments)]
        options = [word for word in words if word.is_option]
        lines += ["", f"## {name}", "", f"    {' '.join(usage)}", "", doc(command)]
        lines += _listed("argument", arguments) + _listed("option", options)
    return "\n".join(lines) + "\n"


def _commands(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for info in group.registered_commands:
        assert info.callback is not None
        yield prefix + (info.name or info.callback.__name__.replace("_", "-")), info.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _commands(inner.typer_instance, f"{prefix}{inner.name} ")


def _words(command: Callable[..., Any]) -> Iterator[Word]:
    hints = get_type_hints(command, include_extras=True)
    for key, parameter in inspect.signature(command).parameters.items():
        kind, info = get_args(hints[key])[:2]
        is_option = isinstance(info, OptionInfo)
        name = (info.metavar or key.upper()).strip("[].")
        if is_option:
            name = info.default if isinstance(info.default, str) else f"--{key.replace('_', '-')}"
        values = _values(kind) + (f" ≥ {info.min}" if info.min is not None else "")
        optional = parameter.default is not inspect.Parameter.empty
        default = "" if parameter.default in (None, False, parameter.empty) else str(parameter.default)
        yield Word(name + " …" * ("list" in str(kind)), optional, values, default, info.help or "", is_option)


def _values(kind: Any) -> str:
    """What may stand there, where it is not any text."""
    if get_origin(kind) in (Union, types.UnionType):
        return ", ".join(filter(None, map(_values, get_args(kind))))
    if get_origin(kind) is Literal:
        return ", ".join(map(code, get_args(kind)))
    return "integer" if kind is int else ""


def _listed(title: str, words: list[Word]) -> list[str]:
    rows = ((code(word.name), word.values, code(word.default), word.about) for word in words)
    lines = table((title, "values", "default", ""), rows)
    return ["", *lines] if lines else []
