"""Starts the command line in processes that have imported everything already: forked, some tenths of a second each.

Imports are most of what a small command takes. `python tests/starting.py` serves jobs, a line of JSON each: one with
`argv` is started and answered by its process's number, one with `poll` by the exit code of that process, or nothing.
`python tests/starting.py plain` serves jobs of code that has diffusers and has never heard of alignkit.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 240
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def fresh_environment() -> dict[str, str]:
    """Without what a training run in this process has told DeepSpeed about its process group."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHER}


class Started:
    """A command that runs in a process group of its own. code: -N where signal N ended it, None while it runs."""

    def __init__(self, pid: int, out: Path):
        self.pid, self._out, self.code = pid, out, None

    @property
    def said(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float = TIMEOUT_S) -> int:
        """Its exit code. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"not over after {seconds:.0f} s:\n{self.said[-2000:]}")
            time.sleep(0.01)
        return self.code

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """It and all that it started."""
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The single line of a command that was refused, beside which a slow machine may have had a word on its start."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("alignkit: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


DIFFUSERS = (
    "diffusers.models", "diffusers.pipelines.cogvideo.pipeline_cogvideox", "diffusers.pipelines.wan.pipeline_wan",
    "peft", "transformers.models.t5.modeling_t5", "transformers.models.umt5.modeling_umt5",
)  # fmt: skip


def import_diffusers() -> None:
    """And what the small pipelines need."""
    for name in ("torch", *DIFFUSERS):
        importlib.import_module(name)


def import_everything() -> None:
    """What the commands need, in the order in which they import it: our own settings come before DeepSpeed."""
    for name in (
        "torch", "alignkit.training.distributed", "deepspeed", *DIFFUSERS,
        "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "torch.utils.cpp_extension",
        "alignkit.__main__", "alignkit.demo", "alignkit.evaluation.summary", "alignkit.report", "alignkit.stages.chain",
    ):  # fmt: skip
        importlib.import_module(name)


def forget_garbage() -> None:
    """What is there now is not looked at again: DeepSpeed collects garbage at each start, a third of a second over all
    that was imported, and a forked process copies what it looks at."""
    gc.collect()
    gc.freeze()


def start(
    argv: list[str],
    out: Path,
    err: Path,
    *,
    code: str | None = None,
    environment: dict[str, str] | None = None,
    first: Callable[[], None] = lambda: None,
) -> Started:
    """The command line `argv`, or the Python `code` with it; what they print goes to `out` and `err`.

    environment: all of it, instead of this process's. first() is called before, in the same process; in each of them,
    where `--nproc` starts several, which are forked as well.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return Started(pid, out)
    os.setpgid(0, 0)
    _become(argv, out, err, code, environment, first)
    raise AssertionError("never reached")


def _become(
    argv: list[str], out: Path, err: Path, code: str | None, environment: dict[str, str] | None, first: Callable
) -> None:
    status = 1
    try:
        _connect(os.devnull, 0)
        _connect(out, 1)
        _connect(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.argv = argv
        if "alignkit" in sys.modules:
            _prepare(argv, out, err, first)
        if code is None:
            sys.modules["alignkit.__main__"].main()
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException as error:
        import traceback

        sys.last_value = error
        traceback.print_exc()
    finally:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _prepare(argv: list[str], out: Path, err: Path, first: Callable) -> None:
    from alignkit import launch

    launch.subprocess = _Forking(out, err, first)
    if "--nproc" not in argv or launch.launched():
        first()


def _connect(file: str | Path, number: int) -> None:
    stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, number)
    os.close(stream)


class _Forking:
    """What the launcher takes for `subprocess`: it forks what it starts."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, *given):
        self._out, self._err, self._first = given

    def Popen(self, command: list[str], env: dict[str, str]) -> "_Child":
        pid = os.fork()
        if not pid:  # command: python -m alignkit …
            _become(["alignkit", *command[3:]], self._out, self._err, None, env, self._first)
        return _Child(pid)


class _Child:
    def __init__(self, pid: int):
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a process", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print as they are imported
    if sys.argv[1:] == ["plain"]:
        import_diffusers()
    else:
        import_everything()
        importlib.import_module("alignkit.preparing").quiet_libraries()
    forget_garbage()
    running: dict[int, Started] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            started = running[job["poll"]]
            answer = started.code if started.over() else ""
        else:
            places = Path(job["out"]), Path(job["err"])
            started = start(job["argv"], *places, code=job["code"], environment=job["env"])
            answer, running[started.pid] = started.pid, started
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    serve()
