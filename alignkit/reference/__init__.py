"""docs/reference/, written from the code that it describes: `python -m alignkit.reference`."""

from collections.abc import Callable
from pathlib import Path

from alignkit.files import write_atomically
from alignkit.reference import commands, configuration, kernels

PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands.page,
    "configuration.md": configuration.page,
    "kernels.md": kernels.page,
}
FOLDER = Path(__file__).parent.parent.parent / "docs" / "reference"


def write_pages() -> None:
    """Write every page of docs/reference/ anew."""
    for name, page in PAGES.items():
        write_atomically(FOLDER / name, page().encode())
