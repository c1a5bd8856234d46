"""The loops in examples/another_trainer run as they stand, start at logit 0, and move towards the winner."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "another_trainer"
NEEDS = {
    "diffusers_loop": "diffusers",
    "accelerate_loop": "accelerate",
    "deepspeed_loop": "deepspeed",
    "lightning_module": "lightning",
    "fsdp2_loop": "torch",
    "trl_like_trainer": "transformers",
}


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.py")} - {"toy"} == NEEDS.keys()


@pytest.mark.parametrize("recipe", NEEDS)
def test_a_recipe_runs_and_learns(recipe):
    if importlib.util.find_spec(NEEDS[recipe]) is None:
        pytest.skip(f"{NEEDS[recipe]} is not installed, and this recipe is for its users")
    with socket.socket() as probe:  # others may run the same loop beside this one
        probe.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(probe.getsockname()[1])}
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", **port}
    command = [sys.executable, str(RECIPES / f"{recipe}.py")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert answer.returncode == 0, answer.stderr[-2000:]
    logits = [float(x) for x in re.findall(r"logit ([-+.\d]+)", answer.stdout)]
    assert logits[0] == 0 and logits[-1] > 0.001


def test_the_examples_of_the_page_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "kernels.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "".join(blocks)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert answer.returncode == 0 and answer.stdout == "Counter()\n", answer.stderr[-2000:]
