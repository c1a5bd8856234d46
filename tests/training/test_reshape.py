"""A run goes on with another number of processes: the same curve, nothing of its state lost."""

import json
import shutil

import pytest

from alignkit.config import load_config
from alignkit.training.loop import train_folder
from alignkit.training.metrics import read_metrics

KINDS = {
    "zero3 full": ["deepspeed.preset=zero3"],
    "zero2 full": ["deepspeed.preset=zero2"],
    "zero3 lora": ["deepspeed.preset=zero3", "train.lora={rank: 4, alpha: 8}"],
    "zero2 bf16 ema": ["deepspeed.preset=zero2", "model.dtype=bf16", "reference={strategy: ema, decay: 0.5}"],
    "zero3 ema": ["deepspeed.preset=zero3", "reference={strategy: ema, decay: 0.5}"],
}
LEARNT = ["objective={beta: auto, beta_min: 5, beta_max: 50}", "noise.timesteps=adaptive", "train.learning_rate=1e-4"]
WAYS = [("zero3 full", 1, 2), ("zero2 full", 1, 2), ("zero3 lora", 2, 1), ("zero2 bf16 ema", 2, 1), ("zero3 ema", 2, 4)]


@pytest.fixture(scope="module")
def stopped(made_pairs, overrides, config_file, together_once, tmp_path_factory):
    """`stopped(kind, processes)`: the folder of a run of two steps by so many, whose settings are those of `kind`."""
    root, made = tmp_path_factory.mktemp("stopped"), {}

    def run(kind: str, processes: int):
        if (kind, processes) not in made:
            out = root / f"{kind} {processes}"
            shutil.copytree(made_pairs, out)
            settings = overrides(out, *LEARNT, *KINDS[kind], "train.micro_batch_size=1", "train.steps=2")
            together_once((processes, [("train", settings)]))
            made[kind, processes] = out
        return made[kind, processes]

    return run


@pytest.mark.parametrize(("kind", "before", "after"), WAYS)
def test_another_number_of_processes_goes_on_with_the_same_curve(
    stopped, overrides, together_once, command, config_file, tmp_path, kind, before, after
):
    curves = []
    for count, more in ((before, []), (after, ["train.reshape=true"])):
        out = tmp_path / f"by [{count}]"  # a pattern, to what DeepSpeed looks for files by
        shutil.copytree(stopped(kind, before), out)
        keys = [*LEARNT, *KINDS[kind], "train.micro_batch_size=1", "train.steps=4"]
        settings = overrides(out, *keys)
        if count == 1 and more:
            refused = command("train", config_file, *settings)
            assert refused.returncode == 2 and "convert it with --reshape" in refused.stderr
        together_once((count, [("train", [*settings, *more])]))
        config = load_config(config_file, settings)
        curves.append(read_metrics(train_folder(config) / "metrics.jsonl"))
    first, second = curves
    assert first[:2] == second[:2] and [row["step"] for row in second] == [1, 2, 3, 4]
    # the first step after it is of the same weights, states and micro-batches
    for key in ("loss", "error_w", "error_l", "beta", "global/gap_w", "global/gap_l", "noise_level"):
        assert second[2][key] == pytest.approx(first[2][key], rel=1e-9, abs=1e-12), key
    # then gradients were summed by other processes, which send them in bf16 where the network is; a forward is some
    # 10³ fp32 roundings deep
    for key in ("loss", "error_w"):
        assert second[3][key] == pytest.approx(first[3][key], rel=5e-2 if "bf16" in kind else 1e3 * 2**-24), key
    folder = train_folder(config) / "checkpoints"
    manifest = json.loads((folder / "step-00000004" / "manifest.json").read_text())
    assert manifest["world_size"] == manifest["shards"] == after
    assert (folder / "before-reshape-step-00000002" / "manifest.json").exists(), "nothing that was saved is gone"
    assert not list(folder.glob(".universal*"))


def test_states_that_cannot_be_converted_are_refused(stopped, overrides, command, config_file, tmp_path):
    from alignkit.errors import CheckpointError
    from alignkit.training.reshaping import universal_form

    checkpoint = stopped("zero3 full", 1) / "train/checkpoints/step-00000002"
    terms = {"deepspeed": {"config": {"optimizer": {"type": "Adam8bit"}}}}
    with pytest.raises(CheckpointError, match=r"optimizer \(Adam8bit\) cannot be converted"):
        universal_form(checkpoint, terms)
