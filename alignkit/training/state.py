"""What a run has learnt beside its weights: whatever has `state()` goes into every checkpoint, whole or absent with it.

A state is a flat dict of JSON values and tensors; JSON goes to state.json, tensors to state.safetensors.
"""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


def save_state(folder: Path, step: int, parts: dict[str, object]) -> None:
    """Write the states of those `parts` that have one, and the step they belong to. For the first process alone."""
    plain: dict[str, dict] = {}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, Stateful):
            state = part.state()
            tensors |= {
                f"{name}/{key}": value.detach().cpu().contiguous()
                for key, value in state.items()
                if isinstance(value, Tensor)
            }
            plain[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    write_json(folder / STATE, {"step": step, "parts": plain})
    save_file(tensors, folder / TENSORS)


def load_state(folder: Path, parts: dict[str, object]) -> None:
    """Give every part of `parts` that has a state the one that `save_state` wrote for it. Every process calls this."""
    states = json.loads((folder / STATE).read_text())["parts"]
    for name, tensor in load_file(folder / TENSORS).items():
        part, _, key = name.partition("/")
        states[part][key] = tensor
    stateful = {name: part for name, part in parts.items() if isinstance(part, Stateful)}
    if stateful.keys() != states.keys():
        raise CheckpointError(
            f"{folder}: holds the states of {sorted(states) or 'nothing'}, this run has {sorted(stateful) or 'none'}; "
            "resume with what it was written with, or start in another output.dir"
        )
    for name, part in stateful.items():
        part.load_state(states[name])


def state_damage(folder: Path, step: int, listed: dict[str, str]) -> str | None:
    """Why the states in a checkpoint's folder do not belong to its step and manifest (`listed`: its files), or None."""
    for name in (STATE, TENSORS):
        if name not in listed:
            return f"its manifest lists no {name}"
    if not any(name.endswith(".pt") for name in listed):
        return "its manifest lists no state of the engine"
    found = json.loads((folder / STATE).read_text())["step"]
    return None if found == step else f"{STATE} is of step {found}"
