"""Says what is being done and how far it is: one live display on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from textwrap import fill

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
REFRESHES_A_SECOND = 4


@cache
def _console() -> Console:
    """Made when first written to: it keeps what the terminal was then, which forked processes may not share."""
    return Console(stderr=True, highlight=False, emoji=False)


class _Display(Progress):
    """Of each task a bar as wide as the terminal, and under it what there is to say, no fact broken in two."""

    over = False

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["facts"]:
                yield Columns([Text(fact, style="dim", no_wrap=True) for fact in task.fields["facts"]], padding=(0, 2))
        if not self.over:  # the cursor's line: a process that is killed leaves it there
            yield Text()

    def start(self) -> None:
        super().start()
        self.console.show_cursor(True)  # one that is hidden stays so where the process is killed

    def stop(self) -> None:
        self.over = True
        super().stop()


class _Left(ProgressColumn):
    """The time left, by the mean over all that was done since the start: rich's own forgets steps of half a minute."""

    def render(self, task: Task) -> Text:
        made, took = task.completed - task.fields["first"], task.elapsed or 0.0
        if task.finished:
            seconds, word = task.finished_time or 0.0, ""
        elif made:
            begun = task.fields["last"]
            seconds, word = max(0.0, begun / made * (task.remaining or 0) - (took - begun)), " left"
        else:
            seconds, word = took, " so far"
        return Text(f"{timedelta(seconds=int(seconds))}{word}", style="progress.remaining")


class _Bar:
    def __init__(self, display: _Display, task: TaskID):
        self._display, self._task, self._start = display, task, time.monotonic()

    def advance(self, amount: int = 1, note: str = "", beside: str = "") -> None:
        facts = [fact for fact in (*note.split("  "), *beside.split("  ")) if fact]
        self._display.update(self._task, advance=amount, facts=facts, last=time.monotonic() - self._start)


class _Lines:
    def __init__(self, title: str, total: int, done: int):
        self._title, self._total, self._done = title, total, done
        self._start = self._last = time.monotonic()
        self._first = done

    def advance(self, amount: int = 1, note: str = "", beside: str = "") -> None:
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
    def advance(self, amount: int = 1, note: str = "", beside: str = "") -> None:
        pass


_shown: _Display | None = None  # a terminal has room for one


@contextmanager
def progress(title: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[_Bar | _Lines | _Silent]:
    """`with progress("training", 100) as bar: bar.advance(note="loss 0.69  winner's error 0.21", beside="8 GB")`.

    Two spaces stand between facts; those of `beside` are for a terminal's display alone, in which a task within another
    has its bar under that one's. `show` is False on ranks above 0.
    """
    global _shown
    if not show or total == 0:
        yield _Silent()
        return
    if not _live():
        yield _Lines(title, total, done)
        return
    outer = _shown
    display = _shown = outer or _new_display()
    task = display.add_task(title, total=total, completed=done, first=done, last=0.0, facts=[])
    try:
        if outer is None:
            display.start()
        yield _Bar(display, task)
    finally:
        _shown = outer
        if outer is None:
            display.stop()
        else:
            display.remove_task(task)


def _new_display() -> _Display:
    whole = Column(no_wrap=True)
    return _Display(
        TextColumn("{task.description}", table_column=Column()),
        BarColumn(None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=whole),
        _Left(table_column=whole),
        console=_console(),
        expand=True,
        refresh_per_second=REFRESHES_A_SECOND,
        redirect_stdout=sys.stdout.isatty(),
    )


def _live() -> bool:
    """Whether what is said is seen by a person, on a terminal that can go back over it."""
    return _console().file.isatty() and not _console().is_dumb_terminal


def say(message: str) -> None:
    """One line about what is happening, on standard error; on a terminal broken between words where it is too long."""
    console = _console()
    if console.file.isatty():
        message = fill(message, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(message, markup=False, soft_wrap=True)
