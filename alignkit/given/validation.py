"""Which preference rows can be trained on: every file is looked at before anything slow starts.

Two videos count as the same where they decode to the same pictures for the spec, whatever files they are in; a video
that was encoded anew has other pictures and is not found.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from alignkit.errors import DataError
from alignkit.given.preferences import Preference
from alignkit.media.captions import Problem
from alignkit.media.masks import mask_digest, mask_on_grid, read_mask
from alignkit.media.videos import TooShortError, VideoFacts, VideoSpec, decode_with_facts, picture_digest
from alignkit.moment import end_if_of_the_moment, may_pass
from alignkit.remembered import Memory, name_of

Kind = Literal[
    "missing", "damaged", "too_short",  # a file
    "frames", "size", "rate", "identical", "mask",  # a pair
    "duplicate", "contradiction", "leaked_video", "leaked_prompt",  # a pair beside the others
]  # fmt: skip

# Containers round timestamps to a millisecond, and a film's 23.976 and 24 frames a second show no difference in the
# few seconds of a clip.
RATE_TOLERANCE = 0.01


class NothingLeftError(DataError):
    """No row can be used; `problems` says what is wrong with each."""

    def __init__(self, message: str, problems: list[Problem]):
        super().__init__(message)
        self.problems = problems


@dataclass(frozen=True)
class Findings:
    """The rows that can be used, in their order; a Problem, with `video` its row and a `kind`, for all that is wrong
    with each of the others; and by the path of each video that can be decoded, what tells its pictures from others.
    """

    train: list[Preference]
    heldout: list[Preference]
    problems: list[Problem]
    keys: dict[Path, str]


def validate_preferences(
    preferences: list[Preference],
    spec: VideoSpec,
    *,
    grid: tuple[int, int, int] | None = None,
    heldout: list[Preference] | None = None,
    watch: Callable[[], None] = lambda: None,
    known: Memory | None = None,
) -> Findings:
    """Decode every video once and drop the rows that cannot be trained on, or held out, as `spec` asks.

    Dropped: rows with a video that is missing, damaged or too short; whose videos differ in their number of frames,
    their size as shown or their frame rate, or do not differ at all; whose mask `read_mask` refuses, or `mask_on_grid`
    for the latent `grid` (F, H, W) where that is given; that repeat an earlier row; that contradict another (the same
    videos the other way round: both go); and held-out rows with a video or a prompt that is trained on. Prompts are
    compared without regard to case. `watch` is called once a row. What is `known` of videos and masks, by their place,
    size and dates, is not looked at again, and what is found of others is noted there.

    Raises NothingLeftError, a DataError, if no row is left, or none of `heldout` where that is given.
    """
    videos: dict[Path, _Video | _Fault] = {}
    wrong, wrong_heldout = (
        _unsound(rows, spec, grid, videos, watch, known or Memory(None)) for rows in (preferences, heldout or [])
    )
    keys = {path: video.key for path, video in videos.items() if isinstance(video, _Video)}
    train, held = _without(preferences, wrong), _without(heldout or [], wrong_heldout)
    wrong += _repeated(train, keys)
    wrong_heldout += _repeated(held, keys)
    train = _without(train, wrong)
    wrong_heldout += _leaked(_without(held, wrong_heldout), train, keys)
    held = _without(held, wrong_heldout)
    _require(train, wrong, "train on")
    if heldout is not None:
        _require(held, wrong_heldout, "hold out")
    return Findings(train, held, wrong + wrong_heldout, keys)


def split_preferences(
    preferences: list[Preference], keys: dict[Path, str], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """(train, heldout), drawn by `seed`: about `share` of the rows held out, and at least one row on each side.

    keys: `Findings.keys`. Rows that share a video or a prompt, directly or by way of others, stay together, so
    fewer rows are held out where groups are large, or one group of more where all of them are.

    Raises DataError if all rows hang together.
    """
    groups = _groups(preferences, keys)
    if len(groups) < 2:
        raise DataError(
            f"the {len(preferences)} usable pairs hang together by the videos or prompts they share, so none can be "
            "held out that is not trained on; name other pairs in data.heldout_pairs"
        )
    wanted = min(max(1, round(len(preferences) * share)), len(preferences) - 1)
    order = [groups[n] for n in np.random.default_rng([seed, 0x5911]).permutation(len(groups))]
    held: list[Preference] = []
    for group in order:
        if len(held) + len(group) <= wanted:
            held += group
    held = held or min(order, key=len)
    places = {row.where for row in held}
    return [row for row in preferences if row.where not in places], [row for row in preferences if row.where in places]


def _groups(rows: list[Preference], keys: dict[Path, str]) -> list[list[Preference]]:
    """Union-find over prompts and videos; groups are in the order of their first rows."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(item: tuple[str, str]) -> tuple[str, str]:
        while (above := parent.setdefault(item, item)) != item:
            parent[item] = parent[above]
            item = above
        return item

    for row in rows:
        for video in _videos(row):
            parent[root(("video", keys[video]))] = root(("prompt", _prompt(row)))
    groups: dict[tuple[str, str], list[Preference]] = {}
    for row in rows:
        groups.setdefault(root(("prompt", _prompt(row))), []).append(row)
    return list(groups.values())


