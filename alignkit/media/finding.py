"""Finds the clips of a folder of the user's videos, each with its caption."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import DataError
from alignkit.media.captions import CAPTION_FILES, NOTE, Caption, Problem, caption_beside, read_captions
from alignkit.media.names import VIDEO_SUFFIXES, composed
from alignkit.media.rows import is_unicode


@dataclass(frozen=True)
class Clip:
    """A video file with its caption; `name` is its path inside the folder, unique there."""

    path: Path
    name: str
    caption: str


def find_clips(folder: str | Path, captions: str | Path | None = None) -> tuple[list[Clip], list[Problem]]:
    """The captioned videos of a folder and its subfolders, sorted by name, and what was left out and why.

    Captions come from the file `captions`, else from the first of captions.jsonl, captions.csv,
    metadata.jsonl, metadata.csv in the folder; a video that has none there may have a .txt file beside it.
    Names in the captions file are paths inside the folder; a bare file name will do where it is unambiguous.
    Hidden files are passed over. Left out, with a Problem each: folders that may not be looked into, videos without a
    caption or with an empty one, captions without a video, lines that cannot be read or say two things, all but the
    first of files with equal bytes, and (one for all) further files of captions.

    Raises DataError if the folder or the captions file is missing, or nothing usable is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"video folder {folder} does not exist or is not a folder")
    videos, problems = _video_files(folder)
    if not videos:
        why = f" ({problems[0].video}: {problems[0].reason})" if problems else ""
        raise DataError(f"no videos in {folder} (looked for {', '.join(s[1:] for s in VIDEO_SUFFIXES)}){why}")

    file = _captions_file(folder, captions)
    listed, unread = read_captions(file) if file else ({}, [])
    problems += unread
    others = [name for name in CAPTION_FILES if file and name != file.name and (folder / name).is_file()]
    if file and others and captions is None:
        problems.append(
            Problem(", ".join(others), f"not read: {file.name} is; keep one, or name it in data.captions", NOTE)
        )
    by_video, missing = _match(listed, videos)
    problems += missing

    clips: list[Clip] = []
    for name, path in videos.items():
        if not is_unicode(name):
            problems.append(
                Problem(name.encode(errors="backslashreplace").decode(), "rename it: its name is no Unicode")
            )
            continue
        try:
            caption = by_video.get(name) or caption_beside(path)
        except DataError as error:
            problems.append(Problem(name, str(error)))
            continue
        if caption is None:
            problems.append(Problem(name, "no caption"))
        elif not caption.text:
            problems.append(Problem(name, f"its caption is empty ({caption.where})"))
        else:
            clips.append(Clip(path, name, caption.text))
    if not clips and not by_video and not any(p.with_suffix(".txt").is_file() for p in videos.values()):
        raise DataError(
            f"no captions for the {len(videos)} videos in {folder}: write captions.jsonl there with a line "
            '{"video": "name.mp4", "caption": "…"} for each, or a .txt file beside each'
            + (f" ({problems[0].video}: {problems[0].reason})" if file and problems else "")
        )
    clips, duplicates = _without_duplicates(clips)
    problems += duplicates
    if not clips:
        raise DataError(
            f"no usable video in {folder}: {problems[0].video}: {problems[0].reason}"
            + (f", and {len(problems) - 1} more problems" if len(problems) > 1 else "")
        )
    return clips, sorted(problems, key=lambda problem: problem.video)


def _video_files(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    found: dict[str, Path] = {}
    closed: list[Problem] = []

    def note(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error
        closed.append(
            Problem(Path(error.filename).relative_to(folder).as_posix(), "you may not look into this folder", NOTE)
        )

    visited: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(root, name)
            if not name.startswith(".") and path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items())), closed


def _captions_file(folder: Path, captions: str | Path | None) -> Path | None:
    if captions is None:
        return next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    for file in (Path(captions), folder / captions):
        if file.is_file():
            return file
    raise DataError(f"captions file {captions} does not exist")


def _match(listed: dict[str, Caption], videos: dict[str, Path]) -> tuple[dict[str, Caption], list[Problem]]:
    """Captions by the videos' names, and a Problem for each caption that belongs to no video."""
    bare: dict[str, list[str]] = {}
    for name in videos:
        bare.setdefault(composed(Path(name).name), []).append(name)
    spelt: dict[str, list[str]] = {}
    for name in videos:
        spelt.setdefault(composed(name), []).append(name)
    absolute = {path.absolute().as_posix(): name for name, path in videos.items()}
    matched: dict[str, Caption] = {}
    problems: list[Problem] = []
    for video, caption in listed.items():
        ways = (video, video.strip(), os.path.expanduser(video.strip()))
        found = next((absolute.get(way, way) for way in ways if way in videos or way in absolute), None)
        if found is None:
            wanted = composed(video.strip())
            candidates = spelt.get(wanted) or ([] if "/" in wanted else bare.get(wanted, []))
            if len(candidates) > 1:
                problems.append(Problem(video, f"{caption.where} could mean any of {', '.join(candidates)}"))
                continue
            found = candidates[0] if candidates else None
        if found is None:
            reason = f"{caption.where} has a caption for it, but there is no such video"
            problems.append(Problem(video, reason))
        elif found in matched:
            reason = f"second caption at {caption.where}; {matched[found].where} is kept"
            problems.append(Problem(found, reason))
        else:
            matched[found] = caption
    return matched, problems


def _without_duplicates(clips: list[Clip]) -> tuple[list[Clip], list[Problem]]:
    by_size: dict[int, list[Clip]] = {}
    for clip in clips:
        by_size.setdefault(clip.path.stat().st_size, []).append(clip)
    kept, problems = [], []
    seen: dict[bytes, str] = {}
    for clip in clips:
        if len(by_size[clip.path.stat().st_size]) > 1:
            with clip.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if digest in seen:
                problems.append(Problem(clip.name, f"the same file as {seen[digest]}, byte for byte"))
                continue
            seen[digest] = clip.name
        kept.append(clip)
    return kept, problems
