"""DeepSpeed's CPU communication, which torch compiles at its first use: built once for an environment, and said.

Torch leaves that to whichever `ninja` is first on the PATH, and two of them rebuild what the other one built; and to a
file that a killed build leaves behind, on which every later start waits without a word.
"""

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from alignkit.errors import ConfigError, DataError
from alignkit.launch import first_of_several
from alignkit.progress import say
from alignkit.sharing import one_at_a_time

NAME = "deepspeed_shm_comm"
ELSEWHERE = "set TORCH_EXTENSIONS_DIR to a folder that can be written"


def load_cpu_communication() -> None:
    """Load it, built first where it is not there yet; processes of one machine take turns. Call before the process
    group is made, and on a CPU alone. Raises ConfigError where there is no folder for it."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):  # as DeepSpeed asks
        return
    folder = _build_folder()
    lock, built = folder / ".building.lock", folder / NAME / f"{NAME}.so"
    waiting = f"waiting for another process, which builds DeepSpeed's CPU communication and holds {lock}"
    with ExitStack() as held:
        try:
            held.enter_context(one_at_a_time(lock, "" if built.exists() or not first_of_several() else waiting))
        except (OSError, DataError) as error:  # DataError: a file system without locks
            why = error.strerror if isinstance(error, OSError) else "no locks there"
            raise ConfigError(
                f"{folder}: DeepSpeed's CPU communication cannot be built there ({why}); {ELSEWHERE}"
            ) from None
        for left in folder.glob("*/lock"):  # of a build that was killed: who builds here has the other lock
            left.unlink(missing_ok=True)
        if not built.exists():
            say("building DeepSpeed's CPU communication (once, about half a minute)")
        builder.load(verbose=False)


def _build_folder() -> Path:
    """The environment's own folder, and its own `ninja` first on the PATH."""
    programs = Path(sys.prefix) / "bin"
    if (programs / "ninja").exists():
        others = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place != str(programs)]
        os.environ["PATH"] = os.pathsep.join([str(programs), *others])
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_own_folder())
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def _own_folder() -> Path:
    """The environment's, or the user's where that one cannot be written. Raises ConfigError where there is no home."""
    own = Path(sys.prefix) / "share" / "alignkit" / f"torch-{torch.__version__}"
    with suppress(OSError):
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return own
    version = f"torch-{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
    try:
        return Path.home() / ".cache" / "alignkit" / version
    except RuntimeError:  # pathlib's, of a user without a home
        raise ConfigError(
            f"{own}: DeepSpeed's CPU communication cannot be built there, and there is no home; {ELSEWHERE}"
        ) from None
