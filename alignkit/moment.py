"""Tells what a machine could not do for a moment, as a network's disk that does not answer, from what is damaged or not
there: nothing is left out, deleted or begun anew for the former; the command ends and can be given again."""

import errno
import fnmatch
import os
from pathlib import Path

from alignkit.errors import DataError, MomentError

OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
OF_THE_MOMENT = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN}


def end_if_of_the_moment(file: Path, error: BaseException) -> None:
    """Raises MomentError where `error`, met in reading `file`, is the machine's and not the file's."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_FILE:
        raise MomentError(
            f"{file}: the machine cannot read it just now ({os.strerror(error.errno)}), and nothing was decided "
            "without it: give the same command again when it can, or move it away"
        ) from error


def end_if_unreadable(file: Path, error: BaseException) -> None:
    """The same for the error of a decoder: those say the same of a damaged file and of a disk that does not answer, so
    the file is read once without them."""
    if isinstance(error, OSError) and error.errno in OF_THE_MOMENT:
        end_if_of_the_moment(file, error)
    try:
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass
    except OSError as found:
        end_if_of_the_moment(file, found)
    except ValueError:  # a name that no file can have
        pass


def listed(folder: Path, pattern: str) -> list[Path]:
    """`folder.glob(pattern)`, sorted; of a folder that cannot be looked into raises PermissionError or MomentError,
    where `glob` takes it for an empty one."""
    try:
        return sorted(folder / name for name in fnmatch.filter(os.listdir(folder), pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        end_if_of_the_moment(folder, error)
        raise


def may_pass(error: DataError) -> bool:
    """Whether what is wrong with a file may be gone another time, though the file stays as it is: memory, the rights
    that folders and groups give."""
    return isinstance(error.__cause__, (MemoryError, OSError))
