"""Which of the found videos can be used: each is decoded once, on all cores, and the result remembered."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.media.finding import Clip
from alignkit.media.videos import VideoSpec, decode_clip, picture_digest
from alignkit.progress import progress

PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""What a machine or a network disk may say today and not tomorrow."""


def usable_clips(
    clips: list[Clip], spec: VideoSpec, known: Path, *, show: bool = True
) -> tuple[list[tuple[Clip, str]], list[Problem]]:
    """Decode every clip as `spec` asks: the good ones, each with a digest of its pictures, and the others' problems.

    Left out are what `decode_clip` refuses and clips that decode to the very pictures of one before (the same video
    in another container). `known` is a file that remembers what was found for a file of this size and date, so
    that a broken-off check goes on where it was and another build need not decode everything again.
    """
    memory = _read_memory(known)
    keys = [_key(clip, spec) for clip in clips]
    unknown = [(clip, key) for clip, key in zip(clips, keys, strict=True) if key not in memory]
    known.parent.mkdir(parents=True, exist_ok=True)
    with (
        known.open("a", buffering=1) as stream,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        progress("checking videos", len(clips), done=len(clips) - len(unknown), show=show) as bar,
    ):
        looked_at = threads.map(lambda task: _look_at(task[0], spec), unknown)
        for (_, key), (found, lasting) in zip(unknown, looked_at, strict=True):
            memory[key] = found
            if lasting:
                stream.write(json.dumps([key, found]) + "\n")
            bar.advance()
    good: list[tuple[Clip, str]] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for clip, key in zip(clips, keys, strict=True):
        digest, reason = memory[key]
        if digest in seen:
            reason = f"the same pictures as {seen[digest]}"
        if reason:
            problems.append(Problem(clip.name, reason))
        else:
            assert digest is not None
            seen[digest] = clip.name
            good.append((clip, digest))
    return good, problems


def _look_at(clip: Clip, spec: VideoSpec) -> tuple[tuple[str | None, str | None], bool]:
    """(digest of the pictures, None) or (None, what is wrong), and whether that is the file's and not the moment's."""
    try:
        frames = decode_clip(clip.path, spec)
    except DataError as error:
        cause = error.__cause__
        passing = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in PASSING)
        return (None, str(error).removeprefix(f"{clip.path}: ")), not passing
    return (picture_digest(frames), None), True


def _key(clip: Clip, spec: VideoSpec) -> str:
    file = clip.path.stat()
    return json.dumps([clip.name, file.st_size, file.st_mtime_ns, *asdict(spec).values()])


def _read_memory(file: Path) -> dict[str, tuple[str | None, str | None]]:
    """Lines that were cut off when a check was killed are passed over."""
    memory = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            key, (digest, reason) = json.loads(line)
        except (ValueError, TypeError):
            continue
        memory[key] = (digest, reason)
    return memory
