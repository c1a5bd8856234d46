"""What a run has learnt beside its weights is in every checkpoint, whole or absent with it."""

import hashlib
import json
import shutil

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import CheckpointError
from alignkit.objectives.beta import DECAY
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit.training.state import STATE, TENSORS, load_state, save_state

AUTO = ("objective={beta: auto, beta_min: 5, beta_max: 5000}", "train.learning_rate=1e-4")


@pytest.fixture
def process():
    return start_process()


def metrics(config) -> bytes:
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def rows_of(config):
    return read_metrics(train_folder(config) / "metrics.jsonl")


def longer(config, steps):
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


class Part:
    def __init__(self):
        self.numbers, self.word = torch.arange(3.0), "a"

    def state(self):
        return {"numbers": self.numbers, "word": self.word}

    def load_state(self, state):
        self.numbers, self.word = state["numbers"], state["word"]


def test_json_and_tensors_come_back_and_parts_without_a_state_are_passed_over(tmp_path):
    part, other = Part(), Part()
    part.numbers, part.word = torch.tensor([[0.1, 1e-30], [7.0, 2.0]], dtype=torch.float64).T, "b"
    save_state(tmp_path, 3, {"one": part, "none": None, "plain": object()})
    load_state(tmp_path, {"one": other, "none": None, "plain": object()})
    assert torch.equal(other.numbers, part.numbers) and other.numbers.dtype == torch.float64 and other.word == "b"


def test_other_parts_than_were_saved_are_refused(tmp_path):
    save_state(tmp_path, 3, {"one": Part()})
    for parts in ({}, {"one": Part(), "two": Part()}):
        with pytest.raises(CheckpointError, match=r"holds the states of \['one'\]"):
            load_state(tmp_path, parts)


def test_automatic_beta_follows_the_gaps_of_earlier_steps(run_with_pairs, process):
    config, _ = run_with_pairs("run", *AUTO)
    train(config, process)
    rows = rows_of(config)
    assert rows[0]["beta"] == rows[1]["beta"] == 5000, "nothing had moved in the steps before"
    total = count = 0.0
    for row in rows:
        mean = total / count if count else None
        assert row["beta"] == (min(max(2 / mean, 5), 5000) if mean else 5000)
        total, count = DECAY * total + row["global/gap_distance"], DECAY * count + 1
    assert rows[-1]["beta"] < rows[-2]["beta"] < 5000, "it moved"


def test_automatic_beta_goes_on_where_it_was(run_with_pairs, process):
    whole, _ = run_with_pairs("whole", *AUTO)
    train(whole, process)
    parts, _ = run_with_pairs("parts", *AUTO, "train.steps=4")
    train(parts, process)
    train(longer(parts, 6), process)
    assert metrics(parts) == metrics(whole)
    state = json.loads((train_folder(parts) / "checkpoints/step-00000006" / STATE).read_text())
    assert state["step"] == 6 and state["parts"]["beta"]["count"] == pytest.approx(sum(DECAY**i for i in range(6)))


def test_automatic_beta_is_of_the_pairs_of_all_processes(run_with_pairs, process, command, config_file):
    one, _ = run_with_pairs("one", *AUTO, "train.steps=3")
    train(one, process)
    two, settings = run_with_pairs("two", *AUTO, "train.steps=3")
    result = command("train", config_file, *settings, "--nproc", "2")
    assert result.returncode == 0, result.stderr
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        # The same numbers summed in another order: a gap is off by some 1e3 fp32 roundings of errors near 1.
        assert a["global/gap_distance"] == pytest.approx(b["global/gap_distance"], abs=1e3 * 2**-24)
    assert rows_of(one)[2]["beta"] == pytest.approx(rows_of(two)[2]["beta"], rel=0.05)


def forge(checkpoint, name, content):
    """Another file with a manifest that vouches for it."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def strike_out(checkpoint, *ends):
    """Delete files and what the manifest says of them."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["digest"]
    for name in [name for name in manifest["files"] if name.endswith(ends)]:
        (checkpoint / name).unlink()
        del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def stopped(made_pairs, overrides, config_file, tmp_path_factory):
    """The metrics of a whole run of six steps, and the folder of one that was stopped after four."""
    root = tmp_path_factory.mktemp("stopped")
    for name, steps in (("whole", 6), ("hurt", 4)):
        shutil.copytree(made_pairs, root / name)
        config = load_config(config_file, overrides(root / name, *AUTO, f"train.steps={steps}"))
        train(config, start_process())
    return (root / "whole" / "train" / "metrics.jsonl").read_bytes(), root / "hurt"


@pytest.mark.parametrize(
    "fault", ["missing", "of another step", "vouched for", "struck out", "engine struck out", "moved"]
)
def test_a_state_and_an_engine_that_do_not_belong_together_are_damaged_as_a_whole(
    stopped, overrides, config_file, tmp_path, process, capfd, fault
):
    whole, folder = stopped
    shutil.copytree(folder, tmp_path / "hurt")
    hurt = load_config(config_file, overrides(tmp_path / "hurt", *AUTO))
    before, newest = sorted((train_folder(hurt) / "checkpoints").glob("step-*"))
    match fault:
        case "missing":
            (newest / TENSORS).unlink()
        case "of another step":
            shutil.copy(before / STATE, newest / STATE)
        case "vouched for":
            forge(newest, STATE, (before / STATE).read_bytes())
        case "struck out":
            strike_out(newest, STATE)
        case "engine struck out":
            strike_out(newest, ".pt")
        case "moved":  # an older checkpoint under the newer one's name
            shutil.rmtree(newest)
            shutil.copytree(before, newest)
    train(longer(hurt, 6), process)
    said = capfd.readouterr().err
    assert f"passing over checkpoint {newest}" in said and "resuming after step 2" in said
    assert metrics(hurt) == whole


def test_a_checkpoint_of_another_format_is_refused_and_kept(run_with_pairs, process):
    config, _ = run_with_pairs("run", "train.steps=2")
    train(config, process)
    (newest,) = (train_folder(config) / "checkpoints").glob("step-*")
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["format"], manifest["digest"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint format 1, this version reads 2"):
        train(longer(config, 4), process)
    assert newest.is_dir()
