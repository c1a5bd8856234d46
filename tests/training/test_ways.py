"""However a run is spread over processes and memory, its numbers are the same: some rows of tests/training/ways.py."""

import itertools
from pathlib import Path

import pytest
import ways

ROWS = [
    ways.Way("full", "2", "apart", "cached", "selective", "2", "zero3"),
    ways.Way("full", "4", "together", "copy", "full", "2", "zero2"),
    ways.Way("lora", "2", "apart", "adapter", "none", "1", "zero2"),
]
CODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import ways
folder = Path(sys.argv[1])
ways.prepare("wan", folder / "base")
for number, words in enumerate(sys.argv[2:]):
    ways.run(ways.Way(*words.split()), folder / "base", folder / str(number), 3)
"""


def test_each_pair_of_values_is_in_the_cover():
    def pairs(rows):
        return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}

    assert pairs(ways.cover(ways.ways())) == pairs(ways.ways())


@pytest.fixture(scope="module")
def folders(command, tmp_path_factory):
    """Folder of each run, by its row."""
    root, rows = tmp_path_factory.mktemp("ways"), [*ways.PLAIN.values(), *ROWS]
    result = command(root, *map(" ".join, rows), python=("-c", CODE))
    assert result.returncode == 0, result.stderr
    return {row: root / str(number) for number, row in enumerate(rows)}


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_losses_and_parameters_are_those_of_the_plain_run(folders, row):
    plain = folders[ways.PLAIN[row.weights]]
    apart = ways.distance(row.weights, folders[row], plain, plain.parent / "base")
    assert apart.numbers <= ways.TOLERANCE and apart.parameters <= ways.TOLERANCE, apart
    assert apart.change > 0, "another order of sums: the very same bits would be the very same run"
