"""Where files lie: which file system, whether its locks hold, how much memory this process may take."""

import errno
import fcntl
import tempfile
from dataclasses import dataclass
from pathlib import Path

NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "cifs",
    "smb3",
    "fuse.",
    "9p",
    "afs",
    "wekafs",
)


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system: its kind and the options that concern locks."""

    kind: str
    options: frozenset[str]

    @property
    def network(self) -> bool:
        return self.kind.startswith(NETWORK)

    @property
    def no_locks(self) -> str | None:
        """Why locks do not hold between machines, as far as the mount says."""
        if self.kind.startswith("nfs") and self.options & {"nolock", "local_lock=all", "local_lock=flock"}:
            return (
                "this NFS mount keeps locks on each machine alone (nolock or local_lock): two nodes may write one run"
            )
        if self.kind == "lustre" and not self.options & {"flock"}:
            return "this Lustre mount has no flock between machines"
        return None

    @property
    def said(self) -> str:
        return self.kind + (" (shared by machines)" if self.network else "")


def first_existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> FileSystem:
    """Of an existing path; `mounts` as Linux describes them in proc(5)."""
    path, found, length = path.resolve(), FileSystem("an unknown file system", frozenset()), -1
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        left, _, right = line.partition(" - ")
        place, kind = left.split()[4].replace("\\040", " "), right.split()
        if len(place) >= length and path.is_relative_to(place):
            options = f"{left.split()[5]},{kind[2] if len(kind) > 2 else ''}"
            found, length = FileSystem(kind[0], frozenset(options.split(","))), len(place)
    return found


def lock_problem(folder: Path, kind: FileSystem) -> str | None:
    """Why locks do not work in `folder`, tried on a file that is gone at once; None if they do."""
    if kind.no_locks:
        return kind.no_locks
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return f"this file system has none ({error.strerror})"
        return f"cannot be tried ({error.strerror})"
    return None


def memory_limit(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory that this process may take, by its container or machine, and how many of them are free."""
    rows = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    machine = {name: int(value.split()[0]) * 1024 for name, value in rows}
    whole, free = machine["MemTotal"], machine["MemAvailable"]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = (int((root / "sys/fs/cgroup" / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no container, or "max"
            continue
        if most < whole:
            whole, free = most, min(free, most - taken)
    return whole, max(free, 0)
