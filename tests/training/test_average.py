"""`train.ema`: the average is the one that a plain computation makes of the weights, and nothing of it is lost."""

import shutil

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.samples import read_samples, samples_folder
from alignkit.files import write_lines
from alignkit.models import load_model
from alignkit.stages.chain import run_chain
from alignkit.training.average import Average
from alignkit.training.distributed import start_process
from alignkit.training.engine import full_precision_weights
from alignkit.training.export import aligned_section, averaged, export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.state import rank_file

DECAY = 0.25  # above what the second and third update take by themselves: 2/11, 3/12
KEYS = (f"train.ema={DECAY}", "train.learning_rate=1e-4", "train.global_batch_size=2", "train.checkpointing=none")
LORA = "train.lora={rank: 4, alpha: 8}"
ROUNDED = 3 * 2**-24
"""Of an update: a difference, its product with 1 - d and their sum are rounded."""


@pytest.fixture
def process():
    return start_process()


def weights_in(folder) -> dict:
    """Of a diffusers folder's network, or adapters."""
    network = folder / "transformer"
    return load_file(next((network if network.is_dir() else folder).glob("*.safetensors")))


class Plain:
    """diffusers' own average, in fp64."""

    def __init__(self):
        self.average = None

    def take_in(self, weights: dict) -> None:
        values = [torch.nn.Parameter(value.double()) for value in weights.values()]
        if self.average is None:
            self.names, self.average = list(weights), EMAModel(values, decay=DECAY)
        self.average.step(values)

    @property
    def weights(self) -> dict:
        return dict(zip(self.names, self.average.shadow_params, strict=True))


def assert_average(got: dict, wanted: dict, steps: int) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=2 * steps * ROUNDED * largest, msg=name)


@pytest.mark.parametrize(
    ("preset", "dtype", "more"),
    [("zero2", "bf16", ()), ("zero3", "fp32", ()), ("zero3-offload", "bf16", (LORA,)), ("zero2", "fp32", (LORA,))],
)
def test_it_is_what_diffusers_computes_of_the_fp32_weights(run_with_pairs, process, monkeypatch, preset, dtype, more):
    keys = f"deepspeed.preset={preset}", f"model.dtype={dtype}", "train.steps=4", *more
    config, _ = run_with_pairs("run", *KEYS, *keys)
    plain, after_step, kept = Plain(), Average.after_step, []

    def followed(average):
        after_step(average)
        plain.take_in(full_precision_weights(average._policy))
        kept.append(average.weights())
        assert_average(kept[-1], plain.weights, len(kept))

    monkeypatch.setattr(Average, "after_step", followed)
    train(config, process)
    assert len(kept) == 4 and any((kept[-1][name] != kept[-2][name]).any() for name in kept[-1])
    trained, own = weights_in(export_folder(config)), weights_in(averaged(export_folder(config)))
    assert trained.keys() == own.keys() and any((trained[name] != own[name]).any() for name in own)
    if not more:
        assert all(torch.equal(own[name], value) for name, value in kept[-1].items())
    else:
        assert sum(value.numel() for value in own.values()) == sum(value.numel() for value in kept[-1].values())
    section = aligned_section(load_config(config.output.dir, ["sample.weights=ema"]))
    assert str(averaged(export_folder(config))) in (section.path, *map(str, section.lora))
    load_model(section, with_encoders=False)


def test_on_two_processes_it_is_shared_out_goes_on_and_is_converted(run_with_pairs, together, config_file, tmp_path):
    """Against the exports of runs that ended after each step."""
    jobs, compared = [], []
    for preset, dtype, more in (("zero2", "bf16", ()), ("zero3", "fp32", (LORA,))):
        keys = f"deepspeed.preset={preset}", f"model.dtype={dtype}", "train.micro_batch_size=1", *more
        name = f"{preset} {dtype}"
        runs = [run_with_pairs(f"{name} {steps}", *KEYS, *keys, f"train.steps={steps}") for steps in (1, 2, 3)]
        jobs += [settings for _, settings in runs]
        compared.append(([config for config, _ in runs], runs[1][1]))
    together((2, [("train", settings) for settings in jobs]))
    plains = [Plain() for _ in compared]
    for plain, (runs, _) in zip(plains, compared, strict=True):
        for config in runs:
            plain.take_in(weights_in(export_folder(config)))
    together((2, [("train", [*settings, "train.steps=3"]) for _, settings in compared]))
    alone = []
    for plain, (runs, settings) in zip(plains, compared, strict=True):
        parts = runs[1]
        whole = weights_in(averaged(export_folder(runs[-1])))
        assert_average(whole, plain.weights, 3)
        resumed = weights_in(averaged(export_folder(parts)))
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
        files = [train_folder(parts) / "checkpoints/step-00000003" / rank_file(rank) for rank in range(2)]
        held = [sum(value.numel() for value in load_file(file).values()) for file in files]
        # under ZeRO-3 each tensor is filled up to an even size
        count = sum(value.numel() for value in whole.values())
        assert count <= sum(held) <= count + len(whole) and max(held) < 0.6 * count
        out = tmp_path / f"alone {len(alone)}"
        shutil.copytree(parts.output.dir, out)
        shutil.rmtree(averaged(out / "export"))
        alone.append((out, whole, [*settings, f"output.dir={out}", "train.steps=3", "train.reshape=true"]))
    together((1, [("train", settings) for _, _, settings in alone]))
    for out, whole, _ in alone:
        converted = weights_in(averaged(out / "export"))
        assert all(torch.equal(converted[name], value) for name, value in whole.items())


def test_a_chain_exports_the_average_over_its_last_stage(run_with_pairs, process):
    """Begun anew where that stage starts, against the exports of chains that ended after each of its steps."""
    plain = Plain()
    for steps in (1, 2):
        stages = f"stages=[{{name: sft, train: {{steps: 2}}}}, {{name: localdpo, train: {{steps: {steps}}}}}]"
        config, _ = run_with_pairs(f"chain {steps}", *KEYS, stages)
        assert run_chain(config, process)
        plain.take_in(weights_in(export_folder(config)))
    found = sorted(folder.relative_to(config.output.dir) for folder in config.output.dir.rglob("*-ema"))
    assert found == [averaged(export_folder(config)).relative_to(config.output.dir)]
    assert_average(weights_in(averaged(export_folder(config))), plain.weights, 2)


def test_samples_are_of_the_weights_that_are_asked_for(small_config):
    with pytest.raises(ConfigError, match=r"sample\.weights: 'ema' needs train\.ema"):
        small_config("sample.weights=ema")
    config = small_config("sample.weights=ema", "train.ema=0.999")
    with pytest.raises(DataError, match="export-ema: no exported model"):
        aligned_section(config)
    samples_folder(config).mkdir(parents=True)
    write_lines(samples_folder(config) / "samples.jsonl", [{"prompt": "", "seed": 0, "of": "trained"}])
    with pytest.raises(DataError, match=r"samples of trained, not of sample\.weights; run 'alignkit sample'"):
        read_samples(config)
