"""Samples and measurements are shared between processes, kept, and the same bits whoever makes them."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from alignkit.commands import run_command
from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation import parts, samples
from alignkit.evaluation.samples import sample, samples_folder
from alignkit.evaluation.summary import evaluate
from alignkit.models import load_model
from alignkit.sharing import shared_folder
from alignkit.training.export import export, export_folder

CPU = torch.device("cpu")
SETTINGS = (
    "sample.count=3", "sample.batch_size=2", "sample.seeds=[0, 1]", "sample.num_inference_steps=3",
    "evaluation.positions=[0.3, 0.7]", "evaluation.batch_size=2",
)  # fmt: skip
VIDEOS = 2 * 3 * 2


def align(config, change: float) -> None:
    """As if a training had changed every weight by a share of itself."""
    model = load_model(config.model)
    weights = {name: weight * (1 + change) for name, weight in model.transformer.state_dict().items()}
    export(model, weights, export_folder(config))


@pytest.fixture(scope="module")
def done(made_pairs, overrides, config_file, tmp_path_factory):
    """A run that one process has sampled and measured."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    shutil.copytree(made_pairs, folder)
    config = load_config(config_file, overrides(folder, *SETTINGS))
    align(config, 0.02)
    run_command("sample", config)
    run_command("eval", config)
    return folder


@pytest.fixture
def again(done, overrides, config_file, tmp_path):
    """`again("samples", more=(...))`: (config, settings) of a copy of it without these, with more settings."""

    def copy(*without: str, more: tuple[str, ...] = ()):
        folder = tmp_path / "run"
        shutil.copytree(done, folder, ignore=lambda at, names: without if Path(at) == done else ())
        settings = overrides(folder, *SETTINGS, *more)
        return load_config(config_file, settings), settings

    return copy


