"""What every ranker is: asked about two videos of one prompt, it answers with the probability that the first is better.

Answers order videos and are never a reward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alignkit.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """Two videos of one prompt, as files. id: unique among those that are asked together."""

    id: str
    prompt: str
    video_a: Path
    video_b: Path


class Ranker(Protocol):
    """who: stored with every answer, names what would have to be the same for the same answer (no secrets).
    at_once: as many comparisons are asked for at the same time."""

    who: str
    at_once: int

    async def prepare(self, comparisons: Sequence[Comparison]) -> None:
        """Called once with what will be asked, before it is: for what is better done for many videos together."""

    async def compare(self, prompt: str, video_a: Path, video_b: Path) -> float:
        """P(video_a is better), in [0, 1]; 0.5 is a tie. Raises DataError where it cannot say."""


def checked_answer(answer: object, who: str, comparison: Comparison) -> float:
    """The answer as a number. Raises DataError for one that is no probability."""
    number = float(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else math.nan
    if not 0 <= number <= 1:
        raise DataError(
            f"{who}: answered {answer!r} about {comparison.video_a.name} and {comparison.video_b.name}; "
            "a ranker returns P(a is better), a number from 0 to 1"
        )
    return number
