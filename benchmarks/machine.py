"""What every row says about where it was measured."""

import os
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def output_of(command: list[str]) -> str:
    """What a command prints; nothing where it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


@lru_cache
def machine() -> dict[str, str]:
    """Time, commit, device, driver, versions, and whether Triton kernels or the reference path run here."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = output_of(query)
        device, path = torch.cuda.get_device_name(), "Triton kernels"
    else:
        device, driver, path = f"CPU, {torch.get_num_threads()} threads", "none", "reference path on CPU, no kernels"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = os.environ.get("COMMIT") or output_of(describe)  # a copy of the tree without its history is told
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "device": device, "driver": driver,
        "torch": torch.__version__, "triton": triton_version, "path": path,
    }  # fmt: skip
