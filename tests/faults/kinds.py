"""The kinds of faults: each draws one, breaks a job with it, and says what has to come out nevertheless.

Each is a function (draw, world) that says what it drew in `world.told`, and raises `Lost` for a fault that was not
survived.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import harm as harms
import mounts
from harm import Harm
from jobs import JOBS
from starting import Started
from votes import a_server_of_votes_is_killed
from world import Lost, World, resumed_after

KILL = signal.SIGKILL
FULL = "no space is left on its disk"
Kind = Callable[[Random, World], None]


def _break(world: World, name: str, harm: Harm) -> None:
    world.told = f"{name}: {harms.described(harm)}"
    case = world.fresh(name)
    case.struck(harm)
    case.goes_on()


def killed(name: str, pattern: str = "") -> Kind:
    """kill -9 of a job at, or some milliseconds after, a file operation that matches."""

    def fault(draw: Random, world: World) -> None:
        harm = Harm(KILL, event=draw.choice(world.events(name, pattern)), delay=draw.choice([0, draw.uniform(0, 0.03)]))
        _break(world, name, harm)

    return fault


def killed_twice(draw: Random, world: World) -> None:
    """At a drawn moment, and the run that goes on once more."""
    world.whole("train")
    moments = [draw.uniform(0.2, world.seconds["train"]) for _ in range(2)]
    world.told = " and ".join(f"{moment:.2f} s" for moment in moments)
    case = world.fresh("train")
    for moment in moments:
        case.struck(Harm(KILL, seconds=moment))
    case.goes_on()


def a_power_cut(*names: str) -> Kind:
    """At a drawn file operation."""

    def fault(draw: Random, world: World) -> None:
        name = draw.choice(names)
        harm = Harm(KILL, event=draw.choice(world.events(name)), power=True, names_lost=draw.random() < 0.5)
        _break(world, name, harm)

    return fault


def a_power_cut_when_it_is_done(draw: Random, world: World) -> None:
    """What a command has said to be finished is on the disk."""
    name = draw.choice(["train", "hand-over", "pairs", "rollouts", "cache", "rounds"])
    harm = Harm(power=True, names_lost=draw.random() < 0.5)
    world.told = f"{name}: {harms.described(harm)}"
    case = world.fresh(name)
    case.ended(case.start(harm), 0)
    harms.cut_power(case.run, case.diary, harm.names_lost)
    case.goes_on()


def a_signal_to_end(number: int) -> Kind:
    """What was trained until then is saved, and the same command goes on."""

    def fault(draw: Random, world: World) -> None:
        name = draw.choice(["train", "train on two", "rounds"])
        after, wait = draw.choice([0, 1, 2, 3]), draw.uniform(0, 0.4)
        world.told = f"{name}: {wait:.2f} s after step {after}"
        case = world.fresh(name)
        started = case.start()
        case.until(lambda: case.lines() >= after, started)
        time.sleep(wait)
        if number == signal.SIGINT:  # a terminal's reaches every process
            os.killpg(started.pid, number)
        else:
            started.send(number)
        case.ended(started, 0, -number, 128 + number)
        if after and started.code and not case.over():  # the export may be left at once
            raise Lost(f"ended with {started.code} in training:\n{started.said}")
        saved = harms.saved_step(case.diary)
        if after and name != "rounds" and saved < case.lines():
            raise Lost(f"it ended after step {case.lines()}, and saved step {saved}")
        case.goes_on(at_least=case.lines() if after else 0, between=saved)

    return fault


def _flip(file: Path, draw: Random) -> str:
    data = bytearray(file.read_bytes())
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    file.write_bytes(bytes(data))
    return f"bit {bit} of byte {place} of {file.name}"


def _cut(file: Path, draw: Random) -> str:
    if draw.random() < 0.2:
        file.unlink()
        return f"{file.name} deleted"
    length = draw.randrange(file.stat().st_size)
    os.truncate(file, length)
    return f"{file.name} cut off after {length} bytes"


def a_damaged_checkpoint(damage: Callable[[Path, Random], str]) -> Kind:
    """The one before is used, and the damaged one kept; where there is none, nothing is done until it is asked for."""

    def fault(draw: Random, world: World) -> None:
        name, every = draw.choice(["train", "train on two"]), draw.random() < 0.25
        case = world.done(name)
        shutil.rmtree(case.run / "export")
        told = []
        for checkpoint in sorted(case.run.glob("train/checkpoints/step-*"))[0 if every else -1 :]:
            files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size)
            told.append(damage(draw.choice(files), draw))
        world.told = f"{name}: {'; '.join(told)}"
        if every:
            case.refused(words="none of its 2 checkpoints is whole")
            case.goes_on("train.restart=true", at_least=0)
        elif "passing over" not in case.goes_on(at_least=4):
            raise Lost("nothing was said of the damage")
        if len(list(case.run.glob("train/checkpoints/damaged-*"))) != len(told):
            raise Lost("a damaged checkpoint is not kept")

    return fault


READ = {"train": ("pairs", "pairs/train"), "ranking": ("rollouts", "rollouts"), "cached": ("cache", "reference")}


def a_damaged_block(damage: Callable[[Path, Random], str]) -> Kind:
    """It is read as it was written, or named; deleted, it is made again."""

    def fault(draw: Random, world: World) -> None:
        name = draw.choice(list(READ))
        maker, folder = READ[name]
        case = world.fresh(name)
        block = draw.choice(sorted((case.run / folder).glob("block-*.arrow")))
        world.told = f"{name}: {damage(block, draw)}"
        started = case.start()
        case.ended(started, 0, 2)
        if started.code == 0 and block.exists():
            world.told += ", read as it was written"
            case.same()
            return
        if not re.search(rf"{block.name}: damaged|1 of \d+ blocks of|for 5 of the 6 steps", started.said):
            raise Lost(f"refused, without naming the block:\n{started.said}")
        world.told += ", named and made again"
        block.unlink(missing_ok=True)
        build = world.start(JOBS[maker], case.run, case.diary.with_name(f"{case.diary.name}-build"))
        case.ended(build, 0)
        case.goes_on(at_least=0)

    return fault


def a_full_disk(draw: Random, world: World) -> None:
    """One line says so; with more room the same command goes on."""
    name = draw.choice(["train", "pairs", "rollouts", "cache", "hand-over", "rounds", "samples"])
    case, place = world.fresh(name), world.folder / "disk"
    begun = sum(file.stat().st_size for file in case.run.rglob("*"))
    needed = sum(file.stat().st_size for file in (world.folder / "whole" / name).rglob("*"))
    size = begun + 65536 + int(draw.uniform(0.0, 0.95) * (needed - begun))
    world.told = f"{name}: {size} bytes"
    mounts.disk(place, size)
    try:
        shutil.copytree(case.run, place / "run")
        case.run = place / "run"
        started = case.start()
        case.ended(started, 0, 2)
        if started.code and (FULL not in started.said or "Traceback" in started.said):
            raise Lost(f"not said in a line:\n{started.said}")
        mounts.disk(place, 2**30, again=True)
        case.goes_on()
    finally:
        mounts.remove(place)


def _ranks(started: Started) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]


def a_dead_process(draw: Random, world: World) -> None:
    """The other one ends too, and the command with it."""
    after, rank, wait = draw.randrange(5), draw.randrange(2), draw.uniform(0, 0.3)
    world.told = f"process {rank} {wait:.2f} s after step {after}"
    case = world.fresh("train on two")
    started = case.start()
    case.until(lambda: case.lines() >= after and len(_ranks(started)) == 2, started)
    time.sleep(wait)
    ranks = _ranks(started)
    if len(ranks) == 2:
        os.kill(ranks[rank], KILL)
    case.ended(started, 137, 1, 0)
    case.goes_on()


def a_stopped_process(draw: Random, world: World) -> None:
    """It is named, and the run ends."""
    after, rank = draw.randrange(1, 4), draw.randrange(2)
    world.told = f"process {rank} after step {after}"
    case = world.fresh("train on two")
    started = case.start(None, "train.stuck_seconds=2")
    case.until(lambda: case.lines() >= after, started)
    os.kill(_ranks(started)[rank], signal.SIGSTOP)
    case.ended(started, 1)
    if not re.search(rf"process {rank} on \S+, last at", started.said):
        raise Lost(f"it is not named:\n{started.said}")
    case.goes_on()


def a_slow_process(draw: Random, world: World) -> None:
    """It is waited for."""
    after, rank, pause = draw.randrange(1, 4), draw.randrange(2), draw.uniform(0.5, 3)
    world.told = f"process {rank} after step {after}, {pause:.1f} s"
    case = world.fresh("train on two")
    started = case.start()
    case.until(lambda: case.lines() >= after, started)
    slow = _ranks(started)[rank]
    os.kill(slow, signal.SIGSTOP)
    time.sleep(pause)
    os.kill(slow, signal.SIGCONT)
    case.ended(started, 0)
    case.same()


def two_runs(draw: Random, world: World) -> None:
    """The second one is refused and says who is there; builds share their work."""
    name = draw.choice(["train", "hand-over", "rounds", "pairs", "rollouts", "cache"])
    case = world.fresh(name)
    wait = draw.uniform(0, 0.6 * world.seconds[name])
    world.told = f"{name}: the second one {wait:.2f} s after the first"
    first, lock = case.start(), case.run / ".run.lock"
    case.until(lambda: lock.exists() and lock.stat().st_size > 0, first)
    time.sleep(wait)
    if name in ("pairs", "rollouts"):
        case.ended(case.start(), 0)
    else:
        first.send(signal.SIGSTOP)  # it must not end before the second one looks
        over = first.over() or f"{case.job.command[0]} took" in first.said
        second = case.start()
        case.ended(second, 0 if over else 2)
        first.send(signal.SIGCONT)
        if not over and not re.search("writes it since|another command writes it", second.said):
            raise Lost(f"refused, without saying who is there:\n{second.said}")
    case.ended(first, 0)
    case.same()


CHANGED = {
    "train": (
        "train.learning_rate=2e-4", "objective.beta=60", "noise.timesteps=schedule", "train.seed=5",
        "model.max_sequence_length=60", "train.global_batch_size=2", "train.weight_decay=0.5", "train.steps=1",
    ),
    "hand-over": ("train.learning_rate=2e-4", "train.seed=5"),
    "rounds": ("ranker.keep=all", "rollout.seed=5"),
    "pairs": ("pairs.guidance_scale=3.5", "pairs.seed=7", "pairs.per_clip=2"),
    "rollouts": ("rollout.seed=7", "rollout.num_inference_steps=5"),
}  # fmt: skip


NAMED = {"rollout.num_inference_steps": "steps"}
"""By key, what is named instead."""


def changed_terms(draw: Random, world: World) -> None:
    """The run is refused, and names what has changed."""
    name = draw.choice(list(CHANGED))
    key = draw.choice(CHANGED[name])
    world.told = f"{name}: {key}"
    saved = r"rename .*(step-|masters.json|block-\d+\.arrow)"
    case = world.fresh(name)
    case.struck(Harm(KILL, event=draw.choice(world.events(name, saved)[1:]), delay=0.05))
    step = harms.saved_step(case.diary)
    changed = key.partition("=")[0]
    named = "rounds" if name == "rounds" else NAMED.get(changed, changed.rpartition(".")[2])
    case.refused(key, words=named)
    case.goes_on(at_least=step)


def another_number_of_processes(draw: Random, world: World) -> None:
    """The run is refused, and says how it would go on."""
    name = draw.choice(["train", "train on two"])
    world.told = name
    case = world.fresh(name)
    case.struck(Harm(KILL, event=world.events(name, "rename .*step-")[1], delay=0.05))
    step = harms.saved_step(case.diary)
    words = [word for word in case.job.words(case.run, world.folder) if word not in ("--nproc", "2")]
    words += ["--nproc", "2"] if name == "train" else []
    case.refused(words=r"written by \d process(es)?, this run has", command=words)
    case.goes_on(at_least=step)


def folders_that_are_not_one(draw: Random, world: World) -> None:
    """Both processes refuse, and have left nothing."""
    from alignkit.launch import free_port

    cases = [world.fresh("train") for _ in range(2)]
    waits = [draw.uniform(0, 0.5) for _ in cases]
    world.told = f"{waits[1]:.2f} s apart"
    port, before = free_port(), [case.bytes() for case in cases]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank, case in enumerate(cases):
        time.sleep(waits[rank])
        started.append(case.start(environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    for case, one in zip(cases, started, strict=True):
        case.ended(one, 2)
    if "is not one folder for all processes" not in started[0].said:
        raise Lost(f"refused otherwise:\n{started[0].said}")
    if before != [case.bytes() for case in cases]:
        raise Lost("a run that was refused has changed something")
    cases[0].goes_on()


def not_a_number(draw: Random, world: World) -> None:
    """The step is skipped and its pair named; killed and gone on, the run ends as it would have."""
    steps = tuple(sorted(draw.sample(range(1, 7), draw.choice([1, 2]))))
    killed_at = draw.choice(world.events("train", "checkpoints"))
    world.told = f"steps {steps}, killed at event {killed_at}"
    whole, broken = world.fresh("train"), world.fresh("train")
    started = whole.start(Harm(nan_steps=steps))
    whole.ended(started, 0)
    if started.said.count("is skipped, its loss or gradient is not finite: pair ") != len(steps):
        raise Lost(f"not each of {steps} is skipped by name:\n{started.said}")
    broken.struck(Harm(KILL, event=killed_at, nan_steps=steps))
    saved = harms.saved_step(broken.diary)
    again = broken.start(Harm(nan_steps=steps))
    broken.ended(again, 0)
    if resumed_after(again.said) < saved:
        raise Lost(f"step {saved} was saved:\n{again.said}")
    if broken.job.result(broken.run) != whole.job.result(whole.run):
        raise Lost("broken and gone on, it ends otherwise")


def nothing_but_not_a_number(draw: Random, world: World) -> None:
    """The run ends, its last checkpoint is untouched, and without the fault it goes on from it."""
    first = draw.choice([3, 5])
    world.told = f"from step {first} on"
    case = world.fresh("train")
    started = case.start(Harm(nan_steps=tuple(range(first, 7))), "train.max_bad_steps=2")
    case.ended(started, 2)
    if "in 2 steps in a row" not in started.said:
        raise Lost(f"not said:\n{started.said}")
    case.goes_on("train.max_bad_steps=2", at_least=first - 1)


SAVES, EXPORTS = r"checkpoints/", r"export"
BLOCKS = r"(open|rename) .*(pairs\.json|block-\d+\.arrow)"
HANDS_ON = r"masters|stages/02\S*/train$|export"
KINDS: dict[str, tuple[int, Kind]] = {
    "kill -9 in training": (8, killed_twice),
    "kill -9 inside a save": (12, killed("train", SAVES)),
    "kill -9 inside a save, two processes": (4, killed("train on two", SAVES)),
    "kill -9 while pairs are made": (8, killed("pairs")),
    "kill -9 while rollouts are sampled": (6, killed("rollouts")),
    "kill -9 while a reference's errors are cached": (6, killed("cache")),
    "kill -9 while videos are sampled": (5, killed("samples")),
    "kill -9 while they are measured": (5, killed("measured")),
    "kill -9 in a ranking": (6, killed("ranking")),
    "kill -9 in a round of rollouts": (6, killed("rounds", r"rounds/")),
    "kill -9 while a block is put in its place": (6, killed("pairs", BLOCKS)),
    "kill -9 between two stages": (6, killed("hand-over", HANDS_ON)),
    "kill -9 in a distillation": (6, killed("student")),
    "kill -9 in an export": (5, killed("train", EXPORTS)),
    "kill -9 of the server of votes": (5, a_server_of_votes_is_killed),
    "power cut in training": (8, a_power_cut("train", "hand-over")),
    "power cut in a build": (8, a_power_cut("pairs", "rollouts", "cache", "rounds", "samples", "measured")),
    "power cut when it is done": (6, a_power_cut_when_it_is_done),
    "SIGTERM in a step": (6, a_signal_to_end(signal.SIGTERM)),
    "SIGINT in a step": (5, a_signal_to_end(signal.SIGINT)),
    "a bit flipped in a checkpoint": (8, a_damaged_checkpoint(_flip)),
    "a checkpoint cut off": (6, a_damaged_checkpoint(_cut)),
    "a bit flipped in a block": (8, a_damaged_block(_flip)),
    "a block cut off": (5, a_damaged_block(_cut)),
    "disk full": (8, a_full_disk),
    "a dead process": (5, a_dead_process),
    "a stopped process": (3, a_stopped_process),
    "a slow process": (3, a_slow_process),
    "two runs in a folder": (6, two_runs),
    "changed terms": (8, changed_terms),
    "another number of processes": (4, another_number_of_processes),
    "a folder that is not shared": (2, folders_that_are_not_one),
    "NaN in a step": (4, not_a_number),
    "NaN in every step": (2, nothing_but_not_a_number),
}
