"""What the compiler makes of every kernel for GPUs that are not here, held to a checked-in budget.

The interpreter sees neither registers that spill, nor loads that lost their vectors, nor local memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.6", reason="the budget is for triton 3.6 and newer")
HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "budget.json").read_text())


@pytest.mark.parametrize("architecture", BUDGET)
def test_every_kernel_stays_within_its_budget(architecture):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compiled.py"), "--check", "--architecture", architecture.removeprefix("sm_")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert json.loads(answer.stdout) == {architecture: []}


@pytest.mark.parametrize("architecture", BUDGET)
def test_aligned_latents_come_by_asynchronous_copies_and_many_at_once(architecture):
    """The budget itself: what a copy moves, 64 bits and more, is never read in pieces, and three steps of the loop are
    under way when the first is waited for."""
    budget = BUDGET[architecture]
    for name, allowed in budget.items():
        if "aligned" in name and not name.startswith(("normal", "uniform", "add noise")):
            assert allowed["async_copies"] > 0 and allowed["narrow_loads"] == 0, name
            assert allowed["in_flight"] >= 3 * allowed["async_copies"] / 4, name
    assert budget["errors given dense aligned bf16"]["in_flight"] >= 12
    assert budget["normal aligned"]["instructions"] <= 448
