"""The loops in examples/another_trainer run as they stand, start at logit 0, and move towards the winner."""

import importlib.util
import re
import socket
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


@pytest.fixture
def ran(plain_diffusers):
    """`ran(code)`: what it prints, in a process that has never heard of alignkit, on the reference path."""
    here = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as probe:  # others may run the same loop beside this one
        probe.bind(("127.0.0.1", 0))
        here["MASTER_PORT"] = str(probe.getsockname()[1])
    return lambda code: plain_diffusers(f"import os; os.environ.update({here!r})\n{code}")


@pytest.mark.parametrize("recipe", NEEDS)
def test_a_recipe_runs_and_learns(ran, recipe):
    if importlib.util.find_spec(NEEDS[recipe]) is None:
        pytest.skip(f"{NEEDS[recipe]} is not installed, and this recipe is for its users")
    code = f"import runpy, sys; sys.path.insert(0, {str(RECIPES)!r})\n"
    said = ran(code + f"runpy.run_path(sys.path[0] + '/{recipe}.py', run_name='__main__')")
    logits = [float(x) for x in re.findall(r"logit ([-+.\d]+)", said)]
    assert logits[0] == 0 and logits[-1] > 0.001


def test_the_examples_of_the_page_run(ran):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "kernels.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    assert ran("".join(blocks)) == "Counter()\n"
