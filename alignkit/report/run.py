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
    summary: dict[str, Any]
    config_text: str | None
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluation: dict[str, Any]
    pairs: list[Path]
    samples: list[dict[str, Any]]
    regions: list[Path]
    skipped: list[dict[str, Any]]

    @property
    def sample_rows(self) -> list[dict[str, Any]]:
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
    config = read_yaml(folder / "config.yaml")
    return Run(
        folder=folder,
        summary=_summary(folder / "summary.json"),
        config_text=_text(folder / "config.yaml"),
        config=config,
        metrics=_logged(folder, config, "metrics"),
        timings=_logged(folder, config, "timings"),
        validation=_logged(folder, config, "validation"),
        evaluation=read_object(folder / "eval.json"),
        pairs=sorted((folder / "report_pairs").glob("*.npz")),
        samples=read_lines(folder / "samples" / "samples.jsonl"),
        regions=sorted((folder / "regions").glob("*.npz")),
        skipped=read_lines(folder / "skipped.jsonl"),
    )


def _logged(folder: Path, config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """NAME.jsonl of the run, or of a chain's stages one after the other, their steps counted on."""
    rows: list[dict[str, Any]] = []
    before: float = 0
    for run in [run / "train" for run in stage_folders(folder, config) or [folder]]:
        logged = read_lines(run / f"{name}.jsonl")
        rows += [row | {"step": row["step"] + before} for row in logged if number(row, "step") is not None]
        before += max((number(row, "step") or 0 for row in read_lines(run / "metrics.jsonl")), default=0)
    return rows


def stage_folders(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Those of a chain's stages, in their order; none for a run of one."""
    stages = config.get("stages")
    names = [stage.get("name") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    return [folder / "stages" / f"{number:02d}-{name}" for number, name in enumerate(names, 1)]


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


def _summary(file: Path) -> dict[str, Any]:
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


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    return _object(_text(file))


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a file; empty if there is none."""
    try:
        value = yaml.safe_load(_text(file) or "")
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSON Lines file, without lines that are none (cut off while being written)."""
    rows = (_object(line) for line in (_text(file) or "").splitlines())
    return [row for row in rows if row]