def _videos(row: Preference) -> tuple[Path, Path]:
    return row.chosen, row.rejected


def _prompt(row: Preference) -> str:
    return row.prompt.casefold()


def _without(rows: list[Preference], problems: list[Problem]) -> list[Preference]:
    bad = {problem.video for problem in problems}
    return [row for row in rows if row.where not in bad]


def _require(rows: list[Preference], problems: list[Problem], use: str) -> None:
    if not rows:
        first = f": {problems[0].video}: {problems[0].reason}" if problems else ""
        more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise NothingLeftError(f"no pair is left to {use}{first}{more}", problems)


# --- files and pairs by themselves --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Video:
    facts: VideoFacts
    key: str


@dataclass(frozen=True)
class _Fault:
    kind: Kind
    reason: str


def _unsound(
    rows: list[Preference],
    spec: VideoSpec,
    grid: tuple[int, int, int] | None,
    videos: dict[Path, _Video | _Fault],
    watch: Callable[[], None],
    known: Memory,
) -> list[Problem]:
    """What is wrong with single rows. Adds to `videos` those that are not there yet."""
    unknown = [path for path in dict.fromkeys(p for row in rows for p in _videos(row)) if path not in videos]
    problems = []
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        looked_at = zip(unknown, threads.map(lambda path: _look_at(path, spec, known), unknown), strict=True)
        for row in rows:
            while not videos.keys() >= set(_videos(row)):
                path, found = next(looked_at)
                videos[path] = found
            watch()
        for row, faults in zip(
            rows, threads.map(lambda row: _faults(row, videos, spec, grid, known), rows), strict=True
        ):
            problems += [Problem(row.where, fault.reason, fault.kind) for fault in faults]
    finally:
        threads.shutdown(cancel_futures=True)
    return problems


def _look_at(path: Path, spec: VideoSpec, known: Memory) -> _Video | _Fault:
    name = name_of(path) if os.path.exists(path) else ""
    if name and name in known:
        kind, found, told = known[name]
        if kind:
            return _Fault(kind, found)
        return _Video(VideoFacts(**told | {"path": path, "chosen": tuple(told["chosen"])}), found)
    try:
        frames, facts = decode_with_facts(path, spec)
    except DataError as error:
        bad: Kind = "damaged" if name else "missing"
        fault = _Fault("too_short" if isinstance(error, TooShortError) else bad, str(error))
        if name and not may_pass(error):
            known.note(name, [fault.kind, fault.reason, {}])
        return fault
    video = _Video(facts, picture_digest(frames))
    if name:
        known.note(name, ["", video.key, asdict(facts) | {"path": None}])
    return video


