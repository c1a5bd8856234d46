"""Writing files so that they appear whole or not at all."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignkit.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, then rename over it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process numbers repeat between containers
    partial.write_bytes(content)
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file over `path`, once its content is on disk: a name that is there first, after a power cut,
    is that of an empty file."""
    flush(partial)
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def flush(path: Path) -> None:
    """Have what was written of a file, or the names in a folder, on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """`folder` is there; what of it had to be made for that, and nothing was written into, is gone afterwards."""
    new = []
    path = folder
    while not path.exists():
        new.append(path)
        path = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # no longer empty
            for path in new:
                path.rmdir()


def read_json_file(file: Path, advice: str) -> Any:
    """Raises DataError, with what to do about it, for a file that is no JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); {advice}") from None


def _there(folder: Path) -> Path:
    """It, or the nearest above it that exists."""
    return folder if folder.exists() else _there(folder.parent)


NO_ROOM = errno.ENOSPC, errno.EDQUOT
# What libraries that write by themselves say: safetensors, pyarrow, SQLite; and torch, whose writer does not say why.
NO_ROOM_SAID = ("No space left on device", "os error 28", "disk is full", "Disk quota exceeded")
UNWRITTEN = ("unexpected pos", "PytorchStreamWriter")  # its reader, of a damaged file, says other things


def no_room(error: BaseException | None, *folders: Path) -> str | None:
    """A line that says so where `error`, or what led to it, is a disk that is full: of `folders`, where was written to,
    that of the one with least room."""
    while error is not None:
        text = str(error)
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        if full or any(said in text for said in (*NO_ROOM_SAID, *UNWRITTEN)):
            free, folder = min((shutil.disk_usage(_there(folder)).free / 1e6, folder) for folder in folders)
            sure = "" if full or not any(said in text for said in UNWRITTEN) else ", it seems,"
            return (
                f"{folder}: no space is left on its disk{sure} ({free:.3g} MB free): make room, and the same command "
                "goes on from what is saved"
            )
        error = error.__cause__ or error.__context__
    return None
