"""From answers about pairs to the best and the worst of K videos of one prompt."""

from collections.abc import Mapping, Sequence
from typing import Literal

Keep = Literal["best_worst", "all"]


def copeland(videos: Sequence[int], answers: Mapping[tuple[int, int], float], min_margin: float) -> dict[int, int]:
    """Copeland's count (1951) of each video: comparisons won minus comparisons lost, over all pairs.

    answers: P(a is better) of each pair (a, b), in either order. Where |P(a) − P(b)| is less than min_margin neither
    has won.
    """
    counts = dict.fromkeys(videos, 0)
    for (a, b), answer in answers.items():
        if _clear(answer, min_margin):
            counts[a if answer > 0.5 else b] += 1
            counts[b if answer > 0.5 else a] -= 1
    return counts


def pick(
    videos: Sequence[int], answers: Mapping[tuple[int, int], float], min_margin: float, keep: Keep
) -> tuple[list[tuple[int, int]], int]:
    """(better, worse) pairs of the videos to train on, and how many were dropped as ties.

    best_worst: the highest of Copeland's counts against the lowest; of equal counts the one with the higher sum of
    probabilities is the better, then the one that stands first. Dropped where all counts are equal, or where the two
    compared with each other are a tie or the other way round. all: every pair that is no tie.
    """
    if keep == "all":
        found = [(a, b) if answer > 0.5 else (b, a) for (a, b), answer in answers.items() if _clear(answer, min_margin)]
        return found, len(answers) - len(found)
    counts, sums = copeland(videos, answers, min_margin), dict.fromkeys(videos, 0.0)
    for (a, b), answer in answers.items():
        sums[a] += answer
        sums[b] += 1 - answer
    order = sorted(videos, key=lambda video: (-counts[video], -sums[video]))
    best, worst = order[0], order[-1]
    answer = answers[best, worst] if (best, worst) in answers else 1 - answers[worst, best]
    if counts[best] == counts[worst] or answer < 0.5 or not _clear(answer, min_margin):
        return [], 1
    return [(best, worst)], 0


def _clear(answer: float, min_margin: float) -> bool:
    margin = abs(answer - (1 - answer))
    return margin > 0 and margin >= min_margin
