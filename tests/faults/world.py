"""The folder of a campaign: unbroken runs of its jobs, and broken ones beside them."""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import harm as harms
from harm import Harm
from jobs import JOBS, Job, begin, saved_too
from starting import Started, start


class Lost(Exception):
    """A fault that was not survived, and why."""


def resumed_after(said: str) -> int:
    """The step after which a run says that it goes on, 0 where it begins."""
    return int((re.findall(r"resuming after step (\d+)", said) or [0])[-1])


@dataclass
class World:
    """without: the guards that are taken away (`harm.GUARDS`). told: what the fault under way has drawn."""

    folder: Path
    without: tuple[str, ...] = ()
    results: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    count: int = 0
    told: str = ""
    started: list[Started] = field(default_factory=list)

    def whole(self, name: str) -> dict[str, object]:
        """The result of an unbroken run of a job, and of those that it starts from."""
        if name not in self.results:
            job, run = JOBS[name], self.folder / "whole" / name
            for before in job.start:
                self.whole(before)
            begin(job, run, self.folder)
            begun = time.monotonic()
            started = self.start(job, run, self.folder / "diaries" / name)
            if started.wait():
                raise RuntimeError(f"{name} does not run unbroken:\n{started.said}")
            self.seconds[name], self.results[name] = time.monotonic() - begun, job.result(run)
        return self.results[name]

    def events(self, name: str, pattern: str = "") -> list[int]:
        """The numbers of an unbroken run's file operations that match."""
        self.whole(name)
        found = harms.events(self.folder / "diaries" / name)
        return [number for number, event in enumerate(found) if re.search(pattern, event)]

    def fresh(self, name: str) -> "Case":
        """A new run of a job, not started, with what it starts from."""
        self.whole(name)
        self.count += 1
        case = Case(self, JOBS[name], self.folder / "runs" / f"{self.count:03d}")
        begin(case.job, case.run, self.folder)
        return case

    def done(self, name: str) -> "Case":
        """A copy of an unbroken run of a job."""
        case = self.fresh(name)
        shutil.rmtree(case.run)
        shutil.copytree(self.folder / "whole" / name, case.run)
        return case

    def start(
        self, job: Job, run: Path, diary: Path, harm: Harm | None = None, *changed: str, words: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Started:  # fmt: skip
        first = partial(harms.apply, run, diary, harm, self.without)
        argv = ["alignkit", *(words or job.words(run, self.folder, *changed))]
        said = diary / "said"
        self.started.append(start(argv, said, said, environment=os.environ | (environment or {}), first=first))
        return self.started[-1]


@dataclass
class Case:
    """One run of a job that is to be broken."""

    world: World
    job: Job
    run: Path
    starts: int = 0

    @property
    def diary(self) -> Path:
        """Of the newest start."""
        return self.world.folder / "diaries" / f"{self.run.name}-{self.starts}"

    def start(self, harm: Harm | None = None, *changed: str, **more) -> Started:
        self.starts += 1
        return self.world.start(self.job, self.run, self.diary, harm, *changed, **more)

    def struck(self, harm: Harm) -> Started:
        """Started, harmed and over. Lost where the process ends otherwise than by the signal."""
        started = self.start(harm)
        code = started.wait()
        others = (1,) if self.job.processes > 1 else ()  # of which one may notice before the launcher does
        if harm.signal and code not in (-harm.signal, 128 + harm.signal, 0, *others):
            raise Lost(f"ended with {code} instead of the signal:\n{started.said}")
        if harm.power:
            harms.cut_power(self.run, self.diary, harm.names_lost)
        return started

    def goes_on(
        self, *changed: str, at_least: int | None = None, harm: Harm | None = None, between: int | None = None
    ) -> str:
        """Start it again: it must end well, in the result of an unbroken run, and, where it trains, not before the
        step `at_least`, by itself the newest that was saved. between: a step that was saved because it was told to
        stop, of which an unbroken run has no checkpoint. Returns what it said."""
        saved = harms.saved_step(self.diary) if at_least is None else at_least
        started = self.start(harm, *changed)
        self.ended(started, 0)
        if self.job.name.startswith(("train", "cached")):
            resumed = resumed_after(started.said)
            if resumed < saved:
                raise Lost(f"step {saved} was saved, it went on after step {resumed}:\n{started.said}")
        self.same(between)
        return started.said

    def same(self, between: int | None = None) -> None:
        """Lost, with the name of what is other than in an unbroken run."""
        wanted, found = self.world.whole(self.job.name), self.job.result(self.run)
        if between:
            wanted = saved_too(wanted, between)
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if other:
            raise Lost(f"{other[0]} is not that of an unbroken run ({len(other)} of {len(wanted)} differ)")

    def refused(self, *changed: str, words: str, command: list[str] | None = None) -> None:
        """Started so, it must end with 2 and one line that has `words`, and leave every byte as it was."""
        before = self.bytes()
        started = self.start(None, *changed, words=command)
        self.ended(started, 2)
        lines = [line for line in started.said.splitlines() if line.startswith("alignkit: ")]
        if len(lines) != 1 or not re.search(words, lines[0]):
            raise Lost(f"refused otherwise than by one line with {words!r}:\n{started.said}")
        after = self.bytes()
        other = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if other:
            raise Lost(f"a command that was refused has changed {', '.join(other)}")

    def bytes(self) -> dict[str, bytes]:
        files = (file for file in self.run.rglob("*") if file.is_file() and file.name != ".run.lock")
        return {str(file.relative_to(self.run)): file.read_bytes() for file in files}

    def ended(self, started: Started, *codes: int) -> None:
        try:
            code = started.wait()
        except TimeoutError as error:
            raise Lost(str(error)) from None
        if code not in codes:
            raise Lost(f"ended with {code}:\n{started.said[-3000:]}")

    def until(self, reached: Callable[[], bool], started: Started) -> None:
        """Wait for something that a running process does."""
        end = time.monotonic() + 120
        while not reached() and not started.over():
            if time.monotonic() > end:
                started.kill()
                raise Lost("did nothing for two minutes")
            time.sleep(0.005)

    def lines(self) -> int:
        """Steps that its curve has."""
        return _lines(self.run)

    def over(self) -> bool:
        """Whether its curve has every step of an unbroken run."""
        return self.lines() == _lines(self.world.folder / "whole" / self.job.name)


def _lines(run: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in run.glob("**/metrics.jsonl"))
