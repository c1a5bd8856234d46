"""Runs on several processes, whose imports are paid for once: they are forked."""

import json

import pytest

FORKED = """
import json, os, sys, traceback
import torch
from alignkit.config import load_config
from alignkit.training.cache import build_cache
from alignkit.training.distributed import free_port, start_process
from alignkit.training.loop import train

calls = {"train": train, "cache-reference": build_cache}
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
    """`together((2, [("train", settings), ...]), ...)`: each list of jobs, in turn, by that many processes at once."""
    return together_once


def _together(command, config_file):

    def run(*groups):
        result = command(config_file, json.dumps(groups), python=("-c", FORKED))
        assert result.returncode == 0, result.stderr

    return run
