"""Configurations from YAML and back; what is wrong with one is said in one line."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from alignkit.config.finding import RUN_FILE, find_config
from alignkit.config.noise import READERS
from alignkit.config.whole import Config
from alignkit.config.yaml_text import read_yaml
from alignkit.errors import ConfigError

ONCE = ("restart", "reshape", "accept")
"""Keys of `train` that answer a refusal: kept with a run, they would answer the next one too."""


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (YAML) and apply `overrides` ("train.steps=20"; values are YAML).

    `path` may also be the name of a shipped configuration, or a run's folder: then it goes on in that folder with the
    settings kept there, but for what was said for one start alone (ONCE).

    An override that names another objective than the file's begins with that one's own defaults; one that gives a β
    comes without the file's limits for an automatic one, and one that brings masks (pairs.mask.files) without the
    file's random ones: what the file sets beside them was for its own.

    Raises ConfigError for a missing or malformed file, an unknown key (with the nearest known one),
    a value of the wrong type or range.
    """
    given = Path(path)
    path = find_config(given)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'train:', got {type(tree).__name__}")
    if path == given / RUN_FILE:
        _go_on_in(given, tree)
    _forget_what_is_replaced(tree, overrides)
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from None


def _go_on_in(folder: Path, tree: dict[str, Any]) -> None:
    """What a run's settings are in its folder, which may have been moved since."""
    tree["output"] = {"dir": str(folder)}
    if isinstance(tree.get("train"), dict):
        tree["train"] = {key: value for key, value in tree["train"].items() if key not in ONCE}


def _forget_what_is_replaced(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    given = {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in overrides)}
    objective, pairs = tree.get("objective"), tree.get("pairs")
    name = given.get("objective.name")
    if name and isinstance(objective, dict) and name != objective.get("name", "local_dpo"):
        tree["objective"] = {}
    if given.get("objective.beta", "auto") != "auto" and isinstance(objective, dict):
        tree["objective"] = {k: v for k, v in tree["objective"].items() if k not in ("beta_min", "beta_max")}
    if given.get("pairs.mask.files", "null") != "null" and isinstance(pairs, dict):
        pairs.pop("mask", None)


def changed(config: Config, changes: dict[str, dict[str, Any]], where: str) -> Config:
    """`config` with the keys of `changes` (by section) changed, checked as a whole; `where` begins a ConfigError.

    An objective of another name begins with its own defaults, and so does a noise source and a reference.
    """
    tree = config.model_dump(mode="json")
    objective = changes.get("objective", {})
    if objective.get("name", config.objective.name) != config.objective.name:
        tree["objective"] = {}
    if objective.get("beta", "auto") != "auto":  # its limits were for an automatic one
        tree["objective"] = {k: v for k, v in tree["objective"].items() if k not in ("beta_min", "beta_max")}
    source = changes.get("noise", {}).get("source", config.noise.source)
    if source != config.noise.source:
        tree["noise"] = {key: value for key, value in tree["noise"].items() if source in READERS.get(key, (source,))}
    strategy = changes.get("reference", {}).get("strategy", config.reference.strategy)
    if strategy != config.reference.strategy:
        tree["reference"] = {}
    tree = merged(tree, changes)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object, but for ONCE."""
    tree = config.model_dump(mode="json")
    for section in (tree, *(tree["stages"] or ())):
        section["train"] = {key: value for key, value in section["train"].items() if key not in ONCE}
    return yaml.safe_dump(tree, sort_keys=False)


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in changes.items() if isinstance(value, dict) and isinstance(tree.get(key), dict)}
    return tree | {key: merged(tree[key], value) if key in both else value for key, value in changes.items()}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example train.steps=20")
    try:
        value = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {str(error).partition(': ')[2]}") from None
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    for part in parts[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
        tree = child
    tree[parts[-1]] = value


def _describe(error: ValidationError) -> str:
    """The first problem as one line; unknown keys get the nearest known name."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}{more}"
    if problem["type"] == "missing":
        return f"{where}: missing; set it in the file or as {where}=...{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"valid dictionary or instance of \w+", "section of keys", message)
    message = (
        message.replace("valid tuple", "list").replace("Tuple", "List").replace("valid dictionary", "section of keys")
    )
    if not where:
        return message + more
    # a section's own message names its keys; an endpoint may have been given with a password
    hidden = isinstance(problem["input"], dict) or "endpoint" in problem["loc"]
    got = "" if hidden else f", got {problem['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{got}{more}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str):  # a number is a place in a list
            section = next(_sections_in(section.model_fields[part].annotation))
    return [field.alias or name for name, field in section.model_fields.items()]


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
