"""The videos that LocalDPO's pairs are made from: which can be used, their masks, and which are held out."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignkit.config import Config
from alignkit.config.places import NO_VIDEOS
from alignkit.errors import DataError
from alignkit.media.captions import NOTE, Problem
from alignkit.media.finding import Clip, find_clips
from alignkit.media.masks import find_mask, mask_on_grid, read_mask
from alignkit.media.usable import usable_clips
from alignkit.stores.folders import latent_grid, video_spec


@dataclass(frozen=True)
class Source:
    """A clip that can be used, a digest of its pictures, and its mask's file where the user brings masks."""

    clip: Clip
    digest: str
    mask: Path | None = None


def find_usable(config: Config, show: bool = True) -> tuple[list[Source], list[Problem]]:
    """The clips of `data.videos` that decode to the wanted size and length, in name order, and what is wrong with
    the others. What was decoded before is remembered in the user's cache."""
    if config.data.videos is None:
        raise DataError(NO_VIDEOS)
    clips, problems = find_clips(config.data.videos, config.data.captions)
    good, refused = usable_clips(clips, config.data.videos, video_spec(config), show=show)
    if config.pairs.mask.files is None:
        return [Source(clip, digest) for clip, digest in good], problems + refused
    sources, without = _with_masks(good, config.pairs.mask.files)
    return sources, problems + refused + without


def _with_masks(clips: list[tuple[Clip, str]], folder: Path) -> tuple[list[Source], list[Problem]]:
    if not folder.is_dir():
        raise DataError(f"pairs.mask.files: {folder} does not exist or is not a folder")
    found, problems = [], []
    for clip, digest in clips:
        try:
            mask = find_mask(folder, clip.name, clip.path)
        except DataError as error:
            problems.append(Problem(clip.name, f"pairs.mask.files: {error}"))
            continue
        if mask is None:
            problems.append(Problem(clip.name, f"pairs.mask.files: no mask for it in {folder}"))
        else:
            found.append(Source(clip, digest, mask))
    uses = Counter(source.mask for source in found)
    for source in found:
        if uses[source.mask] > 1:
            reason = f"pairs.mask.files: {source.mask} is the mask of {uses[source.mask]} clips; rename one"
            problems.append(Problem(source.clip.name, reason))
    return [source for source in found if uses[source.mask] == 1], problems


def check_count(config: Config, sources: list[Source], problems: list[Problem]) -> None:
    """Raises DataError unless there is a clip for either split."""
    if len(sources) < 2:
        why = "; what is wrong with the others is said above" if problems else ""
        others = sum(problem.kind != NOTE for problem in problems)
        raise DataError(
            f"data.videos: {len(sources)} usable of {len(sources) + others} in {config.data.videos}, but one to "
            f"train on and one to hold out are needed (and 16 held out for a verdict){why}"
        )


def check_masks(config: Config, sources: list[Source]) -> list[Problem]:
    """What is wrong with the users' masks of `sources`, each read as building will read it."""
    spec = video_spec(config)
    problems: list[Problem] = []
    grid = latent_grid(config)

    def look_at(clip: Clip, mask: Path) -> None:
        try:
            mask_on_grid(read_mask(mask, clip.path, spec), grid)
        except DataError as error:
            problems.append(Problem(clip.name, str(error)))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        masked = [(source.clip, source.mask) for source in sources if source.mask]
        list(threads.map(lambda one: look_at(*one), masked))
    return sorted(problems, key=lambda problem: problem.video)


def split_clips(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, heldout) clip numbers, drawn by `seed`: at least one in each."""
    assert count >= 2
    heldout = min(max(1, round(count * share)), count - 1)
    order = np.random.default_rng([seed, 0x5911]).permutation(count)
    return sorted(order[heldout:].tolist()), sorted(order[:heldout].tolist())
