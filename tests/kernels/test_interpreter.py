"""The kernels themselves, run by Triton's interpreter: it must be chosen before the first import, so in a process
of its own. `TRITON_INTERPRET=1 pytest tests/kernels` runs the same tests one by one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit_kernels import dispatch

pytestmark = [
    pytest.mark.skipif(dispatch.INTERPRETED, reason="this process already runs the kernels"),
    pytest.mark.skipif(not dispatch.HAVE_TRITON, reason="triton is not installed: there are no kernels to run"),
]


def test_the_kernels_pass_every_test_of_the_ops():
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "-k", "triton", "-x", "-rs"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-6000:]
    skipped = re.findall(r"^SKIPPED .*", answer.stdout, re.M)
    # A whole file may need an extra; of single tests, only what no interpreter can do may be left out.
    allowed = "an extra", "graphs are of a GPU", "required is: .3.6"
    assert "passed" in answer.stdout, answer.stdout[-2000:]
    assert all(any(re.search(reason, line) for reason in allowed) for line in skipped), answer.stdout[-2000:]
