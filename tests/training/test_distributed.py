"""What the first process finds out, all of them know; a process learns its number from whoever started it."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError, DataError
from alignkit.launch import PARENT, free_port
from alignkit.training import distributed, extension
from alignkit.training.distributed import Process, lone_worker, on_main, on_main_at_length, start_process

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", PARENT)
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "ALIGNKIT_WORKER")


def ask(rank, port, answers):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    process = Process(rank, 2, rank, torch.device("cpu"))
    said = [on_main(process, lambda: {"rank": rank})]
    try:
        on_main(process, lambda: (_ for _ in ()).throw(DataError(f"no, says {rank}")))
    except DataError as error:
        said.append(str(error))
    distributed.MEETING_S = 0.2
    late = timedelta(seconds=3)  # the longest that a meeting may take here
    torch.distributed.distributed_c10d._set_pg_timeout(late, torch.distributed.group.WORLD)
    said.append(on_main_at_length(process, lambda: time.sleep(5) or rank))
    try:
        on_main_at_length(process, lambda: (_ for _ in ()).throw(DataError(f"not at length, says {rank}")))
    except DataError as error:
        said.append(str(error))
    answers.put((rank, said))


def test_the_answer_or_the_error_of_the_first_process_reaches_all():
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=ask, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == {rank: [{"rank": 0}, "no, says 0", 0, "not at length, says 0"] for rank in range(2)}


LEAVES_EARLY = """
import torch
from alignkit.training.distributed import start_process
start_process()
for _ in range(6000):
    torch.distributed.all_reduce(torch.ones(8), async_op=True)
"""


def test_processes_that_leave_with_exchanges_under_way_end_well():
    """What is protected is the interpreter's own end, which forked processes have not."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [subprocess.Popen([sys.executable, "-c", LEAVES_EARLY], env=env) for env in environments]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "5"}, 0),
        ({"ALIGNKIT_WORKER": "1"}, 1),
    ],
)
def test_a_worker_knows_its_number(monkeypatch, environment, rank):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    worker = lone_worker()
    assert worker.rank == rank and worker.main == (rank == 0)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "WORLD_SIZE"])
def test_a_worker_whose_number_is_none_is_refused_by_the_variables_name(monkeypatch, name):
    for other in SLURM:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"^{name}: should be a whole number, .* got 'x'"):
        lone_worker()


def test_a_process_with_half_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"^RANK: .* without .*MASTER_PORT"):
        start_process()


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (PermissionError(13, "Permission denied"), r"\(Permission denied\)"),
        (DataError("a: this file system has no locks"), r"\(no locks there\)"),
    ],
)
def test_a_folder_in_which_the_extension_cannot_be_built_is_named(monkeypatch, tmp_path, refusal, said):
    """And a build of another process's is waited for with a word."""
    asked = []

    def refuse(*lock):
        asked.append(lock)
        raise refusal

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(extension, "one_at_a_time", refuse)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/new: .* {said}; set TORCH_EXTENSIONS_DIR to a folder"):
        extension.load_cpu_communication()
    assert asked == [(tmp_path / "new/.building.lock", asked[0][1])] and asked[0][1].startswith("waiting for another")


def test_a_user_without_a_home_is_told_where_to_name_a_folder(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(extension.sys, "prefix", "/proc/nowhere")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(ConfigError, match=r"^/proc/nowhere/.* no home; set TORCH_EXTENSIONS_DIR to a folder"):
        extension.load_cpu_communication()


def test_what_a_killed_build_of_the_extension_left_behind_holds_nobody_up(tmp_path):
    """Torch waits for its file to go away, without a word and without end."""
    start_process()  # it is built
    built = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    shutil.copytree(built, tmp_path / "built")
    left = tmp_path / "built" / "deepspeed_shm_comm" / "lock"
    left.touch()
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    command = [sys.executable, "-m", "alignkit.training.distributed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert not left.exists() and "building" not in done.stderr
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin"), "one ninja, the environment's own"
