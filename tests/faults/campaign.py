"""The fault campaign: commands broken in every way that is known to us, and what came of each.

    python tests/faults/campaign.py                          all of them: seven to thirty minutes on two cores
    python tests/faults/campaign.py --kind "disk full"       those kinds alone whose names hold these words
    python tests/faults/campaign.py --each 1                 so many of each kind
    python tests/faults/campaign.py --without fsync          with fsync, rename, lock or hash made void: it must notice

Each fault is drawn from the seed, its kind and its number; after it the same command is given once more, without the
fault, and must end as a run that was never broken: the same curves, weights and rows, bit for bit, and from no earlier
step than the last one that was saved. Exits with 1 where one was lost.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # see tests/conftest.py

import mounts  # noqa: E402
from harm import GUARDS  # noqa: E402
from jobs import prepare  # noqa: E402
from kinds import KINDS, Kind  # noqa: E402
from world import Lost, World  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", action="append", default=[], help="words of its name; may be given again")
    parser.add_argument("--each", type=int, help="faults of each kind; its own number unless told")
    parser.add_argument("--number", type=int, help="this one alone of each kind")
    parser.add_argument("--without", action="append", default=[], choices=GUARDS)
    given = parser.parse_args(arguments)

    kinds = {name: kind for name, kind in KINDS.items() if not given.kind or any(word in name for word in given.kind)}
    if not kinds:
        parser.error(f"--kind: none of {', '.join(KINDS)}")
    if "disk full" in kinds and not mounts.may_mount():
        print("disk full: left out, this system does not let us mount a small disk")
        del kinds["disk full"]
    from starting import forget_garbage, import_everything

    import_everything()
    forget_garbage()
    print(f"seed {given.seed}{''.join(f', without {guard}' for guard in given.without)}", flush=True)
    table: dict[str, list[bool]] = {}
    healthy = World(Path(tempfile.mkdtemp()))  # a TemporaryDirectory's end would come in every process that is forked
    try:
        prepare(healthy.folder)
        for name, (count, fault) in kinds.items():
            numbers = range(given.each or count) if given.number is None else [given.number]
            for number in numbers:
                begun = time.monotonic()
                world = replace(healthy, without=tuple(given.without), started=[])
                reason = _lost(fault, Random(f"{given.seed} {name} {number}"), world)
                healthy.count = world.count
                table.setdefault(name, []).append(bool(reason))
                print(f"{name} {number}: {world.told}{reason}  ({time.monotonic() - begun:.0f} s)", flush=True)
    finally:
        shutil.rmtree(healthy.folder, ignore_errors=True)
    print(_as_text(table))
    return int(any(map(any, table.values())))


def _lost(fault: Kind, draw: Random, world: World) -> str:
    """Why a fault was not survived, empty where it was."""
    try:
        fault(draw, world)
        return ""
    except Lost as reason:
        return f" LOST: {reason}"
    except Exception:
        return f" LOST: {traceback.format_exc()}"
    finally:
        for started in world.started:
            started.kill()
        shutil.rmtree(world.folder / "runs", ignore_errors=True)


def _as_text(table: dict[str, list[bool]]) -> str:
    lines = ["", "| kind | faults | lost |", "| --- | --- | --- |"]
    lines += [f"| {name} | {len(lost)} | {sum(lost)} |" for name, lost in table.items()]
    total = sum(map(len, table.values()))
    largest = max(map(len, table.values()))
    lost = sum(map(sum, table.values()))
    lines.append(f"| **{len(table)} kinds** | **{total}** | **{lost}** |")
    return "\n".join([*lines, "", f"largest kind: {largest / total:.0%} of all"])


if __name__ == "__main__":
    sys.exit(main())
