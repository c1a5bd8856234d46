"""Processes of a run: who I am, how many we are, how many threads I may use, and starting several of us."""

import atexit
import contextlib
import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from alignkit.errors import AlignkitError

# Set before DeepSpeed is imported anywhere: its own choice needs a GPU or a hint.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

Result = TypeVar("Result")

PARENT = "ALIGNKIT_LAUNCHER_PID"
WORKER, WORKERS = "ALIGNKIT_WORKER", "ALIGNKIT_WORKERS"  # of processes that share work and form no group
PR_SET_PDEATHSIG = 1
MEETING_S = 5.0


@dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start_process() -> Process:
    """Join the process group that the launcher's environment names (torchrun, deepspeed, `--nproc`), or form one alone.

    Sets the number of threads to cores // processes on this machine: more make every process slower.
    """
    import deepspeed

    if "RANK" not in os.environ:
        local = str(lone_worker().local_rank)
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    _die_with_launcher()
    # DeepSpeed calls collectives by names that torch 2.13 deprecates; said at every step, by every process.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    set_threads(int(os.environ.get(WORKERS, os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where its extension was built
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(minutes=30),
            )
        atexit.register(_leave_group)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


def _leave_group() -> None:
    """Join the group's threads while Python is whole: one that drops its last tensor during Python's own end aborts the
    process, after work well done. Not after an unhandled error: the others may never come to what a thread waits for.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


def on_main(process: Process, make: Callable[[], Result]) -> Result:
    """What make() returns on the first process, for all of them; an AlignkitError that it raises is raised on all."""
    if process.world_size == 1:
        return make()
    answer: list = [None]
    if process.main:
        try:
            answer = [(make(), None)]
        except AlignkitError as error:
            answer = [(None, error)]
    torch.distributed.broadcast_object_list(answer, src=0)
    result, error = answer[0]
    if error is not None:
        raise error
    return result


def on_main_at_length(process: Process, make: Callable[[], Result]) -> Result:
    """`on_main` of what may take longer than a process group waits for one of its members, as people's and endpoints'
    answers do: the first process works in a thread, and they all meet every few seconds until it is done."""
    if process.world_size == 1:
        return make()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(make) if process.main else None
        done = [False]
        while not done[0]:
            if work is not None:
                done = [work in wait([work], timeout=MEETING_S).done]
            torch.distributed.broadcast_object_list(done, src=0)
    return on_main(process, work.result if work is not None else make)


def lone_worker() -> Process:
    """Who this process is among those of its launcher, without a process group: for work that needs no exchange.

    torchrun's ranks and `--nproc`'s know their number from RANK, tasks of a Slurm job or array from SLURM_PROCID and
    SLURM_ARRAY_TASK_ID. Sets the number of threads as `start_process` does.
    """
    environment = os.environ
    task = int(environment.get("SLURM_ARRAY_TASK_ID", 0)) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    # WORKER before RANK, which a training run that formed a group alone has set
    rank = int(environment.get(WORKER, environment.get("RANK", task or environment.get("SLURM_PROCID", 0))))
    local_rank = int(environment.get(WORKER, environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0))))
    _die_with_launcher()
    set_threads(int(environment.get("LOCAL_WORLD_SIZE", environment.get(WORKERS, 1))))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank %= torch.cuda.device_count()
        device = torch.device("cuda", local_rank)
    return Process(rank, int(environment.get("WORLD_SIZE", 1)), local_rank, device)


def set_threads(processes: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched() -> bool:
    """Whether some launcher has already started this process as one of several."""
    return "RANK" in os.environ


def run_processes(arguments: list[str], count: int, *, together: bool = True) -> int:
    """Run `python -m alignkit ARGUMENTS` as `count` processes on this machine; returns the first bad exit code.

    together: they know of each other, and can form a process group; else each believes to be alone.

    SIGTERM is passed on and a terminal's interrupt reaches all of them by itself, so that they save a checkpoint
    together; when one fails the others are killed, since they would wait for it for ever.
    """
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        PARENT: str(os.getpid()),
    }
    command = [sys.executable, "-m", "alignkit", *arguments]
    if not together:
        shared = {PARENT: shared[PARENT], WORKERS: str(count)}
    names = ("RANK", "LOCAL_RANK") if together else (WORKER,)
    children = [
        subprocess.Popen(command, env=os.environ | shared | dict.fromkeys(names, str(number)))
        for number in range(count)
    ]

    signal.signal(signal.SIGTERM, lambda number, _frame: [child.send_signal(number) for child in children])
    signal.signal(signal.SIGINT, lambda number, _frame: None)
    running, code = set(children), 0
    while running:
        for child in list(running):
            try:
                result = child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            running.discard(child)
            if result and not code:
                code = result if result > 0 else 128 - result
                for other in running:
                    other.kill()
    return code


def _die_with_launcher() -> None:
    """Ask the kernel to end this process when `run_processes`' own is killed, so that none is left behind."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # `make setup` builds what a first run would have to wait for
    start_process()
