"""Processes of a run: who I am, how many we are, how many threads I may use, and starting several of us."""

import contextlib
import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch

# Set before DeepSpeed is imported anywhere: its own choice needs a GPU or a hint.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

PARENT = "ALIGNKIT_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1


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
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    _die_with_launcher()
    # DeepSpeed calls collectives by names that torch 2.13 deprecates; said at every step, by every process.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
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
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


def set_threads(processes: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched() -> bool:
    """Whether some launcher has already started this process as one of several."""
    return "RANK" in os.environ


def run_processes(arguments: list[str], count: int) -> int:
    """Run `python -m alignkit ARGUMENTS` as `count` processes on this machine; returns the first bad exit code.

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
    children = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
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
