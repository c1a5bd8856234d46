"""Work shared between processes that need not know of each other, by locks on the files that come of it.

Ranks of torchrun, tasks of a Slurm array, a second terminal: whoever holds the lock beside a file makes it. The system
drops a lock when its process dies, so another one takes the work over.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import DataError

POLL_SECONDS = 1.0  # between looks at files that other processes are making


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
                if mine and not files[i].exists():
                    make(i)
                    assert files[i].exists()
                    looked()
        left = [i for i in left if not files[i].exists()]
        looked()
        if left:
            time.sleep(POLL_SECONDS)


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Processes enter one after the other, on this machine or any other that sees `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(file: Path, mode: int) -> Iterator[bool]:
    """Whether this process holds the lock on `file`, which is made for it and deleted afterwards."""
    stream = file.open("w")
    try:
        fcntl.flock(stream, mode)
        while not _same_file(stream.fileno(), file):  # its last holder deleted what we have been waiting for
            stream.close()
            stream = file.open("w")
            fcntl.flock(stream, mode)
    except BlockingIOError:
        stream.close()
        yield False
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
        yield True
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def _same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
