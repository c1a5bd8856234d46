"""`stages: [...]`: what each stage trains with, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch

from alignkit.config import StageSection, load_config
from alignkit.errors import ConfigError, DataError
from alignkit.stages import STAGES, stage_configs
from alignkit.stages.chain import run_chain
from alignkit.stores.folders import pairs_folder
from alignkit.training.distributed import Process

CHAIN = "stages=[sft, {name: localdpo, train: {steps: 7, betas: [0.8, 0.9]}, objective: {beta: 300}}]"


def settings(small_config, *more):
    return stage_configs(small_config(*more))


def test_every_name_of_the_configuration_is_a_stage():
    assert set(StageSection.model_fields["name"].annotation.__args__) == set(STAGES)


def test_each_stage_is_the_configuration_around_it_with_its_own_changes(small_config):
    around = small_config(CHAIN, "train.learning_rate=1e-4", "objective.weight_region=0.5")
    (first, sft), (second, localdpo) = stage_configs(around)
    assert (first, second) == ("sft", "localdpo")
    assert sft.objective.name == "sft" and sft.train.steps == around.train.steps == 6
    assert localdpo.train.steps == 7 and localdpo.train.betas == (0.8, 0.9)
    assert localdpo.train.learning_rate == sft.train.learning_rate == 1e-4
    assert localdpo.objective == around.objective.model_copy(update={"beta": 300.0})
    out = around.output.dir
    assert [stage.output.dir for stage in (sft, localdpo)] == [out / "stages/01-sft", out / "stages/02-localdpo"]
    assert {pairs_folder(stage, "train") for stage in (around, sft, localdpo)} == {out / "pairs/train"}
    assert sft.stages is localdpo.stages is None


def test_a_stage_with_an_objective_of_its_own_keeps_what_was_set_and_both_read(small_config):
    """β and the weight of SFT, without which an online stage would train at 100 times the β that was asked for."""
    around = "objective={beta: 50, weight_sft: 50, weight_region: 0.5}"
    stages = settings(small_config, "stages=[online, half_online, drift_correction, distill]", around)
    found = {name: stage.objective for name, stage in stages}
    assert {name: objective.name for name, objective in found.items()} == {
        "online": "dpo", "half_online": "winner_guarded", "drift_correction": "dpo", "distill": "sft",
    }  # fmt: skip
    for name in ("online", "half_online", "drift_correction"):
        assert (found[name].beta, found[name].weight_sft) == (50, 50)
    (_, plain), *_ = settings(small_config, "stages=[online]")
    assert (plain.objective.beta, plain.objective.weight_sft) == (5000, 0)
    (_, own), *_ = settings(small_config, "stages=[{name: online, objective: {beta: 7}}]", around)
    assert (own.objective.beta, own.objective.weight_sft) == (7, 50)


def test_localdpo_in_a_chain_of_sft_has_its_own_defaults(small_config):
    _, (_, localdpo) = settings(small_config, "stages=[sft, localdpo]", "objective={name: sft}")
    assert localdpo.objective.name == "local_dpo" and localdpo.objective.weight_sft == 0.1


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["stages=[{name: sft, objective: {name: dpo}}]"], ["entry 1 (sft)", "objective.name", "'sft'"]),
        (
            ["stages=[{name: localdpo, objective: {name: sft}}]"],
            ["entry 1 (localdpo)", "objective.name", "'local_dpo'"],
        ),
        (["stages=[{name: sft, train: {stepz: 4}}]"], ["entry 1 (sft)", "train.stepz", "'steps'"]),
        (["stages=[sft, {name: localdpo, train: {steps: 0}}]"], ["entry 2 (localdpo)", "train.steps"]),
        (["stages=[sft, {name: localdpo, train: {lora: {rank: 4}}}]"], ["entry 2", "train.lora", "for all stages"]),
        (
            ["stages=[sft, localdpo]", "train.lora={}", "reference.strategy=adapter"],
            ["entry 2 (localdpo)", "reference.strategy", "auto"],
        ),
    ],
)
def test_an_entry_that_does_not_fit_is_named_in_one_line(small_config, entries, words):
    with pytest.raises(ConfigError) as caught:
        settings(small_config, *entries)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "entries",
    [
        ["objective.name=sft", "pairs.strengths=[1]", "stages=[sft, {name: localdpo, objective: {name: dpo}}]"],
        ["pairs.strengths=[2]", "stages=[sft, {name: localdpo, objective: {strength_range: [0.4, 0.6]}}]"],
        ["objective={beta: auto, beta_min: 10}", "stages=[{name: localdpo, objective: {beta: 500}}]"],
        ["train.lora={}", "reference.strategy=adapter", "stages=[localdpo, sft]"],
    ],
)
def test_an_entry_is_checked_as_it_will_be_trained(small_config, entries):
    assert settings(small_config, *entries)


def test_a_refused_chain_changes_nothing_and_exits_with_2(overrides, config_file, command, tmp_path):
    out = tmp_path / "run"
    bad = "stages=[sft, {name: localdpo, train: {stepz: 4}}]"
    for name in ("train", "pairs"):
        result = command(name, config_file, *overrides(out, bad))
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "train.stepz" in result.stderr
    assert not out.exists()


def test_reading_a_chain_loads_no_model(monkeypatch, small_config):
    monkeypatch.setattr(torch, "load", lambda *_: pytest.fail("loaded"))
    assert [name for name, _ in settings(small_config, CHAIN)] == ["sft", "localdpo"]
    assert load_config(Path("configs/wan-tiny-localdpo.yaml"), ["data.videos=x"]).stages is None


def test_a_later_stages_fault_is_found_before_the_first_one_trains(run_with_pairs):
    """What its noise source needs of the pairs is known before any weights load."""
    chain = "stages=[sft, {name: localdpo, noise: {source: inversion}}]"
    config, _ = run_with_pairs("chain", chain)
    with pytest.raises(DataError, match="holds no inversion of its real video"):
        run_chain(config, Process(0, 1, 0, torch.device("cpu")))
    assert not (config.output.dir / "stages").exists()
