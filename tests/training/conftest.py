"""Runs on several processes, whose imports are paid for once: they are forked. Runs of each family, and one step."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from one_step import first_step_of

FORKED = f"""
import json, os, sys, traceback
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from one_step import away_from_the_start, first_step_of
"""
FORKED += """
from functools import partial

from alignkit.commands import run_command
from alignkit.given import build as given
from alignkit.localdpo import build as local
from alignkit.config import load_config
from alignkit.training.cache import build_cache
from alignkit.training.distributed import free_port, start_process
from alignkit.training.loop import train


def first_step(config, process):
    step = first_step_of(config, change=away_from_the_start)
    torch.save(step, f"{config.output.dir}/first-step-{process.rank}.pt")

calls = {"train": train, "cache-reference": build_cache, "first step": first_step}


def blind(*_):
    raise AssertionError("a video is opened by another process than the first of its group")


def made(name, config, process):
    if process.rank % 2:
        local.decode_with_facts = given.decode_with_facts = given.decode_clip = blind
    run_command(name, config)


calls |= {name: partial(made, name) for name in ("pairs", "rollout")}
for count, jobs in json.loads(sys.argv[2]):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(count):
        child = os.fork()
        if not child:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update(address, **{name: str(number) for name, number in numbers.items()})
            try:
                process = start_process()
                for name, settings in jobs:
                    calls[name](load_config(sys.argv[1], settings), process)
                torch.distributed.destroy_process_group()
                os._exit(0)  # taking the interpreter down takes seconds
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        running.append(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status:  # the others would wait for it
            for other in running:
                os.kill(other, 9)
            sys.exit(1)
"""


@pytest.fixture(scope="session")
def together_once(command, config_file):
    """`together` for fixtures that outlive a test."""
    return _together(command, config_file)


@pytest.fixture
def together(together_once):
    """`together((2, [("train", settings), ...]), ...)`: each list of jobs, in turn, by that many processes at once;
    "first step" leaves `first_step_of`, away from the start, in output.dir/first-step-RANK.pt."""
    return together_once


def _together(command, config_file):

    def run(*groups):
        result = command(config_file, json.dumps(groups), python=("-c", FORKED))
        assert result.returncode == 0, result.stderr

    return run


@pytest.fixture(scope="session")
def pairs_of(overrides, config_file, cogvideox_folders, two_experts, tmp_path_factory):
    """`pairs_of("wan")`, "2b", "5b" or "experts": (settings, folder) of a run that holds pairs of the family."""
    from alignkit.config import load_config
    from alignkit.localdpo.build import build_pairs

    made = {}

    def pairs(family: str):
        if family not in made:
            folder, settings = tmp_path_factory.mktemp(family), []
            if family == "experts":
                settings = [f"model.path={two_experts}", "model.expert=high"]
            elif family != "wan":
                settings = [
                    "model.family=cogvideox", f"model.path={cogvideox_folders[family]}", "model.max_sequence_length=24",
                    "data.height=16", "data.width=16",
                ]  # fmt: skip
            settings = overrides(folder, *settings)
            build_pairs(load_config(config_file, settings), torch.device("cpu"))
            made[family] = settings, folder
        return made[family]

    return pairs


@pytest.fixture
def first_step(pairs_of, config_file):
    """`first_step("wan", "train.checkpointing=full")`: metrics, and gradients by name, fp64, of a run's first step,
    which is taken inside `watch`. change(run) is called before it."""
    from alignkit.config import load_config

    def step(family: str, *settings: str, watch=None, change=lambda run: None):
        return first_step_of(load_config(config_file, [*pairs_of(family)[0], *settings]), watch, change)

    return step
