"""Errors computed beforehand: the same losses as a second model without one, and never those of another reference."""

import json
import os
import shutil
import struct

import datasets
import deepspeed
import diffusers
import pytest
import torch

from alignkit import cli
from alignkit.config import load_config
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.files import write_json
from alignkit.stages import stage_configs
from alignkit.stores.pairs import Pair, PairStore, write_block, write_texts
from alignkit.stores.store import block_file
from alignkit.training import cache, loop
from alignkit.training.cache import build_cache, with_cache
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit.training.references.cached import cache_folder

KEYS = ("train.learning_rate=1e-4", "train.steps=3", "train.checkpointing=none")


@pytest.fixture(scope="module")
def home(made_pairs, half_base, tmp_path_factory):
    """A base, and pairs that suit any base."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(half_base, folder / "base")
    shutil.copytree(made_pairs / "pairs", folder / "pairs")
    for file in folder.glob("pairs/*/pairs.json"):
        write_json(file, json.loads(file.read_text()) | {"model": None})
    return folder


@pytest.fixture(scope="module")
def settings(home, overrides):
    """`settings(out, "train.steps=3")`: of a run under `out` that compares with the errors in out/../cache."""

    def settings(out, *more):
        places = [f"model.path={home / 'base'}", f"pairs.folder={home / 'pairs'}"]
        cached = ["reference.strategy=cached", f"reference.cache={out.parent / 'cache'}"]
        return overrides(out, *KEYS, *places, *cached, *more)

    return settings


@pytest.fixture
def run(settings, config_file, tmp_path):
    """`run("train.steps=3")`: the configuration of a run."""
    return lambda *more: load_config(config_file, settings(tmp_path / "run", *more))


@pytest.fixture
def process():
    """With one thread, as a run with cached errors has: gradients then are the same bits too."""
    process = start_process()
    torch.set_num_threads(1)
    return process


@pytest.fixture(scope="module")
def built(settings, config_file, tmp_path_factory):
    """The settings of runs whose errors are all there."""
    out = tmp_path_factory.mktemp("built") / "run"
    build_cache(load_config(config_file, settings(out)), start_process())
    return lambda *more: load_config(config_file, settings(out, *more))


def rows_of(config):
    return read_metrics(train_folder(config) / "metrics.jsonl")


def with_a_copy(config):
    section = config.reference.model_copy(update={"strategy": "copy", "cache": None})
    output = config.output.model_copy(update={"dir": config.output.dir.with_name("copy")})
    return config.model_copy(update={"reference": section, "output": output})


def refused(call, *words):
    with pytest.raises((ConfigError, DataError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def forbid_weights(monkeypatch):
    for module in (loop, cache):
        monkeypatch.setattr(module, "open_start", lambda *_: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    "keys",
    [
        ("deepspeed.preset=zero3",),
        ("deepspeed.preset=zero2", "model.dtype=bf16", "train.lora={rank: 4, alpha: 8}"),
    ],
    ids=["zero3", "zero2 bf16 lora"],
)
def test_the_losses_are_those_of_a_copy_without_one(run, process, monkeypatch, keys):
    config = run(*keys)
    build_cache(config, process)
    copy = with_a_copy(config)
    train(copy, process)
    start, runs = loop.start_run, []
    monkeypatch.setattr(loop, "start_run", lambda *given: runs.append(start(*given)) or runs[-1])
    monkeypatch.setattr("alignkit.training.references.copy.load_network", lambda *_: pytest.fail("a second network"))
    train(config, process)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(runs[0].reference).values())
    (first, second, third), (copied, moved, later) = rows_of(config), rows_of(copy)
    assert first == copied, "before the first update both are the policy"
    assert first["rewards/margins"] == first["region/logit"] == first["global/gap_w"] == 0.0
    # After one the policies still are the same to the last bit. An fp32 square of a residual is off by 3·2⁻²⁴ of
    # itself, each of two errors by that; the product form of their difference by less, as p − r is small.
    assert second["error_w"] == moved["error_w"] and second["error_l"] == moved["error_l"]
    bound = config.objective.beta / 2 * 3 * 2**-24 * 2.1 * (second["error_w"] + second["error_l"])
    assert second["rewards/margins"] == pytest.approx(moved["rewards/margins"], abs=bound)
    assert second["loss"] == pytest.approx(moved["loss"], rel=1e-3) and abs(moved["rewards/margins"]) > bound
    # the second epoch: weights differ by rounding, which bf16 makes large, half an ulp of a prediction being 2⁻⁹ of it
    # and so of its error; another visit's errors by hundreds of logits
    rounding = 2**-9 if "model.dtype=bf16" in keys else 2**-20
    bound = config.objective.beta / 2 * rounding * (later["error_w"] + later["error_l"])
    assert third["epoch"] == 1 and third["loss"] == pytest.approx(later["loss"], abs=bound)


def test_any_number_of_processes_compute_and_use_the_same_bytes(
    run, settings, process, together, config_file, tmp_path
):
    counts, keys = (2, 4), ("train.steps=2", "train.micro_batch_size=1")
    many = {count: settings(tmp_path / f"on {count}", *keys) for count in counts}
    cached = "cache-reference", settings(tmp_path / "three", *keys)  # three do not divide 4 pairs
    together((3, [cached]), *((count, [("train", many[count])]) for count in counts))
    config = run(*keys)

    def files():
        return {file.name: file.read_bytes() for file in cache_folder(config).iterdir()}

    made = files()
    assert sorted(made) == ["block-00000.arrow", "block-00001.arrow", "reference.json"]
    shutil.rmtree(cache_folder(config))
    build_cache(config, process)
    assert files() == made
    copy = with_a_copy(config)
    train(copy, process)
    for count in counts:
        rows = rows_of(load_config(config_file, many[count]))
        assert rows[0]["rewards/margins"] == rows[0]["region/logit"] == 0.0
        for a, b in zip(rows, rows_of(copy), strict=True):
            # gradients summed in another order, as for any run on more processes
            assert a["error_w"] == pytest.approx(b["error_w"], rel=1e3 * 2**-24)
            assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=2500 * 1e3 * 2**-24)


class Killed(BaseException):
    pass


def test_killed_in_the_middle_it_goes_on_where_it_was(run, process, monkeypatch):
    """At the worst moment of the third block: written, not yet renamed."""
    config, replace = run(), os.replace

    def kill_at_third(source, target):
        if target.name == "block-00002.arrow":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", kill_at_third)
        with pytest.raises(Killed):
            build_cache(config, process)
    before = {file: file.stat().st_mtime_ns for file in cache_folder(config).glob("block-*.arrow")}
    assert len(before) == 2
    refused(lambda: train(config, process), "2 of the 3 steps", "alignkit cache-reference")
    build_cache(run("train.steps=2"), process)
    assert len(list(cache_folder(config).glob("block-*.arrow"))) == 2, "no more than the run needs"
    build_cache(config, process)
    assert before == {file: file.stat().st_mtime_ns for file in before}, "what was there is not computed again"
    assert len(list(cache_folder(config).iterdir())) == 4, "nothing of the killed one is left"


def test_a_longer_run_adds_blocks_and_a_shorter_one_uses_them(run, process, monkeypatch):
    one, two = run("train.steps=1"), run("train.steps=2")
    build_cache(one, process)
    first = block_file(cache_folder(one), 0).stat().st_mtime_ns
    refused(lambda: train(two, process), "1 of the 2 steps", "alignkit cache-reference")
    build_cache(two, process)
    assert block_file(cache_folder(one), 0).stat().st_mtime_ns == first
    with monkeypatch.context() as context:
        forbid_weights(context)
        build_cache(one, process)  # all there
    train(one, process)
    train(two, process)
    assert [row["step"] for row in rows_of(two)] == [1, 2], "the same run, resumed"
    other = run("train.steps=3", "sample.num_inference_steps=5", f"reference.cache={two.output.dir / 'other'}")
    build_cache(other, process)
    with pytest.raises(CheckpointError, match=r"reference\.cache = "):
        train(other, process)


@pytest.mark.parametrize("fault", ["a number", "cut off", "another step's"])
def test_a_damaged_block_is_refused_by_name(built, process, monkeypatch, tmp_path, fault):
    shutil.copytree(cache_folder(built()), tmp_path / "cache")
    config = built(f"reference.cache={tmp_path / 'cache'}")
    file = block_file(tmp_path / "cache", 1)
    data = bytearray(file.read_bytes())
    match fault:
        case "a number":
            number = datasets.Dataset.from_file(str(file))[3]["errors"][2]
            data[data.index(struct.pack("<d", number))] ^= 1
            file.write_bytes(data)
        case "cut off":
            file.write_bytes(data[: len(data) // 2])
        case "another step's":
            shutil.copy(block_file(tmp_path / "cache", 0), file)
    forbid_weights(monkeypatch)
    refused(lambda: train(config, process), str(file), "damaged", "alignkit cache-reference")


CHANGED = {
    "dtype": (("model.dtype=bf16",), "'fp32'", "'bf16'"),
    "attention": (("model.attention=native_flash",), "'native'", "'native_flash'"),
    "deepspeed.preset": (("deepspeed.preset=zero3",), "'zero2'", "'zero3'"),
    "deepspeed.config": (("deepspeed.config={zero_optimization: {stage: 2}}",), "{}", "{'stage': 2}"),
    "train.micro_batch_size": (("train.micro_batch_size=1",), "2", "1"),
    "train.global_batch_size": (("train.global_batch_size=2",), "4", "2"),
    "train.seed": (("train.seed=1",), "0", "1"),
    "train.caption_dropout": (("train.caption_dropout=0.5",), "0.0", "0.5"),
    "noise.timesteps": (("noise.timesteps=uniform",), "'logit_normal'", "'uniform'"),
    "noise.interval": (("noise.interval=[0.2, 0.9]",), "None", "[0.2, 0.9]"),
    "schedule": (("sample.num_inference_steps=5",),),
    "model.max_sequence_length": (("model.max_sequence_length=60",), "64", "60"),
}


@pytest.mark.parametrize("term", CHANGED)
def test_another_configuration_is_refused_by_the_term_that_differs(built, process, monkeypatch, term):
    keys, *values = CHANGED[term]
    forbid_weights(monkeypatch)
    for call in (train, build_cache):
        refused(lambda call=call: call(built(*keys), process), f" {term} = ", *values, ", now it is ")


@pytest.mark.parametrize("library", [torch, diffusers, deepspeed], ids=lambda library: library.__name__)
def test_other_versions_are_refused(built, process, monkeypatch, library):
    before = library.__version__
    forbid_weights(monkeypatch)
    monkeypatch.setattr(library, "__version__", "0.0.1")
    for call in (train, build_cache):
        refused(lambda call=call: call(built(), process), f" {library.__name__} = {str(before)!r}, now it is '0.0.1'")


def other_weights(folder):
    (file,) = (folder / "base/transformer").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def other_shift(folder):
    file = folder / "base/scheduler/scheduler_config.json"
    write_json(file, json.loads(file.read_text()) | {"flow_shift": 4.5})


def other_pair(folder, **changes):
    store = PairStore(folder / "pairs/train")
    pairs = list(store)[: store.info.block_size]
    write_block(store.folder, 0, [Pair(**{**vars(pairs[0]), **changes}), *pairs[1:]])


def other_latent(folder):
    winner = PairStore(folder / "pairs/train")[0].winner
    other_pair(folder, winner=winner + torch.finfo(torch.float32).eps * winner.abs().max())


def other_mask(folder):
    other_pair(folder, mask=1 - PairStore(folder / "pairs/train")[0].mask)


def other_texts(folder):
    store = PairStore(folder / "pairs/train")
    write_texts(store.folder, store.empty_text + 1, store.negative_text)


@pytest.mark.parametrize(
    ("change", "term"),
    [
        (other_weights, "model"),
        (other_shift, "scheduler.flow_shift"),
        (other_latent, "pairs"),
        (other_mask, "regions"),
        (other_texts, "texts"),
    ],
)
def test_other_content_is_refused_by_the_term_that_differs(built, home, process, monkeypatch, tmp_path, change, term):
    shutil.copytree(home, tmp_path / "home")
    places = f"model.path={tmp_path / 'home/base'}", f"pairs.folder={tmp_path / 'home/pairs'}"
    forbid_weights(monkeypatch)
    build_cache(built(*places), process)  # where they lie does not matter
    change(tmp_path / "home")
    for call in (train, build_cache):
        refused(lambda call=call: call(built(*places), process), f" {term} = ", ", now it is ")


def test_a_cache_serves_any_objective(built, process):
    for keys in (("objective={name: dpo, beta: 50}",), ("train.lora={}", "objective.weight_sft=3")):
        build_cache(built(*keys), process)


def test_without_errors_it_is_said_what_makes_them(run, settings, process, monkeypatch, config_file, tmp_path, capfd):
    monkeypatch.setattr(loop, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(lambda: train(run(), process), "no reference here", "alignkit cache-reference")
    monkeypatch.setattr("sys.argv", ["alignkit", "train", str(config_file), *settings(tmp_path / "run")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run()
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "run 'alignkit cache-reference' with" in said


def test_the_command_starts_as_many_processes_as_it_is_told(settings, monkeypatch, config_file, tmp_path):
    given = settings(tmp_path / "run")
    started = []
    monkeypatch.setattr(cli, "run_processes", lambda *arguments: started.append(arguments) or 0)
    monkeypatch.setattr("sys.argv", ["alignkit", "cache-reference", str(config_file), *given, "--nproc", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 0 and started == [(["cache-reference", str(config_file), *given], 2)]


def test_what_has_no_errors_beforehand_is_refused(run):
    refused(lambda: with_cache(run("objective={name: sft}"), "here"), "objective.name", "'sft'", "no reference")
    other = run("reference={}", "noise.timesteps=adaptive")
    refused(lambda: with_cache(other, "here"), "adaptive", "cannot know")
    assert with_cache(run("reference={}"), "here").reference.strategy == "cached"
    refused(lambda: stage_configs(run("stages=[sft, localdpo]")), "entry 2 (localdpo)", "reference.strategy", "copy")
    assert stage_configs(run("stages=[localdpo, sft]"))
