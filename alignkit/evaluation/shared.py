"""What processes that sample or measure together agree on, and how they share it out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit.config import ModelSection
from alignkit.models import load_model
from alignkit.progress import progress
from alignkit.sharing import share_out
from alignkit.stores.folders import encoding_terms

PARTS = ("transformer", "vae", "text_encoder")


def model_terms(section: ModelSection, num_steps: int) -> dict[str, Any]:
    """What a model's results depend on by name: its weights, its schedule of so many steps, and how it is run."""
    model = load_model(section, with_transformer=False, with_encoders=False)
    run_as = {"dtype", "attention", "max_sequence_length", "expert", "guidance_scale_2"}
    return {
        **{part: model.fingerprint(part) for part in PARTS},
        "schedule": model.schedule(num_steps).fingerprint,
        **section.model_dump(mode="json", include=run_as),
        **encoding_terms(section),
    }


def share_out_shown(
    files: list[Path], make: Callable[[int], None], title: str, *, show: bool, counted: list[Path] | None = None
) -> None:
    """`share_out` with a bar of how many of `counted` are there; None: of `files`."""
    counted = files if counted is None else counted
    shown = _there(counted)
    with progress(title, len(counted), done=shown, show=show) as bar:

        def look() -> None:
            nonlocal shown
            before, shown = shown, _there(counted)
            if shown > before:
                bar.advance(shown - before)

        share_out(files, make, look)


def _there(files: list[Path]) -> int:
    return sum(file.exists() for file in files)
