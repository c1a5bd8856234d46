"""What a run has learnt beside its weights: whatever has `state()` goes into every checkpoint, whole or absent with it.

A state is a flat dict of JSON values and tensors; JSON goes to state.json, tensors to state.safetensors. Tensors that
are shared out among the processes, `local_state()`, go to state-rank-N.safetensors, a file a process.
"""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import CheckpointError
from alignkit.files import write_json

STATE, TENSORS = "state.json", "state.safetensors"


@runtime_checkable
class Stateful(Protocol):
    def state(self) -> dict[str, Any]:
        """JSON values and tensors by name, the same on every process."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


@runtime_checkable
class SharedOut(Stateful, Protocol):
    def local_state(self) -> dict[str, Tensor]:
        """This process's own tensors by name."""

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what this process's `local_state` returned; every process calls it, after `load_state`."""


def rank_file(rank: int) -> str:
    return f"state-rank-{rank}.safetensors"


def save_state(folder: Path, step: int, parts: dict[str, object]) -> None:
    """Write the states of those `parts` that have one, and the step they belong to. For the first process alone."""
    plain: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, Stateful):
            state = part.state()
            tensors |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            plain[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    shared_out = any(isinstance(part, SharedOut) for part in parts.values())
    ranks = torch.distributed.get_world_size() if shared_out else 0
    write_json(folder / STATE, {"step": step, "parts": plain, "rank_files": ranks})
    save_file(_stored(tensors), folder / TENSORS)


def save_local_state(folder: Path, step: int, parts: dict[str, object]) -> None:
    """Write what this process holds of the states that are shared out, if there are any. Every process calls this."""
    held = {name: part.local_state() for name, part in parts.items() if isinstance(part, SharedOut)}
    if held:
        tensors = {f"{name}/{key}": value for name, state in held.items() for key, value in state.items()}
        file = folder / rank_file(torch.distributed.get_rank())
        save_file(_stored(tensors), file, metadata={"step": str(step)})


def _stateful(parts: dict[str, object]) -> dict[str, Stateful]:
    return {name: part for name, part in parts.items() if isinstance(part, Stateful)}


def check_states(folder: Path, parts: dict[str, object]) -> None:
    """Raises CheckpointError where a checkpoint holds other states than those of `parts`."""
    stored, wanted = (sorted(names) for names in (json.loads((folder / STATE).read_text())["parts"], _stateful(parts)))
    if stored != wanted:
        raise CheckpointError(
            f"{folder}: holds the states of {stored or 'nothing'}, this run has {wanted or 'none'}; resume with what "
            "it was written with, or start in another output.dir"
        )


def load_state(folder: Path, parts: dict[str, object], ranks: int | None = None) -> None:
    """Give every part of `parts` that has a state the one that was saved for it. Every process calls this.

    ranks: how many processes saved it, where that is another number than now.
    """
    check_states(folder, parts)
    states = json.loads((folder / STATE).read_text())["parts"]
    for name, tensor in load_file(folder / TENSORS).items():
        owner, _, key = name.partition("/")
        states[owner][key] = tensor
    for name, part in _stateful(parts).items():
        part.load_state(states[name])
    shared_out = {name: part for name, part in parts.items() if isinstance(part, SharedOut)}
    if not shared_out:
        return
    wanted = range(ranks) if ranks else [torch.distributed.get_rank()]
    files = [load_file(folder / rank_file(rank)) for rank in wanted]
    held: dict[str, dict[str, Tensor]] = {name: {} for name in shared_out}
    for name in files[0]:
        owner, _, key = name.partition("/")
        held[owner][key] = torch.cat([file[name] for file in files]) if ranks else files[0][name]
    for name, shared in shared_out.items():
        if not ranks:
            shared.load_local_state(held[name])
        elif hasattr(shared, "load_whole_state"):  # of what all had: by name, their parts one after the other
            shared.load_whole_state(held[name])
        else:
            raise CheckpointError(
                f"{folder}: the state of {name} cannot be shared out among another number of processes"
            )


def state_damage(folder: Path, step: int, listed: dict[str, str]) -> str | None:
    """Why the states in a checkpoint's folder do not belong to its step and manifest (`listed`: its files), or None."""
    for name in (STATE, TENSORS):
        if name not in listed:
            return f"its manifest lists no {name}"
    if not any(name.endswith(".pt") for name in listed):
        return "its manifest lists no state of the engine"
    state = json.loads((folder / STATE).read_text())
    found = {STATE: state["step"]}
    for name in map(rank_file, range(state.get("rank_files", 0))):
        if name not in listed:
            return f"its manifest lists no {name}"
        with safe_open(folder / name, "pt") as file:
            found[name] = int(file.metadata()["step"])
    return next((f"{name} is of step {other}" for name, other in found.items() if other != step), None)


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
