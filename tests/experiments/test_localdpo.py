"""The experiment: the whole of it in little, taken up where it was, and how it chooses a learning rate."""

import csv
import json

import pytest

from alignkit.experiments import localdpo
from alignkit.experiments.localdpo import choose_rate, run, run_folder
from alignkit.experiments.plan import ARMS, Plan, make_plan, run_config
from alignkit.experiments.stores import heldout_store
from alignkit.files import write_json

TINY = Plan(
    "wan",
    tuple(arm for arm in ARMS if arm.name in ("base", "dpo_generated", "local_dpo")),
    rates=(1e-6, 1e-5),
    seeds=(0,),
    train_clips=4,
    heldout_clips=6,
    steps=1,
    samples=2,
)


@pytest.fixture
def tiny(monkeypatch):
    """An experiment of a minute: the same code with fewer of everything, and steps as few as a strength allows."""
    cheap = ("pairs.num_inference_steps=4", "pairs.strengths=[3]", "sample.num_inference_steps=4")
    cheap += ("train.global_batch_size=4", "train.micro_batch_size=4", "evaluation.positions=[0.5]")

    def cheaper(plan, out, folder, *settings):
        return run_config(plan, out, folder, *cheap, *settings)

    monkeypatch.setattr(localdpo, "make_plan", lambda family, smoke: TINY)
    for module in ("localdpo", "stores"):
        monkeypatch.setattr(f"alignkit.experiments.{module}.run_config", cheaper)


def test_every_arm_is_measured_on_test_clips_and_a_second_run_makes_nothing_again(tiny, tmp_path, monkeypatch):
    page = run("wan", tmp_path, smoke=True)
    with (page.parent / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = {row["arm"] for row in rows if row["split"] == "test"}
    assert tested == {"base", "dpo_generated", "local_dpo"}
    (base,) = [row for row in rows if row["arm"] == "base"]
    assert float(base["region_accuracy"]) == 0.5 and float(base["winner_error_change"]) == 0
    for arm in ("DPO, both generated and ranked", "LocalDPO, region + global + SFT", "real clips after the VAE"):
        assert f"| {arm} |" in page.read_text()
    assert {"measures.png", "curves.png", "samples.png"} <= {file.name for file in page.parent.iterdir()}
    monkeypatch.setattr(localdpo, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(localdpo, "measure", lambda *_: pytest.fail("measured again"))
    before = page.read_text()
    run("wan", tmp_path, smoke=True)
    assert page.read_text() == before
    parts = [heldout_store(TINY, tmp_path, split) for split in ("validation", "test")]
    prompts = [set(part.rows["prompt"]) for part in parts]
    assert not prompts[0] & prompts[1] and sum(map(len, parts)) == TINY.heldout_clips


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ({1e-6: (0.0, 9.0), 1e-5: (0.005, 7.0)}, 1e-5),  # both keep the error: the better samples
        ({1e-6: (0.0, 9.0), 1e-5: (0.05, 7.0)}, 1e-6),  # better samples at the winner's cost
        ({1e-6: (0.03, 9.0), 1e-5: (0.02, 99.0)}, 1e-5),  # none keeps it: the least harm
        ({1e-6: (0.0, 9.0), 1e-5: None}, 1e-6),  # diverged
        ({1e-6: None, 1e-5: None}, 1e-6),
    ],
)
def test_the_rate_is_chosen_by_samples_among_those_that_keep_the_error_on_real_clips(tmp_path, numbers, wanted):
    arm = TINY.trained[0]
    for rate, values in numbers.items():
        found = {"diverged": "step 3"}
        if values is not None:
            found = {"winner_error_change": values[0], "frechet": values[1]}
        file = run_folder(TINY, tmp_path, arm, rate, 0) / "validation.json"
        file.parent.mkdir(parents=True)
        write_json(file, found)
    assert choose_rate(TINY, tmp_path, arm) == wanted


def test_the_plans(tmp_path):
    whole, other, smoke = (
        make_plan("wan", smoke=False),
        make_plan("cogvideox", smoke=False),
        make_plan("wan", smoke=True),
    )
    assert len(whole.arms) == 8 and len(whole.seeds) == len(whole.rates) == 3
    assert {arm.name for arm in other.arms} < {arm.name for arm in whole.arms} and len(other.seeds) == 3
    assert len(smoke.trained) * len(smoke.rates) * len(smoke.seeds) <= 3
    for plan in (whole, other):
        for arm in plan.trained:
            assert run_config(plan, tmp_path, tmp_path, *arm.settings).train.steps == plan.steps
    assert json.dumps(whole.rates) == json.dumps(other.rates), "every arm of either family gets the same rates"
