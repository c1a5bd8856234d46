"""Rankers that need nobody: measurements of each video, turned into P(a is better)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignkit.errors import DataError
from alignkit.evaluation.drawn import thumbnails
from alignkit.evaluation.measures import motion_amount, temporal_flicker
from alignkit.media.videos import read_video
from alignkit.rankers.protocol import Comparison
from alignkit.tiny.classifier import attributes_in, log_probability
from alignkit.tiny.detector import fault_scores

Scores = Callable[[list[str], list[Path]], Sequence[float]]
"""(prompts, video files) to a number for each, the higher the better."""
BATCH = 32  # videos in memory at once
SMALLEST = 1e-6  # levels; a still picture has none


class ByScore:
    """P(a is better) = 1 / (1 + exp(−(score_a − score_b))), Bradley and Terry's model; each video is scored once."""

    at_once = 1

    def __init__(self, who: str, scores: Scores):
        self.who, self._scores = who, scores
        self._known: dict[tuple[str, Path], float] = {}

    async def prepare(self, comparisons: Sequence[Comparison]) -> None:
        videos = dict.fromkeys((c.prompt, video) for c in comparisons for video in (c.video_a, c.video_b))
        self._score(list(videos))

    async def compare(self, prompt: str, video_a: Path, video_b: Path) -> float:
        self._score([(prompt, video_a), (prompt, video_b)])
        return 0.5 * (1 + math.tanh((self._known[prompt, video_a] - self._known[prompt, video_b]) / 2))

    def _score(self, videos: list[tuple[str, Path]]) -> None:
        new = [video for video in videos if video not in self._known]
        if not new:
            return
        scores = self._scores([prompt for prompt, _ in new], [file for _, file in new])
        for (prompt, file), score in zip(new, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(f"{self.who}: scored {file} as {score}; look at that video, or leave its prompt out")
            self._known[prompt, file] = float(score)


def _by_frames(score: Callable[[list[str], Tensor], np.ndarray | Tensor]) -> Scores:
    """Scores of files from scores of clips uint8 [B, F, H, W, 3] of one size."""

    def scores(prompts: list[str], files: list[Path]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(files), BATCH):
            clips = [read_video(file) for file in files[first : first + BATCH]]
            if len({clip.shape for clip in clips}) > 1:
                raise DataError(f"{files[first].parent}: its videos are of several sizes; rank those of one size")
            found += map(float, score(prompts[first : first + BATCH], torch.stack(clips)))
        return found

    return scores


def small_world_score(prompts: Sequence[str], frames: Tensor) -> np.ndarray:
    """log P(shape, colour and direction as prompted) + log P(no fault) of clips uint8 [B, F, H, W, 3], float64 [B], by
    networks that are not the judges'. Raises DataError for a prompt that no drawn clip has."""
    wanted = [attributes_in(prompt) for prompt in prompts]
    known = [attributes for attributes in wanted if attributes is not None]
    for prompt, attributes in zip(prompts, wanted, strict=True):
        if attributes is None:
            raise DataError(
                f"ranker.by=small_world: knows drawn clips only, not {prompt!r}; take people, endpoint or a function"
            )
    clips = thumbnails(frames)
    return log_probability(clips, known, "ranker") + np.log1p(-np.minimum(fault_scores(clips, "ranker"), 1 - 1e-9))


def motion(prompts: list[str], frames: Tensor) -> Tensor:
    """log of the mean change from frame to frame: P(a is better) is a's share of the two motions."""
    return motion_amount(frames).clamp_min(SMALLEST).log()


def steadiness(prompts: list[str], frames: Tensor) -> Tensor:
    """−log of the flicker: P(a is better) is b's share of the two."""
    return -temporal_flicker(frames).clamp_min(SMALLEST).log()


MEASURES = {
    "small_world": _by_frames(small_world_score),
    "motion": _by_frames(motion),
    "flicker": _by_frames(steadiness),
}
"""By the name that `ranker.by` gives."""
