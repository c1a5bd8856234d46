"""Three newcomers walk the site in a fresh clone: the commands and programs of their page, in order, as they stand.

    python tests/docs/walk.py                        # with what their pages have them install; writes docs/walk.md
    python tests/docs/walk.py --here --only large    # with this environment's packages; nothing written

A block that fails ends it; what a page says that a command prints is not compared. What no machine
of ours has is stood in for: sbatch starts the script at once (of an array its first task), srun as many tasks here, two
in a job of several, and both are given the small model and small sizes.
"""

import argparse
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from doc_blocks import ROOT, Block, blocks_of

PAGE = ROOT / "docs" / "walk.md"
SHOWN = 8  # lines of what a block printed, of which the page shows more only where they are few
SMALL = (
    "model.max_sequence_length=64", "data.height=32", "data.width=32", "data.num_frames=9",
    "data.heldout=0.2", "pairs.num_inference_steps=4", "pairs.strengths=[3]", "pairs.block_size=4",
    "train.global_batch_size=4", "train.steps=24", "sample.num_inference_steps=4", "sample.count=2", "sample.seeds=[0]",
)  # fmt: skip
SBATCH = f"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
script=$1 config=$2; shift 2
set -- "$config" {" ".join(SMALL)} "$@" model.path=tiny  # typed settings count, the model's place does not
export SLURM_JOB_ID=$$ SLURM_NTASKS=2
if grep -q '^#SBATCH --array' "$script"; then export SLURM_NTASKS=1 SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_MIN=0; fi
bash "$script" "$@"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive  # a core each
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_STEP_ID=0 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait -n || { code=$?; kill "${pids[@]}"; exit $code; }; done
"""
MACHINE = re.compile(r"(?<![\w.:])/(?:tmp|root|home|work|var/tmp)\b")  # none of its places belongs on a page
MOST = 1800  # seconds of a block


@dataclass(frozen=True)
class Role:
    """page: of docs/. has: what this newcomer has installed before. clips: how many videos."""

    who: str
    page: str
    has: tuple[str, ...] = ()
    clips: int = 0


ROLES = {
    "videos": Role("Somebody with a folder of videos, and nothing installed", "start.md", clips=100),
    "losses": Role(
        "Somebody with a trainer on diffusers, accelerate and transformers, who wants the loss alone",
        "recipes/losses.md",
        has=("diffusers", "accelerate", "transformers"),
    ),
    "large": Role(
        "Somebody with Slurm and four machines, who has installed it for training", "recipes/large.md",
        has=("./kernels", ".[train]"), clips=24,
    ),
}  # fmt: skip


@dataclass
class Walk:
    """One newcomer's: where, with which programs, and what came of each block."""

    clone: Path
    path: str
    told: list[str] = field(default_factory=list)
    lines: int = 0
    seconds: float = 0.0

    @property
    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return own | {"PATH": self.path, "PIP_QUIET": "3", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}

    def has(self, module: str) -> bool:
        """Installed, or beside the examples."""
        code = f"from importlib.util import find_spec; raise SystemExit(find_spec({module!r}) is None)"
        environment = self.environment | {"PYTHONPATH": "examples/another_trainer"}
        return not subprocess.run(["python", "-c", code], cwd=self.clone, env=environment, check=False).returncode

    def bash(self, text: str) -> str:
        """What a block prints. Raises RuntimeError where it fails."""
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", text], cwd=self.clone, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=MOST,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{text}\n{done.stdout}")
        return done.stdout

    def typed(self, text: str, shown: str) -> None:
        begun = time.monotonic()
        said = self.bash(text)
        took = time.monotonic() - begun
        self.seconds += took
        self.lines += len(shown.splitlines())
        self.told.append(f"```text\n{shown}\n{shortened(self.without_places(said))}```\n\n{took:.0f} s\n")

    def note(self, words: str) -> None:
        self.told.append(f"*{words}*\n")

    def without_places(self, said: str) -> str:
        for place, name in ((f"{self.clone}/", ""), (str(self.clone), "."), (str(self.clone.parent), "…")):
            said = said.replace(place, name)
        return said.replace(str(Path.home()), "~").replace(socket.gethostname(), "this-machine")


