"""Metrics of a run: JSON Lines that a resumed run continues without a gap or a repeat, and TensorBoard."""

import json
import os
from pathlib import Path

from alignkit.files import write_atomically


class MetricsLog:
    """Appends one JSON object a step. What two runs with one seed must agree on goes to `metrics.jsonl`;
    seconds and memory, which they cannot, go to `timings.jsonl`."""

    def __init__(self, folder: Path, resumed_step: int):
        """Open for writing after `resumed_step`: lines of later steps, left by a run that was killed, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._streams = {}
        for name in ("metrics", "timings"):
            file = folder / f"{name}.jsonl"
            if file.exists():
                write_atomically(file, _lines_until(file, resumed_step))
            self._streams[name] = file.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict, timings: dict) -> None:
        for name, values in (("metrics", metrics), ("timings", timings)):
            self._streams[name].write(json.dumps({"step": step, **values}) + "\n")
            self._streams[name].flush()
            for key, value in values.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    if number is not None:
                        self._board.add_scalar(f"{key}/{i}" if isinstance(value, list) else key, number, step)

    def flush_to_disk(self) -> None:
        """Before a checkpoint is made, so that it never knows of steps that this file does not."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._board.close()


def read_metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _lines_until(file: Path, step: int) -> bytes:
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:  # the line that was being written when the run was killed
            break
        kept.append(line)
    return b"".join(kept)
