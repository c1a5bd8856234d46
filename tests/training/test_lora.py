"""Adapters instead of all weights: the same loop, no second model, and a file that plain diffusers loads."""

import json

import pytest

from alignkit.errors import ConfigError, ModelError
from alignkit.models import load_model
from alignkit.models.folder import LORA_FILE
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder

LORA = ("train.lora={rank: 4, alpha: 8}", "train.learning_rate=1e-3")


@pytest.fixture
def process():
    return start_process()


def metrics(config) -> bytes:
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def test_the_reference_is_the_policy_with_its_adapters_off(run_with_pairs, process):
    """A copy of the base as reference gives the same bits; at step 0 every logit is exactly 0 either way."""
    runs = {}
    for strategy in ("adapter", "copy"):
        config, _ = run_with_pairs(strategy, *LORA, f"reference.strategy={strategy}", "train.steps=3")
        train(config, process)
        runs[strategy] = metrics(config)
    assert runs["adapter"] == runs["copy"]
    rows = [json.loads(line) for line in runs["adapter"].splitlines()]
    assert rows[0]["rewards/margins"] == 0.0 and abs(rows[2]["rewards/margins"]) > 0.01


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run_with_pairs, process, half_base):
    whole, _ = run_with_pairs("whole", *LORA, "train.steps=4")
    train(whole, process)
    first, _ = run_with_pairs("parts", *LORA, "train.steps=2")
    train(first, process)
    train(first.model_copy(update={"train": first.train.model_copy(update={"steps": 4})}), process)
    assert metrics(first) == metrics(whole)
    files = (train_folder(first) / "checkpoints").glob("step-*/**/*.pt")
    base = next(half_base.glob("transformer/*.safetensors"))
    assert sum(file.stat().st_size for file in files) < base.stat().st_size, "a checkpoint must not hold the base"


def test_adapters_that_cannot_be_are_refused_by_name(run_with_pairs, process, tmp_path):
    config, _ = run_with_pairs("run", "train.lora={targets: [to_q, to_nowhere]}")
    words = (
        r"train\.lora\.targets: no layer that can have adapters is called .to_nowhere.; .* to_k, to_out.0, to_q, to_v"
    )
    with pytest.raises(ConfigError, match=words):
        train(config, process)
    section = config.model.model_copy(update={"lora": (tmp_path,)})
    with pytest.raises(ModelError, match=f"model.lora: {tmp_path / LORA_FILE}: no such file"):
        load_model(section)
    (tmp_path / LORA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(section)
