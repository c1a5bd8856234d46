"""Checkpoints that appear whole or not at all, and are loaded only when every byte is as it was written.

DeepSpeed's files are pickles, which can run code when they are read. So each checkpoint carries a manifest of
SHA-256 hashes, and files that do not match it are never opened; the checkpoint before is used instead. One that does
not match is set aside under another name, never deleted, and does not count as one when old ones are.
"""

import functools
import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from alignkit.config import TrainSection
from alignkit.errors import CheckpointError
from alignkit.files import flush, write_json
from alignkit.moment import listed
from alignkit.progress import say
from alignkit.training import manifest as manifests
from alignkit.training.distributed import gather, on_each, on_main_rank
from alignkit.training.manifest import BEFORE, DAMAGED, DIGEST, FORMAT, MANIFEST, PARTIAL, candidates, step_of
from alignkit.training.reshaping import load_universal, universal_form
from alignkit.training.state import check_states, load_state, save_local_state, save_state, state_damage
from alignkit.training.terms import accepted, difference

SEEN_WITHIN_S = 30.0  # of a write on another node: a network file system may take some seconds to show it


def save(
    engine: Any,
    folder: Path,
    step: int,
    terms: dict[str, Any],
    keep: int,
    parts: dict[str, object],
    record: list[dict[str, Any]],
) -> None:
    """Write checkpoint `step`; every process must call this. `terms` is what a resumed run must share, `parts` are
    those of the run beside its engine, of which some have a state (`alignkit.training.state`), `record` what was
    changed of the terms on purpose.

    Written under a temporary name and renamed when complete and on disk; the oldest beyond `keep` are removed
    only after that. Each process flushes and hashes what it wrote itself. Raises CheckpointError, on every process,
    where the first one does not see what another wrote.
    """
    partial, final = folder / f"{PARTIAL}{step:08d}", manifests.checkpoint(folder, step)
    rank = torch.distributed.get_rank()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    save_local_state(partial, step, parts)
    if rank == 0:
        save_state(partial, step, parts)
    torch.distributed.barrier()  # none lists what another is still writing under a name of its own for the time
    own = [file for file in sorted(partial.rglob("*")) if file.is_file() and _writer(file) == rank]
    for file in own:
        flush(file)
    hashes: dict[str, str] = {}
    for part in gather({str(file.relative_to(partial)): manifests.file_hash(file) for file in own}):
        hashes |= part
    on_main_rank(lambda: _complete(partial, final, step, terms, hashes, keep, record))


def _complete(
    partial: Path,
    final: Path,
    step: int,
    terms: dict[str, Any],
    hashes: dict[str, str],
    keep: int,
    record: list[dict[str, Any]],
) -> None:
    unseen = _unseen(partial, hashes)
    if unseen:
        raise CheckpointError(
            f"{partial}: {unseen[0]}, which another process wrote, is not seen by the first; output.dir must be one "
            "folder for all of them"
        )
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": torch.distributed.get_world_size(),
        "shards": manifests.shards(hashes),
        "terms": terms,
        "files": dict(sorted(hashes.items())),
    }
    manifest |= {"accepted": record} if record else {}
    write_json(partial / MANIFEST, manifest | {DIGEST: manifests.digest(manifest)})
    flush(partial)
    if final.exists():  # of another number of processes
        say(f"the checkpoint that was converted is kept as {_set_aside(final, BEFORE).name}")
    os.rename(partial, final)
    flush(final.parent)
    for old in [path for path in candidates(final.parent) if path.name <= final.name][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _unseen(folder: Path, names: dict[str, str]) -> list[str]:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        unseen = [name for name in names if not (folder / name).is_file()]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.5)


def load_latest(
    engine: Any, folder: Path, terms: dict[str, Any], parts: dict[str, object], train: TrainSection
) -> tuple[int, list[dict[str, Any]], bool]:
    """Load the newest whole checkpoint, the states of `parts` with it; every process must call this.

    Returns its step, 0 if there is none; what was changed of its terms on purpose, now (`train.accept`) or earlier; and
    whether it was written by another number of processes and converted (`train.reshape`), which is to be saved.
    Those that are damaged are said and set aside. Raises CheckpointError, and changes nothing, when the newest whole
    one was written under other terms, by another number of processes or after more than `train.steps`, and when there
    are checkpoints of which none is whole, unless `train.restart`; MomentError where one cannot be read just now.
    """
    passed: list[tuple[Path, str]] = []
    tag: str | None = None
    for name in on_main_rank(lambda: [path.name for path in candidates(folder)]):
        damage = next(filter(None, on_each(functools.partial(_damage_seen_here, folder / name))), None)
        if damage is None:
            tag = name
            break
        passed.append((folder / name, damage))
    record, ranks = on_main_rank(lambda: _judge(folder, tag, passed, terms, train, parts))
    if tag is None:
        return 0, record, False
    reshaped = ranks != torch.distributed.get_world_size()
    with unpatterned(folder) as same:
        if reshaped:
            universal = on_main_rank(lambda: universal_form(same / tag, terms))
            load_universal(engine, same, universal.name)
            torch.distributed.barrier()
            on_main_rank(lambda: shutil.rmtree(universal, ignore_errors=True))
        else:
            engine.load_checkpoint(str(same), tag=tag, load_module_strict=False)
    load_state(folder / tag, parts, ranks if reshaped else None)
    return step_of(folder / tag), record, reshaped


