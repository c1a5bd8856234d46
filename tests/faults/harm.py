"""What is done to a process from within: ended at a drawn moment, its power cut, its numbers spoilt, its guards gone.

A moment is a file operation under the run's folder (opened to be written, renamed, deleted, flushed, written by torch
or safetensors), counted from 0, or a number of seconds; `delay` seconds after it the process gets the signal.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

GUARDS = ("fsync", "rename", "lock", "hash")
EVENTS, SAVED, LISTING, CONTENTS = "events.jsonl", "saved", "listing.json", "contents"


@dataclass(frozen=True)
class Harm:
    """signal: at event `event` or after `seconds`, `delay` later. power: the machine's power is cut instead, and names
    that were not flushed are lost (`names_lost`) or only what is in them. nan_steps: those in which a pair's video is
    spoilt. rank: the process to be harmed, of several."""

    signal: int | None = None
    event: int | None = None
    seconds: float | None = None
    delay: float = 0.0
    power: bool = False
    names_lost: bool = False
    nan_steps: tuple[int, ...] = ()
    rank: int = 0


def apply(root: Path, diary: Path, harm: Harm | None, without: tuple[str, ...]) -> None:
    """In the process that is to be harmed, before it begins. root: its run's folder. diary: a folder elsewhere, for
    what happened (`events`, `saved_step`) and for what a cut of the power leaves (`cut_power`)."""
    diary.mkdir(parents=True, exist_ok=True)
    _take_away(without)
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        _note_saves(diary / SAVED)
    strikes = harm is not None and rank == harm.rank
    disk = _Disk(root, diary) if harm is not None and harm.power else None
    _watch_files(root, diary / EVENTS if rank == 0 else None, _striker(harm) if strikes else None, disk)
    if strikes and harm.seconds is not None:
        _end_after(harm.seconds, harm.signal)
    if harm is not None and harm.nan_steps:
        _spoil(harm.nan_steps)


def events(diary: Path) -> list[str]:
    """The file operations of a run, in order, as "what path"."""
    file = diary / EVENTS
    return file.read_text().splitlines() if file.exists() else []


def saved_step(diary: Path) -> int:
    """The newest step whose save had returned."""
    file = diary / SAVED
    return int(file.read_text().splitlines()[-1]) if file.exists() else 0


def _striker(harm: Harm) -> Callable[[int], None] | None:
    if harm.event is None:
        return None

    def strike(number: int) -> None:
        if number == harm.event:
            if harm.delay:
                _end_after(harm.delay, harm.signal)
            else:
                os.kill(os.getpid(), harm.signal)

    return strike


def _end_after(seconds: float, number: int) -> None:
    def end() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    threading.Thread(target=end, daemon=True).start()


def _note_saves(file: Path) -> None:
    from alignkit.training import checkpoints

    save = checkpoints.save

    def noted(engine, folder, step, *rest):
        save(engine, folder, step, *rest)
        with file.open("a") as stream:
            stream.write(f"{step}\n")

    checkpoints.save = noted


def _watch_files(root: Path, log: Path | None, strike: Callable | None, disk: "_Disk | None") -> None:
    import safetensors.torch
    import torch

    count, lock, inside = 0, threading.RLock(), threading.local()
    stream = log.open("a") if log else None
    prefix = f"{root}{os.sep}"

    def happened(what: str, path: object) -> None:
        nonlocal count
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        path = path if os.path.isabs(path) else os.path.abspath(path)
        if not path.startswith(prefix) or getattr(inside, "it", False):
            return
        inside.it = True
        try:
            with lock:
                if stream:
                    stream.write(f"{what} {path.removeprefix(prefix)}\n")
                    stream.flush()
                number, count = count, count + 1
            if strike:
                strike(number)
        finally:
            inside.it = False

    def hook(name: str, arguments: tuple) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                happened("open", path)
        elif name == "os.rename":
            happened("rename", arguments[1])
        elif name in ("os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            happened(name, arguments[0])

    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if disk and path.startswith(prefix):
            disk.flushed(path)
        happened("flush", path)

    def writing(module, name: str, place: int) -> None:
        write = getattr(module, name)

        def watched(*arguments, **more):
            happened("begin", arguments[place])
            result = write(*arguments, **more)
            happened("end", arguments[place])
            return result

        setattr(module, name, watched)

    if os.fsync.__name__ != "nothing":
        os.fsync = watched_fsync
    writing(torch, "save", 1)
    writing(safetensors.torch, "save_file", 1)
    for module in ("alignkit.training.masters", "alignkit.training.state"):
        sys.modules[module].save_file = safetensors.torch.save_file
    sys.addaudithook(hook)


def _spoil(steps: tuple[int, ...]) -> None:
    from alignkit.training.run import Run

    visited, forward = Run.states, Run._forward_backward
    at = [0]

    def numbered(run, micro, number):
        at[0] = number + 1
        return forward(run, micro, number)

    def spoilt(run, batch, epochs):
        states = visited(run, batch, epochs)
        if at[0] in steps:
            batch.winner[0].fill_(float("nan"))
        return states

    Run._forward_backward, Run.states = numbered, spoilt


class _Disk:
    """What is certain to be on the disk under `root`: of each file what was in it when it was last flushed, and the
    names that there were at the last flush of anything."""

    def __init__(self, root: Path, diary: Path):
        self.root, self.contents, self.listing = root, diary / CONTENTS, diary / LISTING
        self.contents.mkdir()
        for file in _files(root):
            shutil.copyfile(file, self.contents / str(file.stat().st_ino))
        self._list()

    def flushed(self, path: str) -> None:
        if os.path.isfile(path):
            partial = self.contents / "partial"
            shutil.copyfile(path, partial)
            os.replace(partial, self.contents / str(os.stat(path).st_ino))
        self._list()

    def _list(self) -> None:
        names = {str(file.relative_to(self.root)): file.stat().st_ino for file in _files(self.root)}
        self.listing.with_suffix(".new").write_text(json.dumps(names))
        os.replace(self.listing.with_suffix(".new"), self.listing)


def cut_power(root: Path, diary: Path, names_lost: bool) -> None:
    """Leave of `root`, which a process of `Harm.power` wrote, what a disk would hold after a cut.

    What was not flushed is empty, as on a file system that writes names before contents; or, with `names_lost`, all
    that happened to names since the last flush of anything is undone.
    """
    names = {str(file.relative_to(root)): file.stat().st_ino for file in _files(root)}
    if names_lost:
        names = json.loads((diary / LISTING).read_text())
    contents = {file.name: file.read_bytes() for file in (diary / CONTENTS).iterdir()}
    folders = [folder for folder in root.rglob("*") if folder.is_dir()]
    for file in _files(root):
        file.unlink()
    for name, inode in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents.get(str(inode), b""))
    if names_lost:
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):  # still in use
                folder.rmdir()


def _files(root: Path) -> list[Path]:
    found = []
    for folder, _, names in os.walk(root):
        found += [Path(folder, name) for name in names]
    return [file for file in found if file.is_file() and not file.is_symlink()]


def _take_away(guards: tuple[str, ...]) -> None:
    """What keeps a run's data safe, made void: to see that the campaign notices."""
    for guard in guards:
        {"fsync": _no_fsync, "rename": _no_rename, "lock": _no_lock, "hash": _no_hash}[guard]()


