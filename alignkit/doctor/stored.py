"""Reads what a run's folder holds, by names, terms and manifests alone: no weights, no torch, and nothing is written.

A folder may be in any state: what cannot be read counts as not there, or as damaged where it should be whole.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.errors import MomentError
from alignkit.training import manifest as manifests
from alignkit.training.manifest import BEFORE, DAMAGED, PARTIAL

STORES = {"rollouts": "rollout", "reference": "cache-reference", "pairs/train": "pairs", "pairs/heldout": "pairs"}
"""Stores in a run's folder, and the command that makes each."""


@dataclass(frozen=True)
class Store:
    """Blocks that are there and those planned (0: its terms cannot be read), rows planned, rows left out and why."""

    name: str
    command: str
    blocks: int
    planned: int
    rows: int
    left_out: Counter[str]

    @property
    def whole(self) -> bool:
        return self.planned > 0 and self.blocks >= self.planned


@dataclass(frozen=True)
class Checkpoint:
    """damage: why it cannot be gone on from, as far as it was looked at; None for a whole one."""

    name: str
    step: int
    damage: str | None
    processes: int


@dataclass(frozen=True)
class Training:
    """The training folder of a run or of one stage of a chain."""

    folder: Path
    hashed: bool = False

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return lines(self.folder / "metrics.jsonl")

    @property
    def step(self) -> int:
        return max((row.get("step", 0) for row in self.metrics), default=0)

    @property
    def skipped_steps(self) -> list[int]:
        return [row.get("step", 0) for row in self.metrics if row.get("skipped")]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The newest first."""
        try:
            found = manifests.candidates(self.folder / "checkpoints")
        except (MomentError, OSError):
            return []
        return [self._checkpoint(path) for path in found]

    @cached_property
    def newest(self) -> Checkpoint | None:
        """What a run would go on from."""
        return next((found for found in self.checkpoints if found.damage is None), None)

    @cached_property
    def set_aside(self) -> list[Checkpoint]:
        folder = self.folder / "checkpoints"
        return [self._checkpoint(path) for path in sorted(folder.glob(f"{DAMAGED}step-*"))]

    @property
    def before_reshape(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob(f"{BEFORE}step-*"))

    @property
    def cut_off(self) -> list[str]:
        """Saves that were not over."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob(f"{PARTIAL}*"))

    @property
    def diverged(self) -> list[Path]:
        """Batches at which it gave up, the last one last."""
        return sorted(self.folder.glob("diverged-step-*.parquet"), key=_number)

    @cached_property
    def stopped(self) -> dict[str, Any]:
        """Why it ended early: "step", "winner_error_change" and "max_winner_error"; empty where it did not."""
        return record(self.folder / "stopped.json")

    @property
    def processes(self) -> int:
        return record(self.folder / "run.json").get("processes", 1)

    @property
    def handed_on(self) -> bool:
        """Whether a stage of a chain has given its weights to the next."""
        return (self.folder / "masters.json").is_file() and (self.folder / "masters.safetensors").is_file()

    def _checkpoint(self, path: Path) -> Checkpoint:
        try:
            wrong = manifests.described(path, lambda: manifests.damage(path, hashed=self.hashed))
        except MomentError as error:
            wrong = str(error)
        processes = record(path / manifests.MANIFEST).get("world_size", 0)
        return Checkpoint(path.name, manifests.step_of(path), wrong, processes)


def stores(run: Path) -> Iterator[Store]:
    for name, command in STORES.items():
        folder = run / name
        terms = folder / f"{name.partition('/')[0]}.json"
        if not terms.exists():
            continue
        info = record(terms)
        rows, size = info.get("pairs", 0), info.get("block_size", 1)
        left = Counter(row.get("reason", "?") for file in folder.glob("block-*.skipped.jsonl") for row in lines(file))
        blocks = len(list(folder.glob("block-*.arrow")))
        yield Store(name, command, blocks, -(-rows // size), rows, left)


def pairs_of(batch: Path) -> list[str]:
    """The pairs of a batch that was saved, by number and source; their latents are not read."""
    try:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(batch, columns=["id", "source"]).to_pylist()
    except Exception:  # a damaged file, or no pyarrow
        return []
    return [f"{row['id']} ({row['source']})" for row in rows]


def record(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lines(file: Path) -> list[dict[str, Any]]:
    """JSON Lines, those of them that are whole."""
    found = []
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # being written when its process was killed
            continue
        found += [row] if isinstance(row, dict) else []
    return found


def _number(file: Path) -> int:
    digits = file.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