def shortened(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    if len(lines) > 2 * SHOWN:
        lines = [*lines[:2], f"… ({len(lines) - SHOWN - 2} lines)", *lines[-SHOWN:]]
    return "".join(f"{line[:200]}\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--here", action="store_true", help="use this environment's packages, and write no page")
    arguments = parser.parse_args()
    walks = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            walks[name] = walk(ROLES[name], Path(folder), arguments.here)
        print(f"{name}: {walks[name].lines} lines typed, {walks[name].seconds / 60:.1f} minutes", flush=True)
    if not arguments.here and len(walks) == len(ROLES):
        text = page(walks)
        if found := MACHINE.search(text):
            raise SystemExit(f"the page would name a place of this machine: {text[found.start() :].splitlines()[0]}")
        PAGE.write_text(text)


def walk(role: Role, folder: Path, here: bool) -> Walk:
    clone, programs = folder / "alignkit", folder / "programs"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    packages = Path(sys.prefix) if here else folder / "venv"
    if not here:
        subprocess.run([sys.executable, "-m", "venv", str(packages)], check=True)
    places = (clone / ".venv" / "bin", packages / "bin", programs, Path(sys.base_prefix) / "bin", "/usr/bin", "/bin")
    found = Walk(clone, ":".join(map(str, places)))
    if role.has and not here:
        found.bash(f"pip install {' '.join(map(repr, role.has))}")
    if role.clips:
        from alignkit.tiny.clips import write_clips

        write_clips(clone / "clips", role.clips, seed=5)
    for block in blocks_of(clone / "docs" / role.page):
        step(found, block, here)
    return found


def step(found: Walk, block: Block, here: bool) -> None:
    if block.reason:
        found.note(f"Passed over: {block.reason}.")
    elif block.kind == "bash" and here and re.match(r"make |pip install", block.text):
        found.note("Passed over: it is installed.")
    elif block.kind == "bash":
        found.typed(block.text, "".join(f"$ {line}\n" for line in block.text.splitlines()).rstrip())
    elif block.kind == "python" and "--8<--" in block.text:
        (file,) = re.findall(r'--8<-- "(.+)"', block.text)
        wanted = set(re.findall(r"^(?:from|import) (\w+)", (found.clone / file).read_text(), re.M))
        missing = [name for name in sorted(wanted) if not found.has(name)]
        if missing:
            found.note(f"Passed over: {Path(file).name}, which is for those who have {', '.join(missing)}.")
        else:
            found.typed(f"python {file}", f"$ python {file}")
    elif block.kind == "python":
        found.typed(f"python - <<'END'\n{block.text}END\n", f"$ python\n{block.text}".rstrip())


def page(walks: dict[str, Walk]) -> str:
    rows = "".join(
        f"| {ROLES[name].who} | [{ROLES[name].page}]({ROLES[name].page}) | {found.lines} | {found.seconds / 60:.1f} |\n"
        for name, found in walks.items()
    )
    stories = "".join(f"\n## {ROLES[name].who}\n\n" + "\n".join(found.told) for name, found in walks.items())
    machine = f"{os.cpu_count()} cores ({platform.machine()}, Python {platform.python_version()})"
    return f"""# Walked by newcomers

<!-- written by tests/docs/walk.py -->

`make walk`: a fresh clone and a fresh environment for each; the commands and programs of a page in their order, typed
as they stand there, on {machine} without a GPU. Installing is in the minutes. Long
output is shortened. What no machine of ours has is stood in for: `sbatch` starts the script at once (of an array its
first task), `srun` two tasks on this machine, and both are given the small model and small sizes in the 14B's place.

| who | page | lines typed | minutes |
| --- | --- | --- | --- |
{rows}{stories}"""


if __name__ == "__main__":
    main()
