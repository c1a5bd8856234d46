"""Options of the benchmarks, and the one CSV that their rows go to."""

import csv
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for timing.py and work.py


def pytest_addoption(parser):
    parser.addoption("--csv", type=Path, default=ROOT / "out" / "benchmarks" / "kernels.csv", help="the rows' file")


@pytest.fixture(scope="session")
def machine() -> dict[str, str]:
    """What every row says about where it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        device, path = torch.cuda.get_device_name(), "Triton kernels"
    else:
        device, driver, path = f"CPU, {torch.get_num_threads()} threads", "none", "reference path on CPU, no kernels"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    )  # a copy of the tree without its history is told
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "device": device, "driver": driver,
        "torch": torch.__version__, "triton": triton_version, "path": path,
    }  # fmt: skip


@pytest.fixture(scope="session")
def add_rows(request, machine):
    """Adds rows to this run's CSV; each is written at once, so that a run cut short keeps what it measured."""
    path = request.config.getoption("--csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)

    def add(rows: list[dict]) -> None:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*machine, *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows(machine | row for row in rows)

    return add
