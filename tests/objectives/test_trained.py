"""Every objective from stored pairs to an exported model, in a few steps."""

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import OBJECTIVES
from alignkit.errors import CheckpointError
from alignkit.training import engine
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics

STARTS = {"dpo": 0.6931471805599453, "robust_dpo": 0.6931471805599453, "region_dpo": 0.6931471805599453}
STARTS |= {"ipo": 0.25, "hinge": 1.0}
SMOOTHED = {name for name, keys in OBJECTIVES.items() if "label_smoothing" in keys}


@pytest.fixture
def process():
    return start_process()


def metrics_of(config):
    return read_metrics(train_folder(config) / "metrics.jsonl")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sft"])
def test_it_trains_with_the_safeguard_and_starts_where_it_should(name, run_with_pairs, process, base_weights):
    keys = ["objective.loser_safeguard=0.0"] + ["objective.label_smoothing=0.1"] * (name in SMOOTHED)
    config, _ = run_with_pairs("run", f"objective.name={name}", "train.steps=2", "train.micro_batch_size=4", *keys)
    train(config, process)
    first, second = metrics_of(config)
    if name in STARTS:
        assert first["loss"] == pytest.approx(STARTS[name], rel=1e-14)
    assert first["rewards/margins"] == 0.0 and first["rewards/accuracies"] == 0.5
    assert second["rewards/margins"] != 0.0 and not second["skipped"]
    assert 0.0 <= first["safeguard/factor"] <= 1.0
    weights = load_file(next(export_folder(config).glob("transformer/*.safetensors")))
    assert any(not torch.equal(value, base_weights[key].float()) for key, value in weights.items())


def test_sft_spends_nothing_on_a_reference_and_resumes(run_with_pairs, process, monkeypatch):
    loads, seen = [], []
    load = engine.load_partitioned
    monkeypatch.setattr(engine, "load_partitioned", lambda *given: loads.append(1) or load(*given))
    keys = "objective.name=sft", "deepspeed.preset=zero3", "train.checkpoint_every=2"
    whole, _ = run_with_pairs("whole", *keys, "train.steps=3")
    start = engine.start_policy

    def counted(*given):
        policy = start(*given)
        policy.module.register_forward_pre_hook(lambda _, inputs, named: seen.append(named["hidden_states"].shape[0]),
                                                with_kwargs=True)  # fmt: skip
        return policy

    monkeypatch.setattr("alignkit.training.run.start_policy", counted)
    train(whole, process)
    assert len(loads) == 1, "a second network was loaded"
    assert seen == [2] * 6, "two forwards a step, each of the micro-batch's winners alone"
    metrics = metrics_of(whole)
    assert all(row["loss"] == row["error_w"] > 0 for row in metrics)
    assert not any(name.startswith(("rewards/", "region", "global/")) or name == "error_l" for name in metrics[0])

    parts, _ = run_with_pairs("parts", *keys, "train.steps=2")
    train(parts, process)
    train(parts.model_copy(update={"train": parts.train.model_copy(update={"steps": 3})}), process)
    assert metrics_of(parts) == metrics

    other = parts.objective.model_copy(update={"name": "dpo"})
    with pytest.raises(CheckpointError, match=r"objective\.name"):
        train(parts.model_copy(update={"objective": other}), process)
