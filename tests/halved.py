"""The shipped bases with half of their blocks: for runs that train and need no good samples, in half the time."""

import json
import re
import shutil
from pathlib import Path


def halve(family: str, folder: Path) -> Path:
    """`folder`, made of what ships for "wan" or "cogvideox", the transformer with the first half of its blocks."""
    from safetensors.torch import load_file, save_file

    from alignkit.models import shipped_model

    shutil.copytree(shipped_model(family), folder)
    config = folder / "transformer" / "config.json"
    architecture = json.loads(config.read_text())
    kept = architecture["num_layers"] // 2
    config.write_text(json.dumps(architecture | {"num_layers": kept}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    own = {name: value for name, value in load_file(weights).items() if _block(name) < kept}
    save_file(own, weights, {"format": "pt"})
    return folder


def _block(name: str) -> int:
    """-1: of no block."""
    found = re.match(r"(?:transformer_)?blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1
