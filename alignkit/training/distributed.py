"""Processes of a run: who I am, how many we are, how many threads I may use, and what one does for all."""

import atexit
import contextlib
import io
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import made
from alignkit.launch import (
    WORKER,
    WORKERS,
    array_task,
    die_with_launcher,
    first_named,
    free_port,
    slurm_group,
    torchrun_group,
    whole_number,
)
from alignkit.sharing import run_lock
from alignkit.training.extension import load_cpu_communication

# Set before DeepSpeed is imported anywhere: its own choice needs a GPU or a hint.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

Result = TypeVar("Result")

MEETING_S = 5.0
SEEN_WITHIN_S = 10.0  # by other nodes: network file systems remember for seconds that a name was not there


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
    """Join the process group that the launcher's environment names (torchrun, deepspeed, `--nproc`, srun), or form one
    alone.

    Sets the number of threads to cores // processes on this machine: more make every process slower. Raises ConfigError
    for an environment that names no group, or half of one.
    """
    os.environ.update(torchrun_group(os.environ) if "RANK" in os.environ else slurm_group(os.environ))
    import deepspeed

    if "RANK" not in os.environ:
        local = str(lone_worker().local_rank)
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    die_with_launcher()
    # DeepSpeed and diffusers call collectives by names that torch 2.13 deprecates; said at each step, by all processes.
    for module in (r"torch\.distributed", r"diffusers\.hooks\.context_parallel"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    local_rank = int(os.environ["LOCAL_RANK"])
    set_threads(int(os.environ[first_named(os.environ, WORKERS, "LOCAL_WORLD_SIZE", "WORLD_SIZE")]))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        if not cuda:
            with contextlib.redirect_stdout(io.StringIO()):
                load_cpu_communication()
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
    """What make() returns on the first process, for all of them; an AlignkitError or OSError of it is raised on all."""
    return make() if process.world_size == 1 else on_main_rank(make)


def on_main_rank(make: Callable[[], Result]) -> Result:
    """`on_main`, of the process group that there is."""
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [(make(), None)]
        except (AlignkitError, OSError) as error:
            answer = [(None, error)]
    torch.distributed.broadcast_object_list(answer, src=0)
    result, refused = answer[0]
    if refused is not None:
        raise refused
    return result


def gather(part: Result) -> list[Result]:
    """Every process's `part`, in their order; every process must call this."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts


def on_each(make: Callable[[], Result]) -> list[Result]:
    """What make() returns on every process, in their order; an AlignkitError or OSError of any is raised on all."""
    answer: list[Any]
    try:
        answer = [make(), None]
    except (AlignkitError, OSError) as error:
        answer = [None, error]
    answers = gather(answer)
    for _, refused in answers:
        if refused is not None:
            raise refused
    return [result for result, _ in answers]


def any_process(process: Process, *flags: bool) -> list[bool]:
    """Of each flag, whether any process has set it; every process must call this."""
    if process.world_size == 1:
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32, device=process.device)
    torch.distributed.all_reduce(together)
    return [bool(count) for count in together.tolist()]


def check_shared(process: Process, folder: Path) -> None:
    """Raises ConfigError, on every process, unless `folder` is one and the same for all of them."""
    if process.world_size == 1:
        return
    name = on_main(process, lambda: f".shared-{uuid.uuid4().hex}")
    token = folder / name
    with made(folder) if process.main else contextlib.nullcontext():
        if process.main:
            token.touch()
        torch.distributed.barrier()
        deadline = time.monotonic() + SEEN_WITHIN_S
        while not (seen := token.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = gather((socket.gethostname(), seen))
        if process.main:
            token.unlink()
    blind = [f"{rank} on {host}" for rank, (host, seen) in enumerate(found) if not seen]
    if blind:
        raise ConfigError(
            f"output.dir: {folder}: is not one folder for all processes: {', '.join(blind)} cannot see what the first "
            f"one, on {found[0][0]}, wrote there; put it on a file system that all nodes share"
        )


@contextlib.contextmanager
def group_lock(process: Process, folder: Path, command: str, *, shared: bool = False) -> Iterator[None]:
    """`run_lock` of a run's folder, had by the first process for all of them; every process calls this."""
    with contextlib.ExitStack() as held:
        on_main(process, lambda: held.enter_context(run_lock(folder, command, shared=shared)))
        yield


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
    SLURM_ARRAY_TASK_ID. Sets the number of threads as `start_process` does. Raises ConfigError where they are none.
    """
    environment = os.environ
    # WORKER before RANK, which a training run that formed a group alone has set
    own = first_named(environment, WORKER, "RANK", "SLURM_PROCID")
    rank = (array_task(environment) if own == "SLURM_PROCID" else 0) or whole_number(environment, own, 0)
    local_rank = whole_number(environment, first_named(environment, WORKER, "LOCAL_RANK", "SLURM_LOCALID"), 0)
    die_with_launcher()
    set_threads(whole_number(environment, first_named(environment, "LOCAL_WORLD_SIZE", WORKERS), 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank %= torch.cuda.device_count()
        device = torch.device("cuda", local_rank)
    return Process(rank, whole_number(environment, "WORLD_SIZE", 1), local_rank, device)


def set_threads(processes: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


if __name__ == "__main__":  # `make setup` builds what a first run would have to wait for
    start_process()
