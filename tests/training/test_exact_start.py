"""Training starts from the base itself: with a learning rate of 0 every preset exports it, to the last bit."""

import itertools
import json

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from alignkit.config import LoraSection, load_config
from alignkit.errors import ConfigError
from alignkit.files import write_json
from alignkit.localdpo.build import build_pairs
from alignkit.models import family_module, load_model
from alignkit.training.distributed import start_process
from alignkit.training.engine import load_network, start_policy
from alignkit.training.export import export_folder, export_lora
from alignkit.training.loop import train, train_folder
from alignkit.training.lora import add_lora
from alignkit.training.metrics import read_metrics
from alignkit.training.settings import deepspeed_config
from alignkit.training.weights import open_start

PRESETS = ("zero2", "zero3", "zero3-offload")
KINDS = ("full", "lora", "merged")
LORA = LoraSection(rank=4, alpha=8)
COGVIDEOX = ["model.family=cogvideox", "model.max_sequence_length=24", "data.height=16", "data.width=16"]


@pytest.fixture(scope="module")
def prepared(overrides, config_file, cogvideox_folders, tmp_path_factory):
    """By family: the settings of a run, its folder of pairs, and a folder of adapters for its base."""
    prepared = {}
    for family, settings in (("wan", []), ("cogvideox", [*COGVIDEOX, f"model.path={cogvideox_folders['2b']}"])):
        folder = tmp_path_factory.mktemp(family)
        settings = overrides(folder, *settings, "train.steps=2", "train.learning_rate=0")
        config = load_config(config_file, settings)
        build_pairs(config, torch.device("cpu"))
        for file in folder.glob("pairs/*/pairs.json"):  # pairs that no network made suit the merged base as well
            write_json(file, json.loads(file.read_text()) | {"model": None})
        model = load_model(config.model, with_encoders=False)
        values, generator = add_lora(model.transformer, LORA, seed=7), torch.Generator().manual_seed(7)
        moved = {name: value + 0.05 * torch.rand(value.shape, generator=generator) for name, value in values.items()}
        export_lora(model, moved, LORA, folder / "adapters")
        prepared[family] = settings, folder
    return prepared


@pytest.mark.parametrize(
    "family, kind, dtype, preset", list(itertools.product(("wan", "cogvideox"), KINDS, ("bf16", "fp32"), PRESETS))
)
def test_a_learning_rate_of_0_exports_the_base_exactly(prepared, config_file, tmp_path, family, kind, dtype, preset):
    settings, folder = prepared[family]
    more = {"full": [], "lora": ["train.lora={rank: 4, alpha: 8}"], "merged": [f"model.lora=[{folder / 'adapters'}]"]}
    keys = [f"deepspeed.preset={preset}", f"model.dtype={dtype}", f"output.dir={tmp_path}", *more[kind]]
    config = load_config(config_file, [*settings, *keys])
    (tmp_path / "pairs").symlink_to(folder / "pairs")
    train(config, start_process())
    first, second = read_metrics(train_folder(config) / "metrics.jsonl")
    for row in (first, second):
        assert row["rewards/margins"] == row["region/logit"] == row["global/gap_w"] == row["global/gap_l"] == 0.0
        assert row["grad_norm"] > 0 and not row["skipped"]
    base = load_model(config.model, with_encoders=False).transformer  # fp32, as in the files, adapters merged
    if kind == "lora":
        got, want = (
            load_file(next(export_folder(config).glob("*.safetensors"))),
            add_lora(base, LORA, config.train.seed),
        )
        assert len(got) == len(want) > 0
        for name, value in want.items():
            (same,) = [other for key, other in got.items() if name.replace(".default", "") in key]
            assert same.dtype == torch.float32 and torch.equal(same, value), name
    else:
        got, want = (
            load_file(next(export_folder(config).glob("transformer/*.safetensors"))),
            dict(base.named_parameters()),
        )
        for name, value in want.items():
            assert got[name].dtype == torch.float32 and torch.equal(got[name], value), name
        assert any(not torch.equal(value, value.bfloat16().float()) for value in want.values()), "nothing to round"


def test_bf16_without_fp32_masters_is_refused(small_config):
    config = small_config("model.dtype=bf16", "deepspeed.config={zero_optimization: {stage: 0}}")
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage 0 keeps no fp32"):
        deepspeed_config(config, start_process())


def test_parts_that_processes_share_unequally_are_set_whole(prepared, config_file, command, tmp_path):
    """Of three processes: DeepSpeed's own division of a tensor fails where its size is no multiple of 3."""
    settings, folder = prepared["cogvideox"]
    keys = ["model.dtype=bf16", "train.global_batch_size=3", "train.micro_batch_size=1", f"output.dir={tmp_path}"]
    (tmp_path / "pairs").symlink_to(folder / "pairs")
    result = command("train", config_file, *settings, *keys, "--nproc", "3")
    assert result.returncode == 0, result.stderr
    config = load_config(config_file, [*settings, *keys])
    got = load_file(next(export_folder(config).glob("transformer/*.safetensors")))
    want = dict(load_model(config.model, with_encoders=False).transformer.named_parameters())
    assert any(value.numel() % 3 for value in want.values())
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bf16_run_that_was_stopped_goes_on_as_if_it_had_not(prepared, config_file, tmp_path, preset):
    settings, folder = prepared["cogvideox"]
    files = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs").symlink_to(folder / "pairs")
        for steps in stops:
            keys = [f"train.steps={steps}", "train.learning_rate=1e-5", f"output.dir={tmp_path / name}"]
            keys += ["model.dtype=bf16", f"deepspeed.preset={preset}"]
            config = load_config(config_file, [*settings, *keys])
            train(config, start_process())
        files.append((train_folder(config) / "metrics.jsonl").read_bytes())
        files.append(next(export_folder(config).glob("transformer/*.safetensors")).read_bytes())
    assert files[:2] == files[2:]


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_gradients_of_many_micro_batches_are_added_up_in_fp32(small_config, preset):
    """In bf16 the sum of 16 is off by half a percent."""
    count, process = 16, start_process()
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(count, 1, 8, 5, 12, 12, generator=generator).bfloat16()

    def gradients(accumulated: int) -> list[dict[str, torch.Tensor]]:
        """After every `accumulated` micro-batches; the weights stay as they are."""
        keys = f"deepspeed.preset={preset}", "model.dtype=bf16", "train.micro_batch_size=1", "train.learning_rate=0"
        config = small_config(*keys, f"train.global_batch_size={accumulated}")
        model = load_model(config.model, with_transformer=False, with_encoders=False)
        start = open_start(config, model)
        policy = start_policy(config, process, load_network(config, process, model, start)[0], start)
        text, found = torch.ones(1, 64, policy.module.config.text_dim, dtype=torch.bfloat16), []
        for number, state in enumerate(states, 1):
            prediction = family_module("wan").predict(policy, state, torch.tensor([500.0]), text)
            policy.backward(prediction.float().square().sum())
            if number % accumulated == 0:
                found.append({name: safe_get_full_grad(p).double() for name, p in policy.module.named_parameters()})
            policy.step()
        return found

    single, (together,) = gradients(1), gradients(count)
    for name, got in together.items():
        parts = torch.stack([part[name] for part in single])
        # the addends are exact in fp32: 16 divisions and 16 sums, each off by 2⁻²⁴ of at most the sum of all terms
        worst = ((got - parts.mean(dim=0)).abs() / parts.abs().mean(dim=0).clamp(min=1e-30)).max().item()
        assert worst <= 2 * count * 2**-24, name