def _faults(
    row: Preference,
    videos: dict[Path, _Video | _Fault],
    spec: VideoSpec,
    grid: tuple[int, int, int] | None,
    known: Memory,
) -> list[_Fault]:
    sides = [videos[path] for path in dict.fromkeys(_videos(row))]
    return [side for side in sides if isinstance(side, _Fault)] or list(_differences(row, videos, spec, grid, known))


def _differences(
    row: Preference,
    videos: dict[Path, _Video | _Fault],
    spec: VideoSpec,
    grid: tuple[int, int, int] | None,
    known: Memory,
) -> Iterator[_Fault]:
    """What is wrong with a pair of videos each of which is good."""
    chosen, rejected = videos[row.chosen], videos[row.rejected]
    assert isinstance(chosen, _Video) and isinstance(rejected, _Video)
    a, b = chosen.facts, rejected.facts
    if a.frames != b.frames:
        yield _Fault("frames", f"{row.chosen} has {a.frames} frames, {row.rejected} has {b.frames}")
    shown = [f"{facts.height}x{round(facts.width * facts.stretch)}" for facts in (a, b)]
    if shown[0] != shown[1]:
        yield _Fault("size", f"{row.chosen} is {shown[0]} (height x width), {row.rejected} is {shown[1]}")
    if not math.isclose(a.rate, b.rate, rel_tol=RATE_TOLERANCE):
        rates = f"{row.chosen} has {a.rate:.4g} frames a second, {row.rejected} has {b.rate:.4g}"
        yield _Fault("rate", rates)
    if chosen.key == rejected.key:
        yield _Fault("identical", f"{row.chosen} and {row.rejected} show the same")
    if row.mask is not None:
        reason = _fault_of_mask(row.mask, a, spec, grid, known)
        if reason:
            yield _Fault("mask", reason)


def _fault_of_mask(
    file: Path, video: VideoFacts, spec: VideoSpec, grid: tuple[int, int, int] | None, known: Memory
) -> str | None:
    try:
        digest = mask_digest(file) if os.path.exists(file) else ""
        name = json.dumps([str(file), digest, name_of(video.path), grid])
        if name not in known:
            mask = read_mask(file, video, spec)
            if grid is not None:
                mask_on_grid(mask, grid)
            known.note(name, None)
        return None
    except (DataError, OSError) as error:
        if isinstance(error, OSError):
            end_if_of_the_moment(file, error)
        reason = str(error)
        return reason if reason.startswith(str(file)) else f"{file}: {reason}"


# --- rows beside one another --------------------------------------------------------------------------------


def _repeated(rows: list[Preference], keys: dict[Path, str]) -> Iterator[Problem]:
    """Rows that say what an earlier one says, and all that take part in a contradiction."""
    same: dict[tuple[str, frozenset[str]], list[Preference]] = {}
    for row in rows:
        same.setdefault((_prompt(row), frozenset(keys[path] for path in _videos(row))), []).append(row)
    for group in same.values():
        first = group[0]
        against = [row for row in group if keys[row.chosen] != keys[first.chosen]]
        for row in group if against else group[1:]:
            if against:
                other = first if row in against else against[0]
                reason = (
                    f"prefers {row.chosen} to {row.rejected}, {other.where} the other way round for the same prompt"
                )
                yield Problem(row.where, reason, "contradiction")
            else:
                reason = f"{first.where} has the same prompt and videos ({row.chosen}, {row.rejected})"
                yield Problem(row.where, reason, "duplicate")


def _leaked(heldout: list[Preference], train: Iterable[Preference], keys: dict[Path, str]) -> Iterator[Problem]:
    prompts: dict[str, str] = {}
    videos: dict[str, str] = {}
    for row in train:
        prompts.setdefault(_prompt(row), row.where)
        for path in _videos(row):
            videos.setdefault(keys[path], row.where)
    for row in heldout:
        for path in _videos(row):
            if keys[path] in videos:
                yield Problem(row.where, f"{path} is trained on too ({videos[keys[path]]})", "leaked_video")
        if _prompt(row) in prompts:
            reason = f"its prompt {row.prompt!r:.60} is trained on too ({prompts[_prompt(row)]})"
            yield Problem(row.where, reason, "leaked_prompt")
