"""Processes that fall silent or stand still are noticed within minutes and named, instead of waited for until the
process group gives up.

Each process says every few seconds what it is doing, from a thread of its own, to a store that the first one keeps. The
first one ends the run when one is not heard of, or has been at the same thing for too long; the others end it when the
first one is not heard of. How long is too long follows from the run itself: ten times its slowest step.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from alignkit.training.distributed import Process, on_main

PERIOD_S = 5.0
STEPS = 10  # of the slowest step so far, that a step may last
LONG = 12  # times `stuck_seconds`, for loading, saving, making pairs, exporting and the first step
GRACE_S = 10.0
ENDED = "ended"
EXIT_CODE = 1


class Pulse:
    """What this process is doing, as its thread tells the others."""

    def __init__(self, stuck_seconds: float):
        self._stuck, self._slowest = stuck_seconds, 0.0
        self.phase, self.count, self.limit = "loading", 0, LONG * stuck_seconds

    def at(self, phase: str, *, in_step: bool = False) -> None:
        """`phase` begins; in_step: a part of a step, of which there was a whole one before."""
        usual = in_step and self._slowest
        self.limit = max(self._stuck, STEPS * self._slowest) if usual else LONG * self._stuck
        self.phase, self.count = phase, self.count + 1

    def took(self, seconds: float) -> None:
        """A whole step of this run did."""
        self._slowest = max(self._slowest, seconds)


@contextmanager
def heartbeat(process: Process, stuck_seconds: float) -> Iterator[Pulse]:
    """Watched over until the block is left, where there are several processes; every one calls this.

    stuck_seconds: the least silence, or time in one part of a step, after which the run is ended with exit code 1.
    """
    pulse = Pulse(stuck_seconds)
    if process.world_size == 1:
        yield pulse
        return
    period = min(PERIOD_S, stuck_seconds / 4)
    stop = threading.Event()
    wait = timedelta(seconds=stuck_seconds)
    host = os.environ["MASTER_ADDR"]
    open_store: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
    kept = open_store(host, 0, None, True, wait, False) if process.main else None
    port, beat = on_main(process, lambda: (kept.port if kept else 0, _beat_of(pulse)))
    store = kept or open_store(host, port, None, False, wait, False)
    store.set_timeout(wait)
    store.set(_key(process.rank), _beat_of(pulse))
    torch.distributed.barrier()  # all have a first beat
    first, left = _First(beat), threading.Event()
    args = (store, pulse, process, stuck_seconds, period, stop, first)
    thread = threading.Thread(target=_beat, args=args, daemon=True, name="heartbeat")
    thread.start()
    if not process.main:
        heard = (first, stuck_seconds, period, left)
        threading.Thread(target=_listen, args=heard, daemon=True, name="heartbeat of the first").start()
    try:
        yield pulse
    except BaseException:
        left.set()
        raise
    finally:
        stop.set()
    thread.join()
    left.set()
    torch.distributed.barrier()  # the store goes with the first one, and nobody asks it any more


class _First:
    """What another process last heard of the first one, which keeps the store."""

    def __init__(self, beat: str):
        self._beat = ""
        self.says(beat)

    def says(self, beat: str) -> None:
        """The store answers for a process whose threads do not run, too: what is heard is a beat that is new."""
        if beat != self._beat:
            told = json.loads(beat)
            self.told, self.heard = _who(0, told), time.monotonic()
            self._beat = beat


def _listen(first: _First, stuck_seconds: float, period: float, left: threading.Event) -> None:
    """A store whose process is stopped answers nothing and refuses nothing: who asks it waits without a limit."""
    while not left.wait(period):
        silence = time.monotonic() - first.heard
        if silence > stuck_seconds + period:
            _end(f"{first.told}, is not heard of for {silence:.0f} s")


def _beat(
    store: Any,
    pulse: Pulse,
    process: Process,
    stuck_seconds: float,
    period: float,
    stop: threading.Event,
    first: _First,
) -> None:
    seen: dict[int, tuple[str, int, float, float]] = {}
    number = 0
    while not stop.wait(period):
        number += 1
        try:
            store.set(_key(process.rank), _beat_of(pulse, number))
            if process.main:
                fault = _fault(store, process.world_size, seen, stuck_seconds)
                if fault:
                    store.set(ENDED, fault)
                    time.sleep(2 * period)  # for the others to read it
                    _end(fault)
            elif store.check([ENDED]):
                _end(None)
            else:
                first.says(store.get(_key(0)).decode())
        except RuntimeError as error:  # torch's errors of a store that does not answer
            if stop.wait(GRACE_S):  # an error that all have raised: the first one was quicker to leave
                return
            _end(f"{first.told}, is not heard of ({_first_line(error)})")


def _fault(
    store: Any, world_size: int, seen: dict[int, tuple[str, int, float, float]], stuck_seconds: float
) -> str | None:
    """What is wrong with some process, or None; seen: of each, its last beat and since when it says the same."""
    now = time.monotonic()
    silent, still = [], []
    for rank in range(world_size):
        beat = store.get(_key(rank)).decode()
        told = json.loads(beat)
        last = seen.get(rank)
        heard = now if last is None or last[0] != beat else last[2]
        begun = now if last is None or last[1] != told["count"] else last[3]
        seen[rank] = beat, told["count"], heard, begun
        who = _who(rank, told)
        if now - heard > stuck_seconds:
            silent.append(f"{who}, is not heard of for {now - heard:.0f} s")
        elif now - begun > told["limit"]:
            still.append((told["count"], f"{who}, stands still for {now - begun:.0f} s"))
    if silent:
        return "; ".join(silent)
    behind = min(count for count, _ in still) if still else 0
    return "; ".join(text for count, text in still if count == behind) or None


def _who(rank: int, told: dict[str, Any]) -> str:
    return f"process {rank} on {told['host']}, last at {told['phase']}"


def _beat_of(pulse: Pulse, number: int = 0) -> str:
    told = {"host": socket.gethostname(), "phase": pulse.phase, "count": pulse.count, "limit": pulse.limit}
    return json.dumps(told | {"beat": number})


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _end(fault: str | None) -> None:
    """The main thread waits in a collective for a process that will not come: nothing but this ends it."""
    if fault:
        print(
            f"alignkit: {fault}; the run is ended, since the others would wait for it. Its checkpoints are untouched; "
            "the same command continues",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_CODE)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
