"""Options of the benchmarks, and the one CSV that their rows go to."""

import csv
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for timing.py and work.py


def pytest_addoption(parser):
    parser.addoption(
        "--csv", type=Path, default=ROOT / "out" / "benchmarks" / "kernels.csv", help="rows are added here"
    )


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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "device": device, "driver": driver,
        "torch": torch.__version__, "triton": triton_version, "path": path,
    }  # fmt: skip


@pytest.fixture
def add_rows(request, machine):
    """Appends rows to the CSV, under the header of its first row."""
    path = request.config.getoption("--csv")

    def add(rows: list[dict]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*machine, *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows(machine | row for row in rows)

    return add
