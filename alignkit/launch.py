"""Starting several processes of us, and what a launcher's environment says. Nothing heavy is imported here: a launcher
that only waits, and a command that is refused, need no torch."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

from alignkit.errors import ConfigError

PARENT = "ALIGNKIT_LAUNCHER_PID"
WORKER, WORKERS = "ALIGNKIT_WORKER", "ALIGNKIT_WORKERS"  # of processes that share work and form no group
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", PARENT)
PR_SET_PDEATHSIG = 1
SHARING = ("rollout", "pairs", "sample", "eval")  # commands whose processes share files out and need form no group
FIRST_PORT, PORTS = 20_000, 10_000


def launched() -> bool:
    """Whether torchrun, deepspeed or `--nproc` has started this process as one of several."""
    return "RANK" in os.environ


def first_of_several() -> bool:
    """Whether this process speaks for those that were started beside it; so does one that is alone, or that cannot
    read its number and is going to be refused for it."""
    own = os.environ.get(first_named(os.environ, "RANK", WORKER, "SLURM_PROCID"), "")
    return not own.isdecimal() or int(own) == 0


def first_named(environment: Mapping[str, str], *names: str) -> str:
    """The first of a launcher's variables that is there; the last, where none is."""
    return next((name for name in names if name in environment), names[-1])


def whole_number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    """What a launcher says by one of its variables. Raises ConfigError where that is something else."""
    said = environment.get(name, str(otherwise))
    if not said.isdecimal():
        raise ConfigError(f"{name}: should be a whole number, as a launcher sets it in the environment, got {said!r}")
    return int(said)


def torchrun_group(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher that sets RANK, and names no LOCAL_RANK, leaves unsaid: Kubeflow's PyTorchJob starts one process
    a container. Raises ConfigError where it cannot form a group."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"RANK: set in the environment without {', '.join(missing)}; set them too, or unset RANK")
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, processes, *_ = (whole_number(environment, name, 1) for name in numbers)
    if rank >= processes:
        raise ConfigError(f"RANK: should be below WORLD_SIZE, {processes}, in the environment, got {rank}")
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {} if "LOCAL_RANK" in environment else alone


def slurm_group(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of `srun -n N`, N above 1; empty for any other process.

    The first task's host is the first of the step's nodes. Raises ConfigError where Slurm does not name them, or by
    variables that are not as it sets them.
    """
    # sbatch's own process is no task
    script = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
    if script or "SLURM_PROCID" not in environment:
        return {}
    count = whole_number(environment, first_named(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), 1)
    if count < 2:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        if whole_number(environment, "SLURM_NNODES", 1) > 1:
            raise ConfigError("srun: Slurm names no SLURM_STEP_NODELIST; set MASTER_ADDR to the first node's name")
        host = "127.0.0.1"
    # a step's tasks agree on it without talking, two steps of a job side by side rarely take the same
    job = whole_number(environment, "SLURM_JOB_ID", 0) * 7 + whole_number(environment, "SLURM_STEP_ID", 0)
    return {
        "RANK": str(whole_number(environment, "SLURM_PROCID", 0)),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(whole_number(environment, "SLURM_LOCALID", 0)),
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(environment, count)),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(whole_number(environment, "MASTER_PORT", FIRST_PORT + job % PORTS)),
    }


def array_task(environment: Mapping[str, str]) -> int:
    """The number of a task of a Slurm array, from 0; 0 of any other process."""
    first = whole_number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    return whole_number(environment, "SLURM_ARRAY_TASK_ID", 0) - first


def group_size(environment: Mapping[str, str]) -> int:
    """Of the process group that a launcher's environment names, torchrun's before Slurm's; 1 where none does."""
    return whole_number(environment if "RANK" in environment else slurm_group(environment), "WORLD_SIZE", 1)


def groups_of(key: str, degree: int, processes: int) -> int:
    """How many groups of `degree` the processes of a run make; those of a group have consecutive ranks. Raises
    ConfigError, naming `key`, for processes that cannot be divided among them."""
    if processes % degree:
        raise ConfigError(f"{key}: {degree} does not divide the {processes} process(es) of this run")
    return processes // degree


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: "gpu[03-05,9],cpu1" → "gpu03", "rack[1-2]n[01-04]" → "rack1n01"."""
    found = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", found.group() if found else "")


def _tasks_of_node(environment: Mapping[str, str], tasks: int) -> int:
    """This node's of Slurm's "4(x3),2"; all, where it does not say so."""
    name = first_named(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    said = environment.get(name, str(tasks))
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", said):
        counts += [int(count)] * int(times or 1)
    if not counts:
        raise ConfigError(f"{name}: should be as Slurm sets it in the environment, 4(x3),2 say, got {said!r}")
    return counts[min(whole_number(environment, "SLURM_NODEID", 0), len(counts) - 1)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe",  # gloo's
    "remote process exited",  # NCCL's
    "Connection was likely closed",  # of the store that the first process keeps
)  # fmt: skip
ENDED = "; what was saved is kept, the same command continues"


def run_processes(arguments: list[str], count: int, *, together: bool = True) -> int:
    """Run `python -m alignkit ARGUMENTS` as `count` processes on this machine; returns the first bad exit code.

    together: they know of each other, and can form a process group; else each believes to be alone. One that a signal
    ended, which could not say so itself, is named.

    A signal that asks for an end is passed on as SIGTERM, so that they save a checkpoint together: a terminal's
    interrupt has reached them by itself, and a second one would end them at once. When one fails the others are killed,
    since they would wait for it for ever.
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

    def pass_on(_number: int, _frame: object) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM)

    for asked in end_signals():
        signal.signal(asked, pass_on)
    running, code = set(children), 0
    while running:
        for child in list(running):
            try:
                result = child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            running.discard(child)
            if result and not code:
                ended = {number: other.poll() for number, other in enumerate(children)}
                # by a signal: they may be noticed after those that miss them
                killed = {number: -found for number, found in ended.items() if found is not None and found < 0}
                code = next((128 + by for by in killed.values()), result)
                for other in running:
                    other.kill()
                for number, by in killed.items():
                    print(f"alignkit: process {number} was ended by {_signal(by)}{ENDED}", file=sys.stderr)
    return code


def end_signals() -> list[signal.Signals]:
    """Those by which a user, a supervisor, a lost connection and Slurm (`--signal=USR1@300`) ask for an end; without
    SIGHUP where it is ignored, as nohup has it."""
    lost = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *lost]


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (of a machine without memory left, say: its log tells)" if number == signal.SIGKILL else name


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error of torch's process groups says that another process is not there any more."""
    theirs = "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return theirs and any(words in str(error) for words in PEER_GONE)


def die_with_launcher() -> None:
    """Ask the kernel to end this process when `run_processes`' own is killed, so that none is left behind."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):
            os.kill(os.getpid(), signal.SIGKILL)
