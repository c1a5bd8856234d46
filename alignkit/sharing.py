"""Work shared between processes that need not know of each other, by locks on the files that come of it.

Ranks of torchrun, tasks of a Slurm array, a second terminal: whoever holds the lock beside a file makes it. The system
drops a lock when its process dies, so another one takes the work over.
"""

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from alignkit.errors import ConfigError, DataError
from alignkit.files import made, write_json
from alignkit.moment import end_if_of_the_moment
from alignkit.progress import say

POLL_SECONDS = 1.0  # between looks at files that other processes are making
LEAVING_SECONDS = 0.2  # in which the last of those that share a lock is gone

RUN_LOCK = ".run.lock"
TERMS, TERMS_LOCK = "terms.json", ".terms.lock"
_held: set[Path] = set()  # the folders whose run this process writes


@contextmanager
def run_lock(folder: Path, command: str, *, shared: bool = False) -> Iterator[None]:
    """The right to write a run in `folder`: one command's at a time, on this machine or any other, or that of any
    number which share their work out themselves (`shared`). Within a command that has it, it is had again for nothing.

    Raises ConfigError that names who has it; what had to be made of `folder` for that is gone afterwards.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    file, mode = folder / RUN_LOCK, fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with made(folder), _locked(file, mode | fcntl.LOCK_NB) as stream:
        if stream is None:
            raise ConfigError(f"output.dir: {folder}: {_holder(file)}; wait for it, or choose another output.dir")
        row = {"command": command, "process": os.getpid(), "host": socket.gethostname()}
        stream.write(json.dumps(row | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        stream.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)


def run_lock_state(folder: Path) -> tuple[bool, tuple[str, str] | None]:
    """Whether a command has the right to write the run in `folder`, and which one had it last: a lock's file outlives
    a command that was killed. Nothing is written; the lock is tried for a moment."""
    file = folder / RUN_LOCK
    try:
        with file.open("r+" if os.access(file, os.W_OK) else "r") as stream:
            who = _said_by(stream.read())
            try:
                fcntl.flock(stream, (fcntl.LOCK_EX if stream.writable() else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, who
            return False, who
    except OSError:  # no such file, or a file system without locks
        return False, None


def _holder(file: Path) -> str:
    try:
        who = _said_by(file.read_text())
    except OSError:
        who = None
    return f"{who[0]}, writes it since {who[1]}" if who else "another command writes it"


def _said_by(text: str) -> tuple[str, str] | None:
    """Who wrote the last line of a lock's file, and since when; None where it has not said so yet."""
    try:
        row = json.loads(text.splitlines()[-1])
        return f"alignkit {row['command']}, process {row['process']} on {row['host']}", row["since"]
    except (ValueError, LookupError, TypeError):
        return None


def share_out(files: list[Path], make: Callable[[int], None], looked: Callable[[], None] = lambda: None) -> None:
    """Have every file of `files` made, each once: make(i) writes files[i], whole or not at all.

    Returns when all are there, whoever made them; calls looked() after each file and each round. Raises what `make`
    raises, and DataError where the file system has no locks.
    """
    left = [i for i, file in enumerate(files) if not file.exists()]
    while left:
        for i in left:
            files[i].parent.mkdir(parents=True, exist_ok=True)
            with _locked(files[i].with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                if mine is not None and not files[i].exists():
                    make(i)
                    assert files[i].exists()
                    looked()
        left = [i for i in left if not files[i].exists()]
        looked()
        if left:
            time.sleep(POLL_SECONDS)


@contextmanager
def shared_folder(folder: Path, terms: dict[str, Any], command: str, names: str) -> Iterator[None]:
    """The right to make files in `folder`, had by any number of processes that make them under the same terms (JSON, by
    name). What was made there under others is deleted, and it is said which of them changed.

    names: a regular expression that fits those of all such files, and of no one else's.

    Raises ConfigError while others make files in it under other terms.
    """
    terms = json.loads(json.dumps(terms))
    with ExitStack() as held:
        with one_at_a_time(folder / TERMS_LOCK):  # none is between looking and beginning
            before = stored_terms(folder)
            changed = [name for name in {**before, **terms} if before.get(name) != terms.get(name)]
            if changed:
                with run_lock(folder, command):
                    _empty(folder, names, ", ".join(changed) if before else "settings that it does not tell")
                    write_json(folder / TERMS, terms)
            held.enter_context(run_lock(folder, command, shared=True))
        yield


def stored_terms(folder: Path) -> dict[str, Any]:
    """Under which the files of a `shared_folder` were made; empty where that is not told."""
    try:
        return dict(json.loads((folder / TERMS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        end_if_of_the_moment(folder / TERMS, error)
        return {}


def _empty(folder: Path, names: str, why: str) -> None:
    old = [path for path in folder.iterdir() if re.fullmatch(names, path.name) and path.is_file()]
    if any(path.suffix != ".lock" for path in old):
        say(f"{folder}: what is there was made under other terms ({why}); it is deleted")
    for path in old:
        path.unlink()


@contextmanager
def one_at_a_time(file: Path, waiting: str = "") -> Iterator[None]:
    """Processes enter one after the other, on this machine or any other that sees `file`. waiting: what is said where
    another one is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if held.enter_context(_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            if waiting:
                say(waiting)
            held.enter_context(_locked(file, fcntl.LOCK_EX))
        yield


@contextmanager
def _locked(file: Path, mode: int) -> Iterator[TextIO | None]:
    """`file`, made for the lock that this process has on it and deleted when the last one leaves; None where another
    one has the lock."""
    stream = file.open("a")
    try:
        _flock(stream, mode)
        while not _same_file(stream.fileno(), file):  # its last holder deleted what we have been waiting for
            stream.close()
            stream = file.open("a")
            _flock(stream, mode)
    except BlockingIOError:
        stream.close()
        yield None
        return
    except OSError as error:
        stream.close()
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise DataError(
            f"{file.parent}: this file system has no locks ({error.strerror}); mount it with flock, or choose "
            "an output.dir on another one"
        ) from None
    try:
        yield stream
    finally:
        if not mode & fcntl.LOCK_SH or _alone(stream):
            file.unlink(missing_ok=True)
        stream.close()


def _flock(stream: TextIO, mode: int) -> None:
    end = time.monotonic() + (LEAVING_SECONDS if mode & fcntl.LOCK_SH else 0)
    while time.monotonic() < end:  # who leaves a shared lock last has it alone until the file is gone
        with suppress(BlockingIOError):
            return fcntl.flock(stream, mode)
        time.sleep(0.01)
    fcntl.flock(stream, mode)


def _alone(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