@pytest.fixture
def sampled(monkeypatch):
    """What is sampled from now on: (seed, ids of a batch)."""
    made, latents = [], samples.sample_latents

    def watched(config, model, prompts, ids, seed, *rest):
        made.append((seed, ids))
        return latents(config, model, prompts, ids, seed, *rest)

    monkeypatch.setattr(samples, "sample_latents", watched)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Without locks, which a killed process leaves behind."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def results(folder: Path) -> list:
    summary = json.loads((folder / "summary.json").read_text())
    told = {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_gb")}
    made = [contents(folder / name) for name in ("samples", "measured", "regions")]
    return [told, (folder / "eval.json").read_bytes(), *made]


FRESH = ("samples", "measured", "regions", "eval.json", "summary.json", "stages.json")


def test_two_processes_make_the_same_bytes_as_one(done, again, command, config_file):
    config, settings = again(*FRESH)
    for name in ("sample", "eval"):
        result = command(name, config_file, *settings, "--nproc", "2")
        assert result.returncode == 0, result.stderr
    assert results(config.output.dir) == results(done)
    assert sum(name.endswith(".mp4") for name in contents(config.output.dir / "samples")) == VIDEOS


def test_what_killed_processes_sampled_is_kept_and_the_jobs_of_an_array_make_the_rest(
    done, again, start_command, config_file
):
    config, settings = again(*FRESH)
    child = start_command("sample", config_file, *settings, "--nproc", "2")
    while not (kept := list(samples_folder(config).rglob("seed*.mp4"))):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert len(kept) < VIDEOS
    before = {file: file.stat().st_mtime_ns for file in kept}
    for name in ("sample", "eval"):
        jobs = [
            start_command(
                name, config_file, *settings, env={"SLURM_ARRAY_TASK_ID": f"{task}", "SLURM_ARRAY_TASK_MIN": "4"}
            )
            for task in (4, 5, 6)
        ]
        texts = [job.communicate()[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0, 0], texts
        assert all("deleted" not in text for text in texts)
    assert results(config.output.dir) == results(done)
    assert before == {file: file.stat().st_mtime_ns for file in kept}


def test_a_sample_that_somebody_deleted_is_made_again_with_its_batch(done, again, sampled):
    config, _ = again()
    folder = samples_folder(config)
    (folder / "base" / "seed1-0000.mp4").unlink()
    with pytest.raises(DataError, match=r"base/seed1-0000.mp4: no such file; run 'alignkit sample'"):
        evaluate(config, CPU)
    sample(config, CPU, show=False)
    assert sampled == [(1, [0, 1])]
    wanted = contents(done / "samples")
    del wanted["maps.npz"]  # of what `eval` has seen
    assert contents(folder) == wanted


def test_more_samples_and_seeds_are_added_to_those_that_are_there(again, sampled, capsys):
    config, _ = again(more=("sample.count=4", "sample.seeds=[1, 0, 2]"))
    before = contents(samples_folder(config))
    (samples_folder(config) / "base" / "seed1-0002.mp4").unlink()  # its batch had another one less
    sample(config, CPU, show=False)
    assert sampled == 2 * [(1, [2, 3]), (0, [2, 3]), (2, [0, 1]), (2, [2, 3])]
    after = contents(samples_folder(config))
    assert all(after[name] == content for name, content in before.items() if name.endswith(".mp4"))
    assert "deleted" not in capsys.readouterr().err


def test_another_model_is_sampled_anew_which_is_said_and_the_base_is_not(again, sampled, capsys):
    config, _ = again()
    before = contents(samples_folder(config))
    shutil.rmtree(export_folder(config))
    align(config, -0.02)
    sample(config, CPU, show=False)
    assert len(sampled) == 4
    after = contents(samples_folder(config))
    changed = {name.partition("/")[0] for name in before if after.get(name) != before[name]}
    assert changed == {"aligned", "maps.npz"}
    told = [line for line in capsys.readouterr().err.splitlines() if "deleted" in line]
    folder = samples_folder(config) / "aligned"
    assert told == [f"{folder}: what is there was made under other terms (transformer); it is deleted"]


def test_parts_that_are_measured_are_kept(done, again, monkeypatch):
    config, _ = again()
    (config.output.dir / "measured" / "after-00001.safetensors").unlink()
    scored, score = [], parts.score_point
    monkeypatch.setattr(parts, "score_point", lambda *given: scored.append(given[5]) or score(*given))
    for name in ("again", "explained_share", "guided_text"):
        monkeypatch.setattr(parts, name, None)
    assert evaluate(config, CPU) is not None
    assert len(scored) == 1 and results(config.output.dir) == results(done)


def test_other_settings_are_measured_anew(again):
    config, _ = again(more=("evaluation.positions=[0.5, 0.7]",))
    old = contents(config.output.dir / "measured")
    assert evaluate(config, CPU, conclude=False) is None
    new = contents(config.output.dir / "measured")
    assert new.keys() == old.keys() and new["after-00000.safetensors"] != old["after-00000.safetensors"]


def test_what_others_are_making_under_other_terms_is_not_taken_away(tmp_path, command, capsys):
    folder = tmp_path / "folder"
    code = "import sys; from pathlib import Path; from alignkit.sharing import shared_folder\n"
    code += "with shared_folder(Path(sys.argv[1]), {'a': int(sys.argv[2])}, 'eval', 'file'): print('in')"
    with shared_folder(folder, {"a": 1}, "sample", "file"):
        (folder / "file").touch()
        (folder / "notes.txt").touch()
        other, same = (command(folder, word, python=("-c", code)) for word in "21")
        assert same.stdout == "in\n", same.stderr
        assert ConfigError.__name__ in other.stderr and "alignkit sample, process" in other.stderr
        assert (folder / "file").exists()
    with shared_folder(folder, {"a": 2}, "sample", "file"):
        assert not (folder / "file").exists() and (folder / "notes.txt").exists(), "somebody else's"
    assert "made under other terms (a); it is deleted" in capsys.readouterr().err
