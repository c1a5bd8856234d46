"""Writes the trained model as a plain diffusers folder, from the engine's fp32 master weights."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from alignkit.progress import say


def export_folder(config) -> Path:
    return config.output.dir / "export"


def export(model, weights: dict[str, Tensor], target: Path) -> None:
    """Write `target` as a diffusers folder: `model`'s own with the transformer's weights replaced by `weights` (fp32).

    In bf16 most of a small update would round back to the base. The folder appears whole or not at all; one
    that was there before is replaced only after the new one is complete.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(
        model.local_folder(), partial, ignore=lambda _, names: [n for n in names if n in ("transformer", ".cache")]
    )
    with torch.device("meta"):
        fresh = type(model.transformer).from_config(model.transformer.config)
    result = fresh.load_state_dict(weights, strict=True, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    fresh.save_pretrained(partial / "transformer")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    say(f"exported to {target}")
