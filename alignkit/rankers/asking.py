"""Asks a ranker about pairs of videos; every answer is on disk, with who gave it, before the next one is asked for.

Answers are found again by what was compared, the prompt and both files' bytes, so that a run which was stopped asks
nothing twice and answers about other videos are never taken for these.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit.errors import AlignkitError, DataError
from alignkit.progress import progress
from alignkit.rankers.protocol import Comparison, Ranker, checked_answer


class Stopped(AlignkitError):
    """The process was told to end before all was answered."""


def ask(
    ranker: Ranker,
    comparisons: Sequence[Comparison],
    file: Path,
    *,
    show: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """P(video_a is better) by comparison id, from `file` (JSON Lines) or from the ranker, at most `ranker.at_once`
    comparisons at a time.

    stop: looked at before each comparison. Raises Stopped where it says so, DataError for an answer that is no
    probability, for a damaged file, and as the ranker does; what was answered by then is kept.
    """
    known = read_answers(file)
    digests = digests_of(comparisons)
    found = {c.id: known[ranker.who, digests[c.id]] for c in comparisons if (ranker.who, digests[c.id]) in known}
    left = [c for c in comparisons if c.id not in found]
    if left:
        file.parent.mkdir(parents=True, exist_ok=True)
        _mend_end(file)
        with (
            file.open("a", encoding="utf-8") as stream,
            progress(f"asking {ranker.who}", len(comparisons), done=len(found), show=show) as bar,
        ):

            def keep(comparison: Comparison, answer: float) -> None:
                row = {"id": comparison.id, "who": ranker.who, "p": answer, "of": digests[comparison.id]}
                stream.write(json.dumps(row | {"at": round(time.time())}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
                found[comparison.id] = answer
                bar.advance()

            asyncio.run(_ask_all(ranker, left, keep, stop))
    if len(found) < len(comparisons):
        raise Stopped(f"stopped in a ranking, with {len(found)} of {len(comparisons)} answers")
    return {c.id: found[c.id] for c in comparisons}  # not as they came in: pairs get their numbers by it


async def _ask_all(
    ranker: Ranker, left: list[Comparison], keep: Callable[[Comparison, float], None], stop: Callable[[], bool]
) -> None:
    await ranker.prepare(left)
    waiting = iter(left)
    failed: list[Exception] = []

    async def work() -> None:
        for comparison in waiting:
            if failed or stop():
                return
            try:
                answer = await ranker.compare(comparison.prompt, comparison.video_a, comparison.video_b)
                keep(comparison, checked_answer(answer, ranker.who, comparison))
            except AlignkitError as error:  # what is under way is waited for: it may have been paid for
                failed.append(error)

    await asyncio.gather(*(work() for _ in range(min(ranker.at_once, len(left)))))
    if failed:
        raise failed[0]


def digests_of(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """What tells each comparison from any other, by id. Raises DataError for a video that cannot be read."""
    files = {file: "" for c in comparisons for file in (c.video_a, c.video_b)}
    for file in files:
        try:
            files[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{file}: a video to be ranked cannot be read ({error.strerror}); make it again") from None
    texts = {c.id: json.dumps([c.prompt, files[c.video_a], files[c.video_b]]) for c in comparisons}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:32] for name, text in texts.items()}


def read_answers(file: Path) -> dict[tuple[str, str], float]:
    """By who answered and what was compared; the newest counts. A last line that a crash cut off is passed over.

    Raises DataError for any other line that is none of ours.
    """
    if not file.exists():
        return {}
    found = {}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            found[row["who"], row["of"]] = float(row["p"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}:{number}: is no answer of a ranker; delete the line") from None
    return found


def _mend_end(file: Path) -> None:
    """Cut off a last line without its end, which a crash left."""
    if file.exists() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)
