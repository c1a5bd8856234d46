"""Adapters instead of all weights: the same loop, no second model, and a file that plain diffusers loads."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from alignkit.errors import ConfigError, ModelError
from alignkit.models import load_model, shipped_model
from alignkit.models.folder import LORA_FILE
from alignkit.training.distributed import start_process
from alignkit.training.export import aligned_section, export_folder
from alignkit.training.loop import train, train_folder

LORA = ("train.lora={rank: 4, alpha: 8}", "train.learning_rate=1e-3")
PLAIN_DIFFUSERS = """
import sys, torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
options = dict(height=48, width=48, num_frames=17, num_inference_steps=2, max_sequence_length=64, output_type="latent")
noise = torch.randn(1, 8, 5, 12, 12, generator=torch.Generator().manual_seed(0))
base = pipe("a red circle", latents=noise, **options).frames
pipe.load_lora_weights(sys.argv[2])
aligned = pipe("a red circle", latents=noise, **options).frames
assert "alignkit" not in sys.modules
torch.save((base, aligned), sys.argv[3])
"""


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


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run_with_pairs, process):
    whole, _ = run_with_pairs("whole", *LORA, "train.steps=4")
    train(whole, process)
    first, _ = run_with_pairs("parts", *LORA, "train.steps=2")
    train(first, process)
    train(first.model_copy(update={"train": first.train.model_copy(update={"steps": 4})}), process)
    assert metrics(first) == metrics(whole)
    files = (train_folder(first) / "checkpoints").glob("step-*/**/*.pt")
    base = next(shipped_model("wan").glob("transformer/*.safetensors"))
    assert sum(file.stat().st_size for file in files) < base.stat().st_size, "a checkpoint must not hold the base"


def test_exported_adapters_load_in_plain_diffusers_and_merge_in_ours(run_with_pairs, process, wan, tmp_path):
    config, _ = run_with_pairs("run", *LORA, "train.steps=2")
    train(config, process)
    weights = load_file(export_folder(config) / LORA_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name and "attn1" in name)

    out = tmp_path / "frames.pt"
    arguments = [str(shipped_model("wan")), str(export_folder(config)), str(out)]
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *arguments], check=True, capture_output=True, cwd=tmp_path)
    base, aligned = torch.load(out, weights_only=True)

    merged = load_model(aligned_section(config))
    text, negative = (merged.pad_text(merged.encode_text([prompt])) for prompt in ("a red circle", ""))
    noise = torch.randn(1, 8, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    ours = merged.sample(noise, text, negative, num_steps=2, guidance=5.0)
    change = (aligned - base).norm()
    assert change > 0
    # Merged and unmerged adapters differ by rounding alone; without the alpha they would be off by half the change.
    assert (ours - aligned).norm() < 1e-2 * change


def test_adapters_that_cannot_be_are_refused_by_name(run_with_pairs, process, tmp_path):
    config, _ = run_with_pairs("run", "train.lora={targets: [to_nowhere]}")
    with pytest.raises(ConfigError, match=r"train\.lora\.targets: \['to_nowhere'\]"):
        train(config, process)
    section = config.model.model_copy(update={"lora": (tmp_path,)})
    with pytest.raises(ModelError, match=f"model.lora: {tmp_path / LORA_FILE}: no such file"):
        load_model(section)
    (tmp_path / LORA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(section)
