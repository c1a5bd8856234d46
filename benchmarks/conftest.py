"""Options of the benchmarks, and the one CSV that their rows go to."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for machine.py, timing.py and work.py

from machine import ROOT, machine


def pytest_addoption(parser):
    parser.addoption("--csv", type=Path, default=ROOT / "out" / "benchmarks" / "kernels.csv", help="the rows' file")


@pytest.fixture(scope="session")
def add_rows(request):
    """Adds rows to this run's CSV; each is written at once, so that a run cut short keeps what it measured."""
    path = request.config.getoption("--csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)

    def add(rows: list[dict]) -> None:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*machine(), *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows(machine() | row for row in rows)

    return add
