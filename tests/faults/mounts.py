"""Small disks: file systems in memory that fill up, in a name space of this process's own."""

import ctypes
import os
import tempfile
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE = 32, 16384, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def may_mount() -> bool:
    """Give this process mounts of its own. False, and nothing is changed, where the system does not allow it. Before it
    has any threads."""
    child = os.fork()
    if not child:  # tried there first: half of it may be allowed
        try:
            _own_mounts()
            disk(Path(tempfile.gettempdir()), 2**20)
            os._exit(0)
        except BaseException:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        return False
    _own_mounts()
    return True


def _own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(CLONE_NEWNS):
        _done(_libc.unshare(CLONE_NEWNS | CLONE_NEWUSER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _done(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount")


def _done(answer: int, what: str) -> None:
    if answer:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def disk(folder: Path, size: int, again: bool = False) -> None:
    """`folder` on a disk of `size` bytes; again: the disk that is there already gets that size."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size}".encode()
    _done(_libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", MS_REMOUNT if again else 0, options), f"mount {folder}")


def remove(folder: Path) -> None:
    _libc.umount2(str(folder).encode(), 2)
