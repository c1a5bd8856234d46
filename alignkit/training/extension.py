"""DeepSpeed's CPU communication, which torch compiles at its first use: built once for an environment, and said.

Torch leaves that to whichever `ninja` is first on the PATH, and two of them rebuild what the other one built; and to a
file that a killed build leaves behind, on which every later start waits without a word.
"""

import os
import sys
from pathlib import Path

import torch

from alignkit.progress import say
from alignkit.sharing import one_at_a_time

NAME = "deepspeed_shm_comm"


def load_cpu_communication() -> None:
    """Load it, built first where it is not there yet; processes of one machine take turns. Call before the process
    group is made, and on a CPU alone."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):  # as DeepSpeed asks
        return
    folder = _build_folder()
    with one_at_a_time(folder / ".building.lock"):
        for left in folder.glob("*/lock"):  # of a build that was killed: who builds here has the other lock
            left.unlink(missing_ok=True)
        if not (folder / NAME / f"{NAME}.so").exists():
            say("building DeepSpeed's CPU communication (once, about half a minute)")
        builder.load(verbose=False)


def _build_folder() -> Path:
    """The environment's own folder, and its own `ninja` first on the PATH."""
    programs = Path(sys.prefix) / "bin"
    if (programs / "ninja").exists():
        others = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place != str(programs)]
        os.environ["PATH"] = os.pathsep.join([str(programs), *others])
    own = Path(sys.prefix) / "share" / "alignkit" / f"torch-{torch.__version__}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        writable = os.access(own, os.W_OK)
    except OSError:
        writable = False
    version = f"torch-{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
    home = Path.home() / ".cache" / "alignkit" / version
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own if writable else home)))
