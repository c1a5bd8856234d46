"""Checkpoints that appear whole or not at all, and are loaded only when every byte is as it was written.

DeepSpeed's files are pickles, which can run code when they are read. So each checkpoint carries a manifest of
SHA-256 hashes, and files that do not match it are never opened; the checkpoint before is used instead.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from alignkit.errors import CheckpointError
from alignkit.files import flush, write_json
from alignkit.progress import say
from alignkit.training.state import load_state, save_local_state, save_state, state_damage
from alignkit.training.terms import difference

MANIFEST = "manifest.json"
FORMAT = 2


def save(engine, folder: Path, step: int, terms: dict, keep: int, parts: dict[str, object]) -> None:
    """Write checkpoint `step`; every process must call this. `terms` is what a resumed run must share, `parts` are
    those of the run beside its engine, of which some have a state (`alignkit.training.state`).

    Written under a temporary name and renamed when complete and on disk; the oldest beyond `keep` are removed
    only after that.
    """
    partial, final = folder / f".partial-{step:08d}", _name(folder, step)
    first = torch.distributed.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    save_local_state(partial, step, parts)
    torch.distributed.barrier()
    if first:
        save_state(partial, step, parts)
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        hashes = {str(file.relative_to(partial)): _hash(file) for file in files}
        for file in files:
            flush(file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": torch.distributed.get_world_size(),
            "terms": terms,
            "files": hashes,
        }
        write_json(partial / MANIFEST, manifest)
        flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        flush(folder)
        for old in _candidates(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    torch.distributed.barrier()


def load_latest(engine, folder: Path, terms: dict, parts: dict[str, object]) -> int:
    """Load the newest whole checkpoint, the states of `parts` with it, and return its step, 0 if there is none; every
    process must call this.

    Damaged checkpoints are passed over with a line that says so. Raises CheckpointError when the newest whole
    one was written under other terms or by another number of processes.
    """
    chosen = [None, None]
    if torch.distributed.get_rank() == 0:
        chosen = _choose(folder, terms)
    torch.distributed.broadcast_object_list(chosen, src=0)
    tag, problem = chosen
    if problem:
        raise CheckpointError(problem)
    if tag is None:
        return 0
    engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    load_state(folder / tag, parts)
    return int(tag.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """Step of the newest whole checkpoint in `folder`, 0 if there is none."""
    return next((int(path.name.removeprefix("step-")) for path in _candidates(folder) if _damage(path) is None), 0)


def _choose(folder: Path, terms: dict) -> list:
    for path in _candidates(folder):
        damage = _damage(path)
        if damage:
            say(f"passing over checkpoint {path}: {damage}")
            continue
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            found = manifest.get("format", 1)
            return [
                None,
                f"{path}: checkpoint format {found}, this version reads {FORMAT}; start in another output.dir",
            ]
        world_size = torch.distributed.get_world_size()
        if manifest["world_size"] != world_size:
            return [
                None,
                f"{path}: written by {manifest['world_size']} processes, this run has {world_size}; "
                "resume with the same number, or start in another output.dir",
            ]
        changed = difference(manifest["terms"], terms)
        if changed:
            return [
                None,
                f"{path}: written with {changed}; put it back to resume, or start in another output.dir",
            ]
        return [path.name, None]
    return [None, None]


def _name(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _candidates(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if path.name != f"step-{manifest['step']:08d}":
            return f"its manifest is of step {manifest['step']}"
        for name, digest in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if _hash(file) != digest:
                return f"{name} does not match its hash"
        if manifest.get("format") == FORMAT:
            return state_damage(path, manifest["step"], manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
