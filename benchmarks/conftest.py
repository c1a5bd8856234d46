"""Options of the benchmarks, and the one CSV that their rows go to."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for machine.py, timing.py and work.py

from machine import ROOT, machine

CASE = "op", "noise", "shape", "pairs", "dtype"


def pytest_addoption(parser):
    parser.addoption("--csv", type=Path, default=ROOT / "out" / "benchmarks" / "kernels.csv", help="the rows' file")
    parser.addoption("--resume", action="store_true", help="keep the rows that the file has, and add what it lacks")


@pytest.fixture(scope="session")
def rows_file(request) -> Path:
    path = request.config.getoption("--csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not request.config.getoption("--resume"):
        path.unlink(missing_ok=True)
    return path


@pytest.fixture
def skip_if_measured(rows_file):
    """Skips a case whose rows a run that is resumed has already."""
    measured = set()
    if rows_file.exists():
        with rows_file.open(newline="") as file:
            measured = {tuple(row[key] for key in CASE) for row in csv.DictReader(file)}

    def skip(case: dict) -> None:
        if tuple(str(case[key]) for key in CASE) in measured:
            pytest.skip("measured before")

    return skip


@pytest.fixture(scope="session")
def add_rows(rows_file):
    """Adds rows to this run's CSV; each case's are written at once, so that a run cut short keeps what it measured."""

    def add(rows: list[dict]) -> None:
        new = not rows_file.exists()
        with rows_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*machine(), *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows(machine() | row for row in rows)

    return add
