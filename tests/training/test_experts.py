"""One of two experts is trained: it alone is loaded and moved, and plain diffusers samples what comes of it."""

import shutil

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from alignkit.config import load_config
from alignkit.errors import CheckpointError, DataError
from alignkit.evaluation.pairs import score_pairs
from alignkit.localdpo.build import build_pairs
from alignkit.models import load_model
from alignkit.stages.chain import run_chain
from alignkit.stores.pairs import PairStore
from alignkit.training import run as run_module
from alignkit.training import weights
from alignkit.training.cache import build_cache
from alignkit.training.distributed import start_process
from alignkit.training.export import aligned_section, averaged, export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.masters import MASTERS
from alignkit.training.metrics import read_metrics

PARTS = {"high": "transformer", "low": "transformer_2"}
PROMPT = "a red circle moves left on a plain background"
KEYS = ("train.learning_rate=1e-4", "train.steps=3", "train.checkpointing=none", "evaluation.positions=[0.25,0.5,0.75]")


@pytest.fixture(scope="module")
def pairs(two_experts, overrides, config_file, tmp_path_factory):
    """Pairs by both experts."""
    out = tmp_path_factory.mktemp("pairs") / "run"
    build_pairs(
        load_config(config_file, overrides(out, f"model.path={two_experts}", "model.expert=low")), torch.device("cpu")
    )
    return out / "pairs"


@pytest.fixture
def run(two_experts, pairs, overrides, config_file, tmp_path):
    """`run("name", "high", "train.steps=3")`: the configuration of a run on those pairs."""

    def prepare(name, expert, *more):
        places = f"model.path={two_experts}", f"model.expert={expert}", f"pairs.folder={pairs}"
        return load_config(config_file, overrides(tmp_path / name, *places, *KEYS, *more))

    return prepare


@pytest.fixture
def process():
    process = start_process()
    torch.set_num_threads(1)
    return process


