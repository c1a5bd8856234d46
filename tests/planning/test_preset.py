"""`deepspeed.preset: auto`: what it takes follows the plan's numbers, and a run keeps what it began with."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from alignkit.commands import run_command
from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.planning import preset
from alignkit.planning.constants import FILLED, RESERVED, gpu_named
from alignkit.planning.memory import memory, parameters
from alignkit.planning.outline import outline
from alignkit.planning.plan import plan
from alignkit.planning.preset import Choice, Room, choose, resolved, with_preset
from alignkit.planning.regime import regime
from alignkit.planning.report import report
from alignkit.stores.store import StoreInfo, terms_file
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.references.cached import HOLDS, cache_folder

CONFIGS = Path(__file__).parents[2] / "configs"
AUTO = "deepspeed.preset=auto"
GPUS = 8


@pytest.fixture(scope="module")
def billion_3():
    """(configuration, outline, parameters) of Wan2.1 1.3B, trained whole beside a copy."""
    config = load_config(CONFIGS / "wan2.1-1.3b-localdpo.yaml", [AUTO])
    found = outline(config)
    return config, found, parameters(found, config, torch.bfloat16)


def need(given, name: str, config=None):
    config, found, count = config or given[0], *given[1:]
    own = with_preset(config, name)
    return memory(found, own, regime(own, GPUS), count)


def test_the_first_that_fits_is_taken_weights_states_reference_and_activations_counted(billion_3):
    config, found, count = billion_3
    needs = {name: need(billion_3, name).total for name in ("zero2", "zero3", "zero3-offload")}
    assert needs["zero2"] > needs["zero3"] > needs["zero3-offload"] > need(billion_3, "zero2").gpu["activations"]
    for name, following in (("zero2", "zero3"), ("zero3", "zero3-offload")):
        assert choose(config, found, count, Room(needs[name]), GPUS).preset == name
        assert choose(config, found, count, Room(needs[name] - 1), GPUS).preset == following
    least = choose(config, found, count, Room(needs["zero3-offload"] - 1), GPUS)
    assert least.preset == "zero3-offload" and least.why.endswith("none fits by calculation")
    without = config.model_copy(update={"reference": config.reference.model_copy(update={"strategy": "cached"})})
    assert choose(without, found, count, Room(needs["zero2"] - 1), GPUS).preset == "zero2", "no reference beside it"


def test_on_cpus_all_processes_of_a_machine_share_its_memory_and_nothing_is_offloaded(billion_3):
    config, found, count = billion_3
    wholes = [need(billion_3, name) for name in ("zero2", "zero3")]
    needs = [GPUS * (whole.total - RESERVED) + sum(whole.host.values()) for whole in wholes]
    assert choose(config, found, count, Room(needs[0], host=True), GPUS).preset == "zero2"
    assert choose(config, found, count, Room(needs[0] - 1, host=True), GPUS).preset == "zero3"
    assert choose(config, found, count, Room(needs[1] / 2, host=True), GPUS).preset == "zero3"


def test_the_plan_says_what_is_chosen_and_counts_by_it(billion_3):
    config, small = billion_3[0], replace(gpu_named("H100"), memory=need(billion_3, "zero3").total / FILLED)
    whole = plan(config, small, GPUS)
    said = next(line for line in report(whole).splitlines() if line.startswith("deepspeed.preset"))
    assert "auto is zero3: zero2 needs " in said and ", zero3 needs " in said
    assert whole.fits and whole.stages[0].run.stage == 3 and whole.stages[0].config.deepspeed.preset == "zero3"


def run(config) -> tuple[bytes, bytes]:
    run_command("train", config)
    exported = next(export_folder(config).glob("transformer/*.safetensors"))
    return (train_folder(config) / "metrics.jsonl").read_bytes(), exported.read_bytes()


def test_a_run_keeps_what_it_began_with_and_is_the_run_that_names_it(run_with_pairs, monkeypatch, capfd):
    usual = "train.global_batch_size=2", "train.checkpointing=none", "train.learning_rate=1e-4"
    named = run(run_with_pairs("named", *usual, "train.steps=3", "deepspeed.preset=zero2")[0])
    own, keys = run_with_pairs("own", *usual, "train.steps=1", AUTO)
    run(own)
    assert "deepspeed.preset: auto is zero2: zero2 needs " in capfd.readouterr().err
    assert load_config(own.output.dir).deepspeed.preset == "zero2"
    # another machine, where it would be another
    monkeypatch.setattr(preset, "choose", lambda *_, **__: Choice("zero3", "zero2 does not fit"))
    assert run(load_config(CONFIGS / "wan-tiny-localdpo.yaml", [*keys, "train.steps=3"])) == named
    assert "auto is zero2: as this run began" in capfd.readouterr().err
    fresh = run_with_pairs("fresh", *usual, "train.steps=1", AUTO)[0]
    run(fresh)
    recorded = json.loads((train_folder(fresh) / "run.json").read_text())
    assert recorded["deepspeed"]["preset"] == "zero3"


def test_training_from_python_says_what_resolves_it(run_with_pairs):
    config = run_with_pairs("run", AUTO)[0]
    with pytest.raises(ConfigError, match=r"deepspeed\.preset: 'auto' is resolved by .*resolved"):
        train(config, start_process())
    assert not train_folder(config).exists()


def test_each_stage_of_a_chain_is_given_one_unless_it_names_it(small_config, capfd):
    entries = "stages=[{name: sft, deepspeed: {preset: zero3}}, localdpo]"
    chain = resolved(small_config(entries, AUTO), start_process())
    assert [entry.deepspeed["preset"] for entry in chain.stages] == ["zero3", "zero2"]
    assert "stage localdpo: deepspeed.preset: auto is zero2" in capfd.readouterr().err
    kept = chain.output.dir / "stages/02-localdpo/train/run.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"deepspeed": {"preset": "zero3"}}))
    chain = resolved(small_config(entries, AUTO), start_process())
    assert [entry.deepspeed["preset"] for entry in chain.stages] == ["zero3", "zero3"]


def test_a_run_that_reads_cached_errors_takes_the_preset_that_they_were_computed_with(small_config, capfd):
    config = small_config("reference.strategy=cached", AUTO)
    made = StoreInfo("reference", "wan", None, "", "", 1, 1, made={"deepspeed.preset": "zero3"}, holds=HOLDS)
    cache_folder(config).mkdir(parents=True)
    terms_file(cache_folder(config), HOLDS).write_text(json.dumps(asdict(made)))
    assert resolved(config, start_process()).deepspeed.preset == "zero3"
    assert "auto is zero3: as its cached errors were computed" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_offload_into_less_memory_than_it_takes_is_refused_before_anything_is_written(
    run_with_pairs, monkeypatch, command
):
    config = run_with_pairs("run", "deepspeed.preset=zero3-offload")[0]
    before = sorted(config.output.dir.rglob("*"))
    monkeypatch.setattr(preset, "memory_limit", lambda: (1, 0))
    with pytest.raises(ConfigError, match=r"preset=zero3-offload: puts .* main memory by calculation, .* are there"):
        run_command(command, config)
    assert [file for file in sorted(config.output.dir.rglob("*")) if file.name != ".run.lock"] == before


def test_offload_is_let_be_where_the_plan_says_that_it_fits(small_config, monkeypatch):
    config, process = small_config("deepspeed.preset=zero3-offload"), start_process()
    needed = int(sum(preset._needed_here(config, process).host.values()))
    monkeypatch.setattr(preset, "memory_limit", lambda: (needed + 1, 0))
    preset.check_offload(config, process)
    monkeypatch.setattr(preset, "memory_limit", lambda: (needed - 1, 0))
    with pytest.raises(ConfigError):
        preset.check_offload(config, process)


def test_a_stage_that_offloads_is_named(small_config, monkeypatch):
    monkeypatch.setattr(preset, "memory_limit", lambda: (1, 0))
    preset.check_offload(small_config("stages=[sft]"), start_process())
    chain = small_config("stages=[sft, {name: localdpo, deepspeed: {preset: zero3-offload}}]")
    with pytest.raises(ConfigError, match=r"stage localdpo: deepspeed\.preset=zero3-offload"):
        preset.check_offload(chain, start_process())
