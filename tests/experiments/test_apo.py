"""The experiment on Diffusion-APO: the whole of it in little, and the policy gradient that it is compared with."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignkit.experiments import apo, driver
from alignkit.experiments.apo import ARMS, CURVES, STORES, make_plan, run
from alignkit.experiments.grpo import CLIP, group_relative_loss
from alignkit.experiments.plan import Plan, Trial, run_config
from alignkit.experiments.stores import store_folder
from alignkit.stages import stage_configs
from alignkit.stores.pairs import PairStore

BY_NAME = {arm.name: arm for arm in ARMS}
DISTILL = "stages=[{name: distill, rollout: {per_prompt: 1}, student: {num_inference_steps: 2}, train: {steps: 2}}]"
TINY = Plan(
    "wan",
    (
        BY_NAME["base"],
        replace(BY_NAME["base_few"], settings=("sample.num_inference_steps=2",)),
        replace(BY_NAME["shared"], trials={"one": Trial(("train.learning_rate=1e-5",))}),
        BY_NAME["path"],
        BY_NAME["inversion"],
        BY_NAME["grpo"],
        replace(BY_NAME["student"], settings=(*BY_NAME["shared"].settings[:1], DISTILL)),
    ),
    seeds=(3,),
    train_clips=4,
    heldout_clips=6,
    steps=2,
    samples=3,
    validation_samples=2,
    curve_steps=(),
    rollouts=2,
    method="apo",
    title="Diffusion-APO",
    store_settings=STORES,
    against=("shared",),
    blind=("shared", "path"),
    curves=CURVES,
)


@pytest.fixture
def tiny(cheaply):
    """An experiment of a minute: the same code with fewer of everything."""
    cheaply(apo, TINY)


def test_every_arm_is_measured_and_a_second_run_makes_nothing_again(tiny, tmp_path, monkeypatch):
    page = run("wan", tmp_path, smoke=True)
    assert page.is_relative_to(tmp_path / "apo-wan") and page.read_text().startswith("# Diffusion-APO on the small wan")
    with (page.parent / "results.csv").open() as stream:
        tested = {row["arm"]: row for row in csv.DictReader(stream) if row["split"] == "test"}
    assert tested.keys() == {arm.name for arm in TINY.arms}
    assert tested["student"]["winner_error"] == "" != tested["path"]["winner_error"]
    changes = {float(tested[name]["winner_error_change"]) for name in ("shared", "path", "inversion", "grpo")}
    assert len(changes) == 4 and 0 not in changes, "each trained, and each differently"
    ranked = PairStore(store_folder(TINY, tmp_path, "ranked") / "pairs" / "train")
    assert ranked.path_rows[0] == (0, 1, 2, 3), "states of every step, so that all arms train at the same ones"
    assert PairStore(store_folder(TINY, tmp_path, "inverted") / "pairs" / "train").inverted
    monkeypatch.setattr(driver, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(driver, "train", lambda *_: pytest.fail("trained again"))
    before = page.read_text()
    run("wan", tmp_path, smoke=True)
    assert page.read_text() == before


def test_the_policy_gradient_is_the_plain_one_where_the_policy_is_what_sampled():
    """∇ of E[A·log p] with log p = −β/2 · error, whatever the errors are."""
    after = torch.tensor([0.3, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    group_relative_loss(after, after.detach(), advantage, beta=50.0).backward()
    torch.testing.assert_close(after.grad, 25 * advantage / 3)


@pytest.mark.parametrize(("advantage", "step"), [(1.0, -1.0), (-1.0, 1.0)])
def test_beyond_the_clip_a_video_pulls_no_further(advantage, step):
    """A good video whose error has fallen enough, a bad one whose error has risen enough; not the other way around."""
    for sign, moves in ((1, False), (-1, True)):
        after = torch.tensor([0.5 + sign * step * 0.02], dtype=torch.float64, requires_grad=True)
        before = torch.tensor([0.5], dtype=torch.float64)
        assert abs(torch.exp(25 * (before - after.detach())).item() - 1) > CLIP
        group_relative_loss(after, before, torch.tensor([advantage], dtype=torch.float64), beta=50.0).backward()
        assert bool(after.grad.item()) == moves


def test_every_arm_of_the_plans_has_settings_that_hold():
    whole, other = make_plan("wan", smoke=False), make_plan("cogvideox", smoke=False)
    assert len(whole.trained) <= 15 and len(whole.seeds) == 3
    assert [arm.name for arm in other.arms] == ["base", "shared", "initial", "path"] and len(other.seeds) == 1
    for plan in (whole, other, make_plan("wan", smoke=True)):
        for arm in plan.trained:
            for trial in plan.arm(arm.like).trials if arm.like else arm.trials:
                settings = driver.settings_of(plan, arm, trial)
                config = run_config(plan, Path("nowhere"), Path("nowhere/run"), "data.videos=x", *settings)
                stages = [stage.train.steps for _, stage in stage_configs(config)]
                assert config.train.steps == plan.steps and (arm.name != "chain" or sum(stages) == plan.steps), arm.name
