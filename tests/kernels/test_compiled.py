"""What the compiler makes of every kernel for GPUs that are not here, held to a checked-in budget.

The interpreter sees neither registers that spill, nor loads that lost their vectors, nor local memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit_kernels import dispatch

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "budget.json").read_text())


@pytest.mark.skipif(not dispatch.HAVE_TRITON, reason="triton is not installed, so there is no compiler")
@pytest.mark.parametrize("architecture", BUDGET)
def test_every_kernel_stays_within_its_budget(architecture):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compiled.py"), "--check", "--architecture", architecture.removeprefix("sm_")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert json.loads(answer.stdout) == {architecture: []}


@pytest.mark.parametrize("architecture", BUDGET)
def test_aligned_latents_are_read_by_128_bits(architecture):
    """The budget itself: every latent of an aligned sample comes in whole vectors, and none in pieces."""
    for name, allowed in BUDGET[architecture].items():
        if "aligned" in name and not name.startswith(("normal", "uniform")):
            assert allowed["wide_loads"] > 0 and allowed["narrow_loads"] == 0, name
