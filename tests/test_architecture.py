"""The layout: who may import whom, one copy of noise and losses, and what the wheel holds."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alignkit"
# A layer may import the ones below it, never those above.
LAYERS = [
    {"errors", "config", "files", "json_text", "launch", "moment", "progress", "remembered", "sharing"},
    {"schedules", "models", "media", "tiny"},
    {"stores"},
    {"apo", "given", "localdpo", "objectives"},
    {"training"},
    {"evaluation", "report", "rankers"},
    {"stages"},
    {"commands", "doctor", "experiments", "planning", "preparing"},
    {"demo"},
    {"cli"},
    {"__main__", "reference"},
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str | None:
    """ "alignkit.stores.pairs" to "data"."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "alignkit" and len(pieces) > 1 else None


def test_arrows_point_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for file in PACKAGE.rglob("*.py"):
        own = part(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if own == "__init__":
            continue
        assert own in level, f"{file}: place {own!r} in LAYERS"
        for name in imports(file):
            other = part(name)
            if other in level:
                assert level[other] <= level[own], f"{file} imports {name}, which lies above it"


def test_kernels_import_nothing_of_ours_and_only_torch_and_triton():
    allowed = {"torch", "triton", "alignkit_kernels"} | set(sys.stdlib_module_names)
    for file in (ROOT / "kernels").rglob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] in allowed, f"{file} imports {name}"


def test_family_differences_stay_in_models():
    for file in PACKAGE.rglob("*.py"):
        if file.is_relative_to(PACKAGE / "models") or file.is_relative_to(PACKAGE / "tiny"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not words & {"wan", "cogvideox"}, f"{file}:{node.lineno} compares with a family's name"


def test_noise_and_loss_are_called_only_through_the_kernels():
    """No generator of random latents and no squared error outside alignkit_kernels (but to train the tiny weights)."""
    forbidden = ("torch.randn", "randn_like", "mse_loss", ".normal_(", "logsigmoid", "add_noise(")
    for file in PACKAGE.rglob("*.py"):
        if not file.is_relative_to(PACKAGE / "tiny"):
            for word in forbidden:
                assert word not in file.read_text(), f"{file} uses {word}"


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"] == [
        "alignkit_kernels"
    ]


@pytest.mark.parametrize("blocked", ["diffusers", "deepspeed"])
def test_the_kernels_import_without_the_rest(blocked):
    code = f"import sys; sys.modules['{blocked}'] = None; import alignkit_kernels; print(len(alignkit_kernels.__all__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) > 5, result.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """The two distributions, by the folder of each."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT), str(ROOT / "kernels")], check=True, capture_output=True, timeout=300)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def test_each_wheel_holds_its_own_package_and_what_it_needs(wheels):
    assert set(wheels) == {"alignkit", "alignkit_kernels"}
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.split("/")[0] for name in names} == {name, f"{name}-0.1.0.dist-info"}
    names = zipfile.ZipFile(wheels["alignkit"]).namelist()
    families = ("wan", "cogvideox")
    for family in families:
        assert {f"alignkit/configs/{family}-tiny-{method}.yaml" for method in ("localdpo", "apo")} <= set(names)
        assert f"alignkit/tiny/{family}/model_index.json" in names
    assert wheels["alignkit"].stat().st_size < 2e6 + 10e6 * len(families)
    for name, wheel in wheels.items():
        assert f"{name}/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert wheels["alignkit_kernels"].stat().st_size < 2e5


def test_the_light_wheel_works_with_torch_alone(wheels, tmp_path):
    """Unpacked beside nothing of this checkout: a loss and its gradient."""
    zipfile.ZipFile(wheels["alignkit_kernels"]).extractall(tmp_path)
    code = """
import sys, torch
for name in ("alignkit", "diffusers", "deepspeed", "numpy", "triton"):
    sys.modules[name] = None
import alignkit_kernels as k
assert k.__file__.startswith(sys.argv[1]), k.__file__
x = torch.randn(2, 2, 2, 4, 4, requires_grad=True)
rows = k.flow_coefficients(torch.tensor([0.5]))
key = k.NoiseKey(0, torch.tensor([1]), 0)
clean = torch.zeros(1, 2, 2, 4, 4)
k.preference_loss(x, reference_w=clean, reference_l=clean, clean_w=clean, clean_l=clean, coefficients=rows,
                  noise_w=key).loss.backward()
print(bool(x.grad.abs().max() > 0))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout == "True\n", result.stderr


def test_the_two_distributions_have_one_version_and_the_heavy_one_needs_the_light_one():
    heavy, light = (tomllib.loads((ROOT / at / "pyproject.toml").read_text())["project"] for at in (".", "kernels"))
    assert heavy["version"] == light["version"]
    assert heavy["dependencies"] == [f"{light['name']}=={light['version']}"]


def test_the_installed_command_finds_its_package_from_anywhere(tmp_path):
    """An editable install once left a folder that hid the package wherever the checkout was not the working folder."""
    code = "import alignkit.__main__, alignkit_kernels; from alignkit.config import shipped_config\n"
    code += "shipped_config('wan-tiny-localdpo.yaml')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
