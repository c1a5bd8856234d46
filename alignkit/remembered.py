"""What was found out once need not be found out again: it is kept in the user's cache, for every later command of any
run, so that a command which is then refused has left the run's own folder as it was."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.launch import first_of_several
from alignkit.sharing import one_at_a_time


class Memory:
    """Values (JSON) by name, in a file of one line each; of a name that comes twice, the last. None: kept nowhere."""

    def __init__(self, file: Path | None):
        self._file = file
        self._found: dict[str, Any] = {}
        for line in file.read_bytes().splitlines() if file and file.exists() else ():
            with suppress(ValueError, TypeError):  # cut off when its writer was killed
                name, value = json.loads(line)
                self._found[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def note(self, name: str, value: Any) -> None:
        """A full disk, or the user's quota, is no reason to stop: the value is then found out again another time."""
        self._found[name] = value
        with suppress(OSError):
            if self._file:
                with self._file.open("a") as stream:
                    stream.write(json.dumps([name, value]) + "\n")


@contextmanager
def memory(kind: str, of: Any, code: Iterable[Path] = ()) -> Iterator[Memory]:
    """What is remembered of `of` (JSON), had by one process of those that share a home at a time. Where there is no
    home, or one without locks, it is empty.

    code: the modules that find it out; what others found, an older version of them say, is not taken for it.
    """
    asked = hashlib.sha256(json.dumps(of).encode())
    for module in sorted(code):
        asked.update(module.read_bytes())
    with ExitStack() as held:
        try:
            file = cache_folder() / kind / f"{asked.hexdigest()[:32]}.jsonl"
            lock = file.with_suffix(".lock")
            waiting = f"waiting for another process, which looks at the same {kind} and holds {lock}"
            held.enter_context(one_at_a_time(lock, waiting if first_of_several() else ""))
            known = Memory(file)
        except (OSError, RuntimeError, DataError):  # RuntimeError is pathlib's, of a user without a home
            known = Memory(None)
        yield known


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignkit"


def stamp(file: Path) -> list[int]:
    """Changes with what is in `file`, which is not read. Raises OSError."""
    status = file.stat()
    # a copy may keep its original's time of change, but not that of its own making; numbers of inodes differ from
    # mount to mount of some network file systems
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def name_of(file: Path) -> str:
    """A file, as it is now. Raises OSError."""
    return json.dumps([str(file), *stamp(file)])
