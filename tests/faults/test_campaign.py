"""A part of the fault campaign (`make faults`), and that it notices when what keeps the data safe is taken away."""

import re
from pathlib import Path

import pytest

CODE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import campaign; sys.exit(campaign.main())"


@pytest.fixture(scope="session")
def campaign(command):
    """`campaign("--kind", "disk full")`: exit code and what it printed."""

    def run(*words):
        result = command(*words, python=("-c", CODE))
        assert "faults" in result.stdout, result.stderr
        return result.returncode, result.stdout

    return run


def kinds(*names: str) -> list[str]:
    return [word for name in names for word in ("--kind", name)]


def test_each_kind_of_fault_is_survived(campaign):
    code, said = campaign("--each", "1", "--seed", "1")
    assert code == 0, said
    total = int(re.search(r"\*\*\d+ kinds\*\* \| \*\*(\d+)\*\*", said)[1])
    assert total >= 30


@pytest.mark.parametrize(
    ("guard", "shows_in"),
    [
        ("fsync", "power cut when it is done"),
        ("rename", "kill -9 while a block is put in its place"),
        ("lock", "two runs in a folder"),
        ("hash", "a bit flipped in a checkpoint"),
    ],
)
def test_without_what_keeps_data_safe_the_campaign_reports_a_loss(campaign, guard, shows_in):
    code, said = campaign(*kinds(shows_in), "--each", "3", "--seed", "2", "--without", guard)
    assert code == 1 and "LOST" in said, said