def _no_fsync() -> None:
    def nothing(descriptor: int) -> None:
        pass

    os.fsync = nothing


def _no_rename() -> None:
    """Files are written in their places, piece by piece."""

    def in_place(source, target, **_) -> None:
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
            for name in sorted(os.listdir(source)):
                in_place(os.path.join(source, name), os.path.join(target, name))
            os.rmdir(source)
            return
        content = Path(source).read_bytes()
        for part in (content[: len(content) // 2], content):
            with open(target, "wb") as stream:
                stream.write(part)
        os.unlink(source)

    os.rename = os.replace = in_place


def _no_lock() -> None:
    from alignkit import sharing

    sharing.fcntl.flock = lambda *_: None
    sharing.fcntl.lockf = lambda *_: None


def _no_hash() -> None:
    from alignkit.stores import pairs, rollouts, store
    from alignkit.training import manifest as manifests

    manifests.file_hash = lambda file: "not looked at"
    manifests.digest = lambda manifest: manifest.get(manifests.DIGEST)
    for module in (store, pairs, rollouts):
        module.check_row = lambda *_: None


def described(harm: Harm) -> str:
    """For the table: what is not as by default."""
    told = {name: value for name, value in asdict(harm).items() if value != getattr(Harm, name)}
    if "signal" in told:
        told["signal"] = signal.Signals(told["signal"]).name
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in told.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