@contextmanager
def unpatterned(folder: Path) -> Iterator[Path]:
    """`folder` by a path that is no pattern to `glob`, by which DeepSpeed looks for its files: in r[a] it found
    those in ra."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as other:
        link = Path(other) / "checkpoints"
        link.symlink_to(folder.absolute())
        yield link


def _judge(
    folder: Path,
    tag: str | None,
    passed: list[tuple[Path, str]],
    terms: dict[str, Any],
    train: TrainSection,
    parts: dict[str, object],
) -> tuple[list[dict[str, Any]], int]:
    """Whether the run may go on from checkpoint `tag`; what was changed on purpose until it does, and how many
    processes wrote it."""
    record: list[dict[str, Any]] = []
    ranks = 0
    if tag is not None:
        record, ranks = _checked(folder / tag, terms, train)
        check_states(folder / tag, parts)
    else:
        lost = [*(path for path, _ in passed), *reversed(listed(folder, f"{DAMAGED}*"))]
        if lost and not train.restart:
            why = f" ({passed[0][1]})" if passed else ""
            raise CheckpointError(
                f"{folder}: none of its {len(lost)} checkpoint{'s' * (len(lost) > 1)} is whole, the newest is "
                f"{lost[0].name}{why}; put a whole one back, or start over beside them with train.restart=true"
            )
    for path, damage in passed:
        say(f"passing over checkpoint {path}: {damage}; kept as {_set_aside(path).name}")
    return record, ranks


def _checked(path: Path, terms: dict[str, Any], train: TrainSection) -> tuple[list[dict[str, Any]], int]:
    """Raises CheckpointError for a whole checkpoint that is not this run's."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        found = manifest.get("format", 1)
        raise CheckpointError(
            f"{path}: checkpoint format {found}, this version reads {FORMAT}; start in another output.dir"
        )
    world_size = torch.distributed.get_world_size()
    if manifest["world_size"] != world_size and not train.reshape:
        raise CheckpointError(
            f"{path}: written by {manifest['world_size']} processes, this run has {world_size}; "
            "resume with the same number, convert it with --reshape, or start in another output.dir"
        )
    changes = accepted(manifest["terms"], terms, train.accept)
    changed = difference(manifest["terms"], terms, train.accept)
    if changed:
        raise CheckpointError(
            f"{path}: written with {changed}; put it back to resume, start in another output.dir, or, where it may "
            "change, name it in train.accept"
        )
    if manifest["step"] > train.steps:
        raise CheckpointError(
            f"{path.parent.parent}: this stage was trained for {manifest['step']} steps, more than its train.steps, "
            f"{train.steps}; put it back, or start in another output.dir"
        )
    for change in changes:
        say(f"resuming with {change['term']} = {change['now']!r}, which was {change['was']!r}, as train.accept allows")
    record = manifest.get("accepted", []) + [{"step": manifest["step"], **change} for change in changes]
    return record, manifest["world_size"]


def _set_aside(path: Path, why: str = DAMAGED) -> Path:
    number, target = 1, path.with_name(f"{why}{path.name}")
    while target.exists():
        number += 1
        target = path.with_name(f"{why}{path.name}-{number}")
    path.rename(target)
    return target


def _writer(file: Path) -> int:
    """The process that wrote a file of a checkpoint, by DeepSpeed's names and ours."""
    named = re.search(r"rank[_-](\d+)", file.name)
    return int(named[1]) if named else 0


def _damage_seen_here(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Of its files each process reads its share, so that together they read
    every byte."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def look() -> str | None:
        found = manifests.damage(path, slice(rank, None, world_size))
        if found or rank:
            return found
        manifest = json.loads((path / MANIFEST).read_text())
        return state_damage(path, manifest["step"], manifest["files"]) if manifest.get("format") == FORMAT else None

    return manifests.described(path, look, SafetensorError)
