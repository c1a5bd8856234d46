"""Where a configuration is: in a file, in a run's folder, or among those that come with alignkit."""

import difflib
from pathlib import Path

from alignkit.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "configs"
"""The checkout's `configs/`, which a link makes part of the package."""
METHODS = ("localdpo", "apo")
"""How the names of shipped configurations of a run end; one that leaves it out means the first."""
RUN_FILE = "config.yaml"
"""What a run's settings are kept as in its output.dir."""


def shipped_configs() -> dict[str, str]:
    """Every configuration of a run that comes with alignkit, by name, with its first line of comment."""
    files = {file.stem: file for method in METHODS for file in FOLDER.glob(f"*-{method}.yaml")}
    return {name: files[name].read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name in sorted(files)}


def full_name(name: str) -> str:
    """The shipped configuration that `name` means: wan2.1-14b is wan2.1-14b-localdpo.

    Raises ConfigError, which names the nearest, where there is none.
    """
    full = _meant_by(name)
    if full is None:
        raise ConfigError(f"{name}: no configuration of this name comes with alignkit; {_nearest(name)}")
    return full


def shipped_config(name: str) -> Path:
    """Path of a file of `configs/`. Raises ConfigError where it is not there."""
    path = FOLDER / name
    if not path.is_file():
        raise ConfigError(f"{path}: this configuration should come with alignkit but is missing; reinstall it")
    return path


def find_config(given: Path) -> Path:
    """The file that is meant by a file's path, the folder of a run or a shipped name, whichever there is, in this
    order. Raises ConfigError where there is none, but for what is plainly the path of a file."""
    if given.is_file():
        return given
    if (given / RUN_FILE).is_file():
        return given / RUN_FILE
    name = str(given)
    if full := _meant_by(name):
        return shipped_config(f"{full}.yaml")
    if given.is_dir():
        raise ConfigError(f"{given}: a folder without {RUN_FILE}, so not of a run that has begun; give its YAML file")
    if len(given.parts) == 1 and given.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{name}: no file, no folder of a run, and no configuration of this name comes with alignkit; "
            f"{_nearest(name)}"
        )
    return given


def _meant_by(name: str) -> str | None:
    names = shipped_configs()
    return next((full for full in (name, *(f"{name}-{method}" for method in METHODS)) if full in names), None)


def _nearest(name: str) -> str:
    names = list(shipped_configs())
    short = dict.fromkeys(known.rpartition("-")[0] for known in names)
    near = difflib.get_close_matches(name.lower(), [*names, *short], n=3)
    return f"did you mean {' or '.join(near)}?" if near else "alignkit configs lists them"
