"""Says what is being done and how far it is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
SECONDS_BETWEEN_LINES = 10.0


class _Bar:
    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=amount, note=note)


class _Lines:
    def __init__(self, title: str, total: int, done: int):
        self._title, self._total, self._done = title, total, done
        self._start = self._last = time.monotonic()
        self._first = done

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last = now
        left = (now - self._start) / max(self._done - self._first, 1) * (self._total - self._done)
        print(
            f"{self._title}: {self._done}/{self._total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True
        )


class _Silent:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


@contextmanager
def progress(title: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[_Bar | _Lines | _Silent]:
    """`with progress("training", 100) as bar: bar.advance(note="loss 0.69")`. `show` is False on ranks above 0."""
    if not show or total == 0:
        yield _Silent()
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, bar.add_task(title, total=total, completed=done, note=""))
    else:
        yield _Lines(title, total, done)


def say(message: str) -> None:
    """One line about what is happening, on standard error."""
    console.print(message, markup=False, soft_wrap=True)
