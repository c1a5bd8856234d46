"""docs/reference/: what the code says of itself, all of it, and no older than the code."""

import inspect
from pathlib import Path

import pytest

import alignkit_kernels
from alignkit.reference import PAGES
from alignkit.reference.configuration import sections
from alignkit_kernels import losses

FOLDER = Path(__file__).parent.parent / "docs" / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says_now(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "make reference writes it anew"


def test_every_key_is_described():
    found = [(name, section) for name, _, section in sections()]
    assert {"train", "pairs.mask", "ranker.endpoint", "train.lora", "stages"} <= {name for name, _ in found}
    for name, section in found:
        assert section.__doc__, f"{name}: its class says what the section is for"
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}: Field(..., description=...)"


def test_every_public_name_of_the_kernels_is_explained():
    names = {getattr(module, name) for module in (alignkit_kernels, losses) for name in module.__all__}
    silent = [thing for thing in names if (inspect.isclass(thing) or inspect.isfunction(thing)) and not thing.__doc__]
    assert not silent
