"""The templates for Slurm: whole as scripts, and run as Slurm would run them, with a stand-in for srun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit.stores.store import missing_blocks, read_info

FOLDER = Path(__file__).parent.parent / "configs" / "slurm"
TEMPLATES = sorted(FOLDER.glob("*.sbatch"))
# Starts the command once a task, with the variables that Slurm sets for each; options of srun's own are passed over.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""


@pytest.fixture
def sbatch(tmp_path, stand_in):
    """`sbatch("train", *words, SLURM_NTASKS=2)` starts a template as Slurm's first node would, with these variables."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "alignkit": f'#!/bin/bash\nexec {sys.executable} -m alignkit "$@"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start(name: str, *words, **variables) -> subprocess.Popen:
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        environment |= stand_in | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
        command = ["bash", str(FOLDER / f"{name}.sbatch"), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes)

    return start


def test_there_is_one_for_each_stage_of_many_processes():
    assert [file.stem for file in TEMPLATES] == ["pairs", "rollouts", "samples", "train"]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_each_is_whole_and_says_how_it_is_used(file, tmp_path):
    subprocess.run(["bash", "-n", str(file)], check=True)
    lines = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in lines) and len(lines) > 5
    result = subprocess.run(["bash", str(file)], capture_output=True, text=True)
    assert result.returncode != 0 and f"usage: sbatch {file.name} CONFIG" in result.stderr


def test_each_job_samples_and_then_measures(sbatch, tmp_path):
    """That the jobs of an array share either's work: tests/evaluation/test_shared_work.py."""
    (tmp_path / "programs" / "alignkit").write_text("#!/bin/bash\necho alignkit $*\n")
    job = sbatch("samples", "runs/mine", "sample.count=2", SLURM_NTASKS=1)
    words = "runs/mine sample.count=2"
    assert job.communicate(timeout=60)[0].splitlines() == [f"alignkit {name} {words}" for name in ("sample", "eval")]
    assert job.returncode == 0


def test_two_tasks_train_as_one_run(sbatch, run_with_pairs, config_file):
    config, settings = run_with_pairs("run", "train.steps=1")
    job = sbatch("train", config_file, *settings, SLURM_NTASKS=2, SLURM_STEP_ID=0)
    text = job.communicate(timeout=280)[0]
    assert job.returncode == 0, text
    assert text.count("training on 2 process(es)") == 1
    assert list((config.output.dir / "train/checkpoints").glob("step-00000001/*rank_1*optim_states.pt"))


@pytest.mark.parametrize("name", ["pairs", "rollouts"])
def test_the_jobs_of_an_array_share_the_work(sbatch, overrides, rollout_overrides, config_file, tmp_path, name):
    out = tmp_path / "run"
    settings = overrides(out) if name == "pairs" else rollout_overrides(out)
    jobs = [
        sbatch(name, config_file, *settings, SLURM_NTASKS=1, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_MIN=0)
        for task in (0, 1)
    ]
    texts = [job.communicate(timeout=280)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], texts
    folder = out / "pairs" / "train" if name == "pairs" else out / "rollouts"
    assert not missing_blocks(folder, read_info(folder, name))
