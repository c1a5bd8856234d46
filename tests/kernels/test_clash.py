"""The source root `kernels/` must not shadow the hub package of the same name, which transformers imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """
class Meta(type):
    def __getattr__(cls, name):
        return Anything()

class Anything(metaclass=Meta):
    def __init__(self, *args, **options):
        pass

    def __call__(self, decorated):
        return decorated

    def __or__(self, other):
        return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""
PROGRAM = """
from transformers.integrations import hub_kernels
import transformers.models.umt5.modeling_umt5, alignkit_kernels, kernels
assert hub_kernels.is_kernels_available(), "transformers does not see the stand-in"
print(kernels.__file__)
"""


@pytest.fixture
def hub_package(tmp_path) -> Path:
    """A stand-in for the hub package, of a version that transformers accepts."""
    pytest.importorskip("transformers", reason="without transformers nothing imports the hub package")
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (info / "RECORD").write_text("")
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    return tmp_path


def imported_from(root: Path, hub_package: Path) -> subprocess.CompletedProcess:
    """What `python -c` in a checkout's root imports: the working directory comes first on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "kernels"), str(hub_package)])}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_hub_package_is_not_shadowed(hub_package):
    answer = imported_from(ROOT, hub_package)
    assert answer.returncode == 0, answer.stderr[-1500:]
    assert answer.stdout.strip() == str(hub_package / "kernels" / "__init__.py")


def test_an_init_file_in_the_source_root_would_shadow_it(hub_package, tmp_path):
    """The fault that the layout avoids, planted in a copy: this is what the test above protects from."""
    copy = tmp_path / "checkout"
    (copy / "kernels").mkdir(parents=True)
    (copy / "kernels" / "alignkit_kernels").symlink_to(ROOT / "kernels" / "alignkit_kernels")
    (copy / "kernels" / "__init__.py").write_text("")
    answer = imported_from(copy, hub_package)
    assert answer.returncode != 0 or str(hub_package / "kernels") not in answer.stdout


def test_the_source_root_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
