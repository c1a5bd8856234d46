"""Which of the found videos can be used: each is decoded once, on all cores, and the result remembered."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import PIL

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.media.finding import Clip
from alignkit.media.videos import VideoSpec, decode_clip, picture_digest
from alignkit.moment import may_pass
from alignkit.progress import progress
from alignkit.remembered import memory, name_of


def usable_clips(
    clips: list[Clip], folder: Path, spec: VideoSpec, *, show: bool = True
) -> tuple[list[tuple[Clip, str]], list[Problem]]:
    """Decode every clip of `folder` as `spec` asks: the good ones, each with a digest of its pictures, and the others'
    problems.

    Left out are what `decode_clip` refuses and clips that decode to the very pictures of one before (the same video
    in another container). What was found of a file is remembered by its place, size and dates, so that a broken-off
    check goes on where it was and another build need not decode everything again.
    """
    keys = [name_of(clip.path) for clip in clips]
    asked = [str(folder.absolute()), asdict(spec), decoders()]
    with memory("videos", asked, Path(__file__).parent.glob("*.py")) as known:
        unknown = [(clip, key) for clip, key in zip(clips, keys, strict=True) if key not in known]
        found = {key: known[key] for key in keys if key in known}
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
            progress("checking videos", len(clips), done=len(clips) - len(unknown), show=show) as bar,
        ):
            looked_at = threads.map(lambda task: _look_at(task[0], spec), unknown)
            for (_, key), (result, lasting) in zip(unknown, looked_at, strict=True):
                found[key] = result
                if lasting:
                    known.note(key, result)
                bar.advance()
    good: list[tuple[Clip, str]] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for clip, key in zip(clips, keys, strict=True):
        digest, reason = found[key]
        if digest in seen:
            reason = f"the same pictures as {seen[digest]}"
        if reason:
            problems.append(Problem(clip.name, reason))
        else:
            assert digest is not None
            seen[digest] = clip.name
            good.append((clip, digest))
    return good, problems


def decoders() -> list[Any]:
    """The versions of what pictures, and what is wrong with a file, depend on."""
    return [av.library_versions, PIL.__version__]


def _look_at(clip: Clip, spec: VideoSpec) -> tuple[tuple[str | None, str | None], bool]:
    """(digest of the pictures, None) or (None, what is wrong), and whether that lasts while the file stays as it is."""
    try:
        frames = decode_clip(clip.path, spec)
    except DataError as error:
        return (None, str(error).removeprefix(f"{clip.path}: ")), not may_pass(error)
    return (picture_digest(frames), None), True