def network(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


def metrics(config) -> bytes:
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def plain(folder, text, noise, lora=None, **more):
    pipe = WanPipeline.from_pretrained(folder)
    for part in (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder):
        part.float()
    if lora:
        pipe.load_lora_weights(lora, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        text, height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=4.0, latents=noise,
        max_sequence_length=64, output_type="latent",
    ).frames  # fmt: skip


def ours(config, noise):
    model = load_model(aligned_section(config).model_copy(update={"max_sequence_length": 64}))
    text, negative = (model.pad_text(model.encode_text([prompt])) for prompt in (PROMPT, ""))
    return model.sample(noise, text, negative, num_steps=4, guidance=4.0)


@pytest.mark.parametrize("expert", PARTS)
def test_one_is_trained_at_its_own_noise_resumed_and_exported_beside_the_other(
    run, process, two_experts, monkeypatch, expert
):
    read, visited = set(), []
    read_file, states = weights._read_file, run_module.training_states
    monkeypatch.setattr(weights, "_read_file", lambda file, name: read.add(file.parent.name) or read_file(file, name))
    monkeypatch.setattr(
        run_module, "training_states", lambda *given, **more: visited.append(states(*given, **more)) or visited[-1]
    )
    looks = "train.validate_every=3", "train.validate_samples=0"
    whole, parts = run("whole", expert, *looks), run("parts", expert, *looks)
    train(whole, process)
    assert read == {PARTS[expert]}, "policy and reference alike"
    timesteps = torch.cat([each.timesteps for each in visited])
    assert len(timesteps) >= 24 and ((timesteps >= 800) == (expert == "high")).all()
    first, *_ = read_metrics(train_folder(whole) / "metrics.jsonl")
    assert first["rewards/margins"] == first["global/gap_w"] == 0.0, "the reference is the same expert"
    train(parts.model_copy(update={"train": parts.train.model_copy(update={"steps": 2})}), process)
    train(parts, process)
    assert metrics(parts) == metrics(whole)
    folder, other = export_folder(whole), PARTS["low" if expert == "high" else "high"]
    base, trained = network(two_experts, PARTS[expert]), network(folder, PARTS[expert])
    assert base.keys() == trained.keys() and (base["patch_embedding.weight"] != trained["patch_embedding.weight"]).any()
    left, was = network(folder, other), network(two_experts, other)
    assert left.keys() == was.keys() and all(torch.equal(left[name], was[name]) for name in was)
    noise = torch.randn(1, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(folder, PROMPT, noise), ours(whole, noise))
    assert not torch.equal(ours(whole, noise), plain(two_experts, PROMPT, noise))
    _looked_as_eval_scores(whole, {"high": 1, "low": 2}[expert])
    changed = run("parts", "low" if expert == "high" else "high", *looks)
    with pytest.raises(CheckpointError, match=r"model\.expert"):
        train(changed, process)


def _looked_as_eval_scores(config, levels):
    row = read_metrics(train_folder(config) / "validation.jsonl")[-1]
    assert row["step"] == 3 and len(row["winner_error_change_by_noise"]) == levels
    base, trained = (load_model(section, with_encoders=False) for section in (config.model, aligned_section(config)))
    store = PairStore(config.pairs.folder / "heldout")
    scores = score_pairs(config, base, store, trained.transformer, base.transformer, "scoring", torch.device("cpu"))
    assert scores.error_w.shape[0] == levels
    # gaps of two sums of fp32 squares of some 10³ elements, against the product form
    change = scores.error_w.mean().item() / scores.reference_error_w.mean().item() - 1
    assert row["winner_error_change"] == pytest.approx(change, abs=1e-5)


@pytest.mark.parametrize(
    ("expert", "keys"),
    [
        ("low", ("deepspeed.preset=zero3", "reference.strategy=cached", "train.ema=0.25")),
        ("high", ("deepspeed.preset=zero2", "reference.strategy=cached", "model.dtype=bf16")),
    ],
)
def test_with_errors_computed_before(run, process, two_experts, expert, keys):
    """The same losses as with a copy, at first, and an average that is exported in its place too."""
    config = run("cached", expert, *keys)
    build_cache(config, process)
    train(config, process)
    copy = run("copy", expert, *(key.replace("cached", "copy") for key in keys))
    train(copy, process)
    (one, *_), (two, *_) = (read_metrics(train_folder(each) / "metrics.jsonl") for each in (config, copy))
    assert one == two
    if config.train.ema:
        folders = averaged(export_folder(config)), export_folder(config)
        average, trained = (network(folder, PARTS[expert]) for folder in folders)
        assert any((average[name] != trained[name]).any() for name in average)
        assert all((folder / part).is_dir() for folder in folders for part in PARTS.values())
    other = run("other", "low" if expert == "high" else "high", *keys)
    shutil.copytree(config.output.dir / "reference", other.output.dir / "reference")
    with pytest.raises(DataError, match=r"model\.expert"):
        train(other, process)


def test_a_chain_hands_one_on(run, process, two_experts):
    config = run("chain", "high", "stages=[localdpo, sft]", "train.steps=2")
    assert run_chain(config, process)
    stages = [config.output.dir / "stages" / name / "train" / MASTERS for name in ("01-localdpo", "02-sft")]
    first, second = (load_file(file) for file in stages)
    trained, start = (network(folder, PARTS["high"]) for folder in (export_folder(config), two_experts))
    name = "patch_embedding.weight"
    assert torch.equal(trained[name], second[name])
    assert not any(torch.equal(a[name], b[name]) for a, b in ((start, first), (first, second)))
    left, was = (network(folder, PARTS["low"]) for folder in (export_folder(config), two_experts))
    assert all(torch.equal(left[name], was[name]) for name in was)


@pytest.mark.parametrize("expert", PARTS)
def test_adapters_are_of_one_and_plain_diffusers_puts_them_there(run, process, two_experts, expert):
    config = run("lora", expert, "train.lora={rank: 4, alpha: 8}", "train.learning_rate=1e-2", "deepspeed.preset=zero3")
    train(config, process)
    noise = torch.randn(1, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    into = {"load_into_transformer_2": True} if expert == "low" else {}
    theirs, mine = plain(two_experts, PROMPT, noise, export_folder(config), **into), ours(config, noise)
    base = plain(two_experts, PROMPT, noise)
    # merged weights are rounded once more than the sum of two products
    assert (theirs - mine).abs().max() < 1e-3 * (theirs - base).abs().max()
    again = run("again", expert, f"model.lora=[{export_folder(config)}]", f"pairs.folder={config.output.dir / 'none'}")
    model = load_model(again.model, with_transformer=False, with_encoders=False)
    start, merged = weights.base_weights(again.model, model), load_model(again.model, with_encoders=False).network
    name = "blocks.0.attn1.to_q.weight"
    value = start.share(name, merged.get_parameter(name).shape, torch.device("cpu"))
    assert torch.equal(value, merged.get_parameter(name))
    assert not torch.equal(value, network(two_experts, PARTS[expert])[name]), "what it goes on from has them"
