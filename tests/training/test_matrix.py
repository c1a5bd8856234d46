"""What is shipped starts, trains exactly and goes on: a pairwise cover of all settings; `make matrix` is the whole."""

import importlib.util
import itertools
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("matrix", Path(__file__).with_name("matrix.py"))
matrix = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)

POSSIBLE = [row for row in matrix.combinations() if matrix.impossible(row) is None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder by family."""
    root = tmp_path_factory.mktemp("matrix")
    for family in matrix.AXES["family"]:
        matrix.prepare(family, root / family)
    return root


def test_each_pair_of_values_is_in_the_cover():
    def pairs(rows):
        return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}

    assert pairs(matrix.cover(POSSIBLE)) == pairs(POSSIBLE) and len(matrix.cover(POSSIBLE)) < 20


@pytest.mark.parametrize("row", matrix.cover(POSSIBLE), ids=" ".join)
def test_it_trains_goes_on_and_exports(row, bases, command, tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import matrix\n"
        "row = matrix.Row(*sys.argv[3:])\n"
        "print(matrix.run(row, Path(sys.argv[1], row.family), Path(sys.argv[2])))\n"
    )
    result = command(bases, tmp_path / "run", *row, python=("-c", code))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "trained"


@pytest.mark.parametrize("row", [row for row in matrix.combinations() if matrix.impossible(row)][:2], ids=" ".join)
def test_what_cannot_work_is_refused_by_its_sentence(row, bases, command, config_file, tmp_path):
    result = command("train", config_file, *matrix.settings_of(row, bases / row.family, tmp_path / "run"))
    assert result.returncode == 2 and matrix.impossible(row) in result.stderr
    assert not (tmp_path / "run").exists()
