"""A part of the fault campaign (`make faults`), and that it notices when what keeps the data safe is taken away."""

import re
from pathlib import Path

import pytest

CODE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import campaign; sys.exit(campaign.main())"


# of each some seconds; processes that are dead, stopped and slow, rounds and students have tests of their own
QUICK = (
    "kill -9 inside a save", "pairs are made", "are sampled", "errors are cached", "in a ranking",
    "put in its place", "between two stages", "server of votes", "power cut", "block", "bit flipped", "checkpoint cut",
    "disk full", "changed terms", "NaN in every step",
)  # fmt: skip


@pytest.fixture(scope="session")
def campaign(start_command):
    """`campaign("--kind", "disk full")`: exit code and what it printed."""

    def run(*words):
        child = start_command(*words, code=CODE)
        out, errors = child.communicate(timeout=900)
        assert "faults" in out, errors
        return child.returncode, out

    return run


def kinds(*names: str) -> list[str]:
    return [word for name in names for word in ("--kind", name)]


def test_a_fault_of_each_quick_kind_is_survived(campaign):
    code, said = campaign(*kinds(*QUICK), "--each", "1", "--seed", "1")
    assert code == 0, said
    assert int(re.search(r"\*\*(\d+) kinds\*\*", said)[1]) >= len(QUICK)


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
    code, said = campaign(*kinds(shows_in), "--each", "1", "--seed", "2", "--without", guard)
    assert code == 1 and "LOST" in said, said
