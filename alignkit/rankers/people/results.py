"""What people's votes say: who is better and how sure that is, and how far the raters agree."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.rankers.asking import digests_of
from alignkit.rankers.people.comparisons import Pair, read_comparisons
from alignkit.rankers.people.votes import SKIP, Vote, read_votes

NORMAL_95 = 1.959964  # the 0.975 quantile of the standard normal distribution
SHARE = {"a": 1.0, "tie": 0.5, "b": 0.0}


def answers(folder: Path) -> dict[str, float]:
    """P(a is better) by comparison id, (votes for a + ties / 2) / votes; without those that nobody has answered.

    Raises DataError for a folder that cannot be read.
    """
    return {name: sum(shares) / len(shares) for name, shares in _shares(*_read(folder)).items() if shares}


def waiting(folder: Path, votes_wanted: int = 1) -> int:
    """How many votes are lacking until each comparison has so many; skips are no votes. Raises as `answers` does."""
    return sum(max(0, votes_wanted - len(shares)) for shares in _shares(*_read(folder)).values())


def summary(folder: Path) -> list[str]:
    """The lines of `alignkit rank results`. Raises DataError as `answers` does."""
    pairs, votes = _read(folder)
    everything = len(read_votes(folder))
    given = [vote for vote in votes if vote.answer != SKIP]
    answered = {vote.comparison for vote in given}
    skips = len(votes) - len(given)
    lines = [
        f"{len(answered)} of {len(pairs)} comparisons answered: {_count(len(given), 'vote')}, "
        f"{_count(sum(vote.answer == 'tie' for vote in given), 'tie')} among them, {_count(skips, 'skip')}, by "
        f"{_count(len({vote.rater for vote in votes}), 'rater')}"
    ]
    if everything > len(votes):
        lines.append(f"{_count(everything - len(votes), 'vote')} not counted: about other videos than are there now")
    if given:
        lines += [*_win_lines(pairs, given), _agreement_line(given), _left_line(given)]
    return lines


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` votes, by Wilson's score."""
    z = NORMAL_95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Agreement on names (nominal): 1 is perfect, 0 what chance gives. A unit is what its raters said, in any order;
    who said nothing is left out.

    None where it is not defined: no unit with two raters, or all raters gave the same answer everywhere.
    """
    several = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in several for value in unit)
    count = sum(totals.values())
    observed = sum((len(unit) ** 2 - _sum_of_squares(unit)) / (len(unit) - 1) for unit in several)
    expected = count**2 - sum(number**2 for number in totals.values())
    return 1 - (count - 1) * observed / expected if expected else None


def _sum_of_squares(unit: Sequence[str]) -> int:
    return sum(number**2 for number in Counter(unit).values())


def _read(folder: Path) -> tuple[list[Pair], list[Vote]]:
    """The comparisons, and the votes on the very videos that are there now."""
    pairs = read_comparisons(folder)
    digests = digests_of(pairs)
    return pairs, [vote for vote in read_votes(folder) if digests.get(vote.comparison) == vote.digest]


def _shares(pairs: list[Pair], votes: list[Vote]) -> dict[str, list[float]]:
    shares: dict[str, list[float]] = {pair.id: [] for pair in pairs}
    for vote in votes:
        if vote.answer != SKIP:
            shares[vote.comparison].append(SHARE[vote.answer])
    return shares


def _win_lines(pairs: list[Pair], given: list[Vote]) -> list[str]:
    kinds: dict[str, Any] = {pair.id: (pair.kind_a, pair.kind_b) for pair in pairs if pair.kind_a != pair.kind_b}
    shares: Mapping[tuple[str, str], list[float]] = defaultdict(list)
    for vote in given:
        if vote.comparison in kinds:
            a, b = kinds[vote.comparison]
            share = SHARE[vote.answer]
            shares[min(a, b), max(a, b)].append(share if a < b else 1 - share)
    lines = []
    for (first, second), found in sorted(shares.items()):
        rate = sum(found) / len(found)
        low, high = wilson(rate, len(found))
        lines.append(
            f"{first} against {second}: better in {rate:.1%} of {_count(len(found), 'vote')}, 95 % interval "
            f"{low:.1%} to {high:.1%} ({found.count(1.0)} better, {found.count(0.5)} tied, {found.count(0.0)} worse)"
        )
    if lines:
        lines.append("a tie counts half to each; Wilson's interval, which takes the votes as independent of each other")
    return lines


def _agreement_line(given: list[Vote]) -> str:
    units = defaultdict(list)
    for vote in given:
        units[vote.comparison].append(vote.answer)
    several = sum(len(unit) > 1 for unit in units.values())
    if not several:
        return "agreement between raters: not known, no comparison was answered by two"
    alpha = krippendorff_alpha(units.values())
    said = "not defined, they all gave one and the same answer" if alpha is None else f"{alpha:.2f}"
    return (
        f"agreement between raters: Krippendorff's alpha {said} (nominal; {_count(several, 'comparison')} answered by "
        "two or more; 1 is perfect, 0 is chance)"
    )


def _left_line(given: list[Vote]) -> str:
    decided = [vote for vote in given if vote.answer != "tie"]
    if not decided:
        return "left against right: every vote is a tie"
    rate = sum(vote.answer == vote.left for vote in decided) / len(decided)
    low, high = wilson(rate, len(decided))
    return f"the video on the left was chosen in {rate:.1%} of votes, 95 % interval {low:.1%} to {high:.1%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
