"""A checkpoint for another number of processes, by DeepSpeed's universal form of it: a folder for each parameter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from alignkit.errors import CheckpointError
from alignkit.launch import GROUP


def universal_form(checkpoint: Path, terms: dict[str, Any]) -> Path:
    """Converts a whole checkpoint; returns the new folder beside it. For the first process alone.

    Raises CheckpointError for states that DeepSpeed's conversion does not know: only AdamW's own, in fp32, are.
    """
    given = terms["deepspeed"].get("config", {})
    if "optimizer" in given:
        raise CheckpointError(
            f"{checkpoint}: states of deepspeed.config.optimizer ({given['optimizer'].get('type')}) cannot be "
            "converted; resume with the number of processes that it was written by"
        )
    kind = terms.get("train.optimizer", "adamw")
    if kind != "adamw":
        raise CheckpointError(
            f"{checkpoint}: moments of train.optimizer {kind!r} cannot be converted, only those of adamw; resume with "
            "the number of processes that it was written by"
        )
    target = checkpoint.with_name(f".universal-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    module = "deepspeed.checkpoint.ds_to_universal"
    command = [sys.executable, "-m", module, "--input_folder", str(checkpoint), "--output_folder", str(target)]
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    # what ZeRO-2 leaves out of a checkpoint and the conversion asks for
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{checkpoint}: cannot be converted for another number of processes: {lines[-1]}")
    return target


def load_universal(engine: Any, folder: Path, tag: str) -> None:
    """Loads what `universal_form` made; every process calls this."""
    settings = engine._config  # the flag is of the configuration that an engine is made with, and read when it loads
    settings.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    finally:
        settings.load_universal_checkpoint = False
