"""Reading a run directory for the report: only summary.json must be there, all else may be missing."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import DataError


@dataclass(frozen=True)
class Run:
    """What a run directory holds; empty or None where a file is missing or cannot be read."""

    folder: Path
    summary: dict
    config_text: str | None
    config: dict
    metrics: list[dict]
    timings: list[dict]
    validation: list[dict]
    evaluation: dict
    pairs: list[Path]
    samples: list[dict]
    regions: list[Path]
    skipped: list[dict]

    @property
    def sample_rows(self) -> list[dict]:
        """A row for each pair of samples, with what was measured of it where the evaluation is of these samples."""
        listed = self.evaluation.get("samples")
        judged = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        of = {(row.get("base"), row.get("aligned")): row for row in judged}
        return [of.get((row.get("base"), row.get("aligned")), {}) | row for row in self.samples]

    @property
    def brought_pairs(self) -> bool:
        """Whether its pairs were ranked videos, not made by LocalDPO."""
        data = self.config.get("data")
        return isinstance(data, dict) and data.get("pairs") is not None


def read_run(folder: Path) -> Run:
    """Raises DataError if summary.json is missing or is no JSON object."""
    config_text = _text(folder / "config.yaml")
    return Run(
        folder=folder,
        summary=_summary(folder / "summary.json"),
        config_text=config_text,
        config=_yaml(config_text),
        metrics=_logged(folder, _yaml(config_text), "metrics"),
        timings=_logged(folder, _yaml(config_text), "timings"),
        validation=_logged(folder, _yaml(config_text), "validation"),
        evaluation=_object(_text(folder / "eval.json")),
        pairs=sorted((folder / "report_pairs").glob("*.npz")),
        samples=_lines(folder / "samples" / "samples.jsonl"),
        regions=sorted((folder / "regions").glob("*.npz")),
        skipped=_lines(folder / "skipped.jsonl"),
    )


def _logged(folder: Path, config: dict, name: str) -> list[dict]:
    """NAME.jsonl of the run, or of a chain's stages one after the other, their steps counted on."""
    rows: list[dict] = []
    before: float = 0
    stages = config.get("stages")
    names = [stage.get("name") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    runs = [folder / "stages" / f"{number:02d}-{name}" for number, name in enumerate(names, 1)] or [folder]
    for run in [run / "train" for run in runs]:
        logged = _lines(run / f"{name}.jsonl")
        rows += [row | {"step": row["step"] + before} for row in logged if number(row, "step") is not None]
        before += max((number(row, "step") or 0 for row in _lines(run / "metrics.jsonl")), default=0)
    return rows


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at tree[key][key]…, None if there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if _is_number(tree) else None


def numbers(tree: Any, *keys: str) -> list[float]:
    """The list of finite numbers at tree[key][key]…, empty if there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return [value for value in tree if _is_number(value)] if isinstance(tree, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _summary(file: Path) -> dict:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: missing, so there is nothing to report; run 'alignkit eval' first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); run 'alignkit eval' again") from error
    if not isinstance(summary, dict):
        raise DataError(f"{file}: holds no JSON object; run 'alignkit eval' again")
    return summary


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _object(text: str | None) -> dict:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(text: str | None) -> dict:
    try:
        value = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _lines(file: Path) -> list[dict]:
    """The JSON objects of a JSON Lines file, without lines that are none (cut off while being written)."""
    rows = (_object(line) for line in (_text(file) or "").splitlines())
    return [row for row in rows if row]
