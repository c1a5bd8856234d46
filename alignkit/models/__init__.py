"""Model families. What is particular to one lives in its module here and nowhere else."""

from pathlib import Path
from types import ModuleType

from alignkit.config import ModelSection
from alignkit.errors import ModelError


def shipped_model(family: str) -> Path:
    """Folder of the small model of that family that comes with alignkit."""
    return Path(__file__).parent.parent / "tiny" / family


def family_module(name: str) -> ModuleType:
    """The module that knows the family `name`."""
    from alignkit.models import wan

    return {"wan": wan}[name]


def load_model(section: ModelSection, *, with_transformer: bool = True, with_encoders: bool = True):
    """Load the parts of `section`'s model that are asked for, in fp32 on CPU.

    Raises ModelError when files are missing, damaged or of another family.
    """
    path = str(shipped_model(section.family)) if section.path == "tiny" else section.path
    local = Path(path)
    if path.startswith((".", "/", "~")) and not local.expanduser().is_dir():
        raise ModelError(f"model.path: {path}: no such folder")
    if local.expanduser().is_dir():
        path = str(local.expanduser())
    module = family_module(section.family)
    return module.load(
        path,
        revision=section.revision,
        max_sequence_length=section.max_sequence_length,
        with_transformer=with_transformer,
        with_encoders=with_encoders,
    )
