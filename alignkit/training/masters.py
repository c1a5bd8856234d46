"""What a stage hands on to the next: the fp32 weights that it trained, in one file that appears whole or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from alignkit.errors import CheckpointError
from alignkit.files import put_in_place, write_json
from alignkit.moment import end_if_of_the_moment

MASTERS, RECORD = "masters.safetensors", "masters.json"


def hand_on(folder: Path, weights: dict[str, Tensor], terms: dict[str, Any], steps: int) -> str:
    """Write `weights`, fp32 by name, and how they were trained; returns the file's digest. For the first process
    alone."""
    partial = folder / f".partial-{MASTERS}"
    save_file({name: value.contiguous() for name, value in weights.items()}, partial)
    (folder / RECORD).unlink(missing_ok=True)
    put_in_place(partial, folder / MASTERS)
    digest = _digest(folder / MASTERS)
    write_json(folder / RECORD, {"terms": terms, "steps": steps, "sha256": digest})
    return digest


def handed_on(folder: Path) -> dict[str, Any] | None:
    """Terms, steps and digest ("sha256") of what the stage in `folder` handed on, None while it has not.

    Raises CheckpointError for a file that is not as it was written.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = record["sha256"] == _digest(folder / MASTERS)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        end_if_of_the_moment(folder / RECORD, error)
        raise CheckpointError(f"{folder / RECORD}: {error}; delete it, and the stage is finished again") from None
    if not whole:
        raise CheckpointError(f"{folder / MASTERS}: damaged; delete {RECORD}, and the stage is finished again")
    return record


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
