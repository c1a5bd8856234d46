"""The experiment: the whole of it in little, what each number is of, how it chooses, and what is checked in."""

import contextlib
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit.experiments import driver, localdpo, measure, stores, write_up
from alignkit.experiments.driver import choose_trial, run_folder, same_settings, settings_of
from alignkit.experiments.localdpo import ARMS, CURVES, STORES, make_plan, run
from alignkit.experiments.plan import Plan, Trial, run_config
from alignkit.experiments.stores import heldout_store, store_folder
from alignkit.files import write_json
from alignkit.media.videos import VideoSpec, decode_clip
from alignkit.rankers.people import read_comparisons
from alignkit.stores.pairs import PairStore
from alignkit.tiny.recipes import FAMILIES
from alignkit.training.export import export_folder

WRITTEN = Path(__file__).parents[2] / "docs" / "experiment"
BY_NAME = {arm.name: arm for arm in ARMS}
ONE = {"one": Trial(("train.learning_rate=1e-6",))}

TINY = Plan(
    "wan",
    (
        BY_NAME["base"],
        replace(BY_NAME["sft"], trials={"one": Trial(("objective={name: sft}",))}),
        replace(BY_NAME["dpo_ranked"], trials={"one": Trial(("objective={name: dpo}",))}),
        replace(BY_NAME["local_dpo"], trials=ONE | {"two": Trial(("train.learning_rate=1e-5",))}, curve=False),
        replace(BY_NAME["region"], curve=False),
        BY_NAME["sft_few"],
    ),
    seeds=(3,),
    train_clips=4,
    heldout_clips=6,
    steps=2,
    samples=3,
    validation_samples=2,
    curve_steps=(1,),
    curve_samples=2,
    rollouts=2,
    store_settings=STORES,
    curves=CURVES,
)


@pytest.fixture
def tiny(cheaply):
    """An experiment of a minute: the same code with fewer of everything."""
    cheaply(localdpo, TINY)


def test_every_arm_is_measured_on_test_prompts_and_a_second_run_makes_nothing_again(tiny, tmp_path, monkeypatch, wan):
    sampled, measured = [], []
    real_sample, real_measure = measure.sample_latents, driver.measure

    def sample(config, model, prompts, ids, seed, shape, sampler):
        sampled.append(seed)
        return real_sample(config, model, prompts, ids, seed, shape, sampler)

    def keep(config, section, store, seed, count, device):
        numbers, frames = real_measure(config, section, store, seed, count, device)
        measured.append((set(store.rows["prompt"]), config.data.videos, count, numbers))
        return numbers, frames

    monkeypatch.setattr(measure, "sample_latents", sample)
    monkeypatch.setattr(driver, "measure", keep)
    page = run("wan", tmp_path, smoke=True)
    assert set(sampled) == {3}, "samples start from the run's own noise"
    assert {videos for _, videos, *_ in measured} == {tmp_path / "clips" / "heldout"}
    with (page.parent / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = {row["arm"] for row in rows if row["split"] == "test"}
    assert tested == {arm.name for arm in TINY.arms}
    assert {row["arm"] for row in rows if row["split"] == "after-1"} == {"sft"}
    for base in [row for row in rows if row["arm"] == "base"]:
        assert float(base["region_accuracy"]) == 0.5 and float(base["winner_error_change"]) == 0
    for words in ("| DPO on ranked pairs | one |", "| real clips after the VAE |", "| region only |", "times as long"):
        assert words in page.read_text()
    pictures = {"samples.png", "measures.png", "convergence.png", "curves.png"}
    assert pictures <= {file.name for file in page.parent.iterdir()}
    assert {file.name for file in (page.parent / "blind").iterdir()} >= {"000-a.mp4", "000-b.mp4", "comparisons.jsonl"}
    assert {(pair.kind_a, pair.kind_b) for pair in read_comparisons(page.parent / "blind")} == {("sft", "local_dpo")}
    monkeypatch.setattr(driver, "train", lambda *_: pytest.fail("trained again"))
    for name in ("measure", "measure_samples"):
        monkeypatch.setattr(driver, name, lambda *_: pytest.fail("measured again"))
    before = page.read_text()
    run("wan", tmp_path, smoke=True)
    assert page.read_text() == before
    parts = [heldout_store(TINY, tmp_path, split) for split in ("validation", "test")]
    prompts = [set(part.rows["prompt"]) for part in parts]
    assert not prompts[0] & prompts[1] and sum(map(len, parts)) == TINY.heldout_clips
    by_split = {"validation": (prompts[0], 2), "test": (prompts[1], 3)}
    for row in rows:  # each number is of the part that it says it is
        if row["split"] in by_split:
            of = {(str(numbers["region_error"]), count): got for got, _, count, numbers in measured}
            (where,) = {name for name, (got, count) in by_split.items() if of.get((row["region_error"], count)) == got}
            assert where == row["split"]

    torch.set_num_threads(1)  # as pairs are made; the training since has taken as many as there are cores
    for name, folder in (("bezier", "train"), ("heldout", "heldout")):  # trained on one, measured on the other
        (pair, *_) = PairStore(store_folder(TINY, tmp_path, name) / "pairs" / folder)
        clip = decode_clip(tmp_path / "clips" / folder / pair.source, VideoSpec(48, 48, 17))
        assert torch.equal(pair.winner, wan.encode_video(clip[None])[0])
    for arm in TINY.trained:
        trial = choose_trial(TINY, tmp_path, arm)
        link = run_folder(TINY, tmp_path, arm, trial, 3) / "pairs"
        assert link.resolve() == (store_folder(TINY, tmp_path, arm.pairs) / "pairs").resolve()
    assert choose_trial(TINY, tmp_path, BY_NAME["region"]) == choose_trial(TINY, tmp_path, TINY.arm("local_dpo"))

    stored = json.loads((tmp_path / "wan" / "plan.json").read_text())
    del stored["settings"]["train"]["ema"]  # by a version that had no such key
    write_json(tmp_path / "wan" / "plan.json", stored)
    assert run("wan", tmp_path, smoke=True)
    stored["settings"]["objective"]["beta"] = 1.0
    write_json(tmp_path / "wan" / "plan.json", stored)
    with pytest.raises(DataError, match="holds results of another settings"):
        run("wan", tmp_path, smoke=True)


@pytest.mark.parametrize(
    ("stored", "same"),
    [({"a": 1}, True), ({"a": 1, "b": {"c": 2}}, True), ({"a": 1, "b": {"c": 3}}, False), ({"a": 2}, False),
     ({}, False), ({"a": 1, "gone": 0}, False), (None, False)],
)  # fmt: skip
def test_what_an_older_version_did_not_have_counts_as_its_default(stored, same):
    now, defaults = {"a": 1, "b": {"c": 2}}, {"a": 0, "b": {"c": 2}}
    assert same_settings(stored, now, defaults) is same


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ({"one": (0.0, 0.6, 9.0), "two": (0.005, 0.7, 9.0)}, "two"),  # both keep the error: the better samples
        ({"one": (0.0, 0.7, 9.0), "two": (0.005, 0.7, 7.0)}, "two"),  # as many good ones: those closer to real clips
        ({"one": (0.0, 0.6, 9.0), "two": (0.05, 0.9, 7.0)}, "one"),  # better samples at the winner's cost
        ({"one": (0.03, 0.9, 9.0), "two": (0.02, 0.1, 99.0)}, "two"),  # none keeps it: the least harm
        ({"one": (0.0, 0.1, 9.0), "two": None}, "one"),  # diverged
        ({"one": None, "two": None}, "one"),
    ],
)
def test_the_trial_is_chosen_by_samples_among_those_that_keep_the_error_on_real_clips(tmp_path, numbers, wanted):
    arm = TINY.arm("local_dpo")
    for trial, values in numbers.items():
        found = {"diverged": "step 3"}
        if values is not None:
            found = dict(zip(("winner_error_change", "good", "frechet"), values, strict=True))
        file = run_folder(TINY, tmp_path, arm, trial, 3) / "validation.json"
        file.parent.mkdir(parents=True)
        write_json(file, found)
    assert choose_trial(TINY, tmp_path, arm) == wanted


def test_a_run_is_kept_as_it_was_on_its_way_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped before any training, after any export, or before its checkpoints are gone: the same folders come out."""
    config = run_config(TINY, tmp_path, tmp_path / "run", "train.steps=40")
    checkpoints, model = config.output.dir / "train" / "checkpoints", export_folder(config) / "model"
    trained, interruptions = [], [10, 20, 40]

    def train(config, process):
        trained.append(config.train.steps)
        checkpoints.mkdir(parents=True, exist_ok=True)
        if interruptions[:1] == [config.train.steps]:
            interruptions.pop(0)
            raise KeyboardInterrupt
        model.parent.mkdir(exist_ok=True)
        model.write_text(str(config.train.steps))
        return True

    def stopped(*_):
        raise KeyboardInterrupt

    def once():
        driver._train(config, tmp_path / "store", (10, 20))

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(driver, "start_process", lambda: None)
    for _ in range(6):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(driver.os, "rename", stopped)  # between the export and the place where it is kept
            once()
        with contextlib.suppress(KeyboardInterrupt):
            once()
    assert not interruptions
    assert sorted(set(trained)) == [10, 20, 40] and trained == sorted(trained) and not checkpoints.exists()
    assert model.read_text() == "40"
    assert [(driver.after(config.output.dir, n) / "model").read_text() for n in (10, 20)] == ["10", "20"]
    before = len(trained)
    once()
    assert len(trained) == before, "a finished run is not trained again"


def test_a_part_of_a_method_takes_its_settings_and_changes_its_own():
    settings = settings_of(TINY, TINY.arm("region"), "two")
    assert settings == ("train.learning_rate=1e-5", "objective.weight_global=0", "objective.weight_sft=0")


def test_each_store_differs_from_the_demos_in_what_it_is_named_for(tmp_path):
    plan = make_plan("wan", smoke=False)
    made = {name: stores.store_config(plan, tmp_path, name).pairs for name in (*plan.stores, "heldout")}
    assert {name for name, pairs in made.items() if pairs.mask.shape == "rectangle"} == {"rectangle"}
    assert made["published"].strengths == (15, 16, 17, 18) and made["published"].mask.blobs == (1, 5)
    assert made["heldout"].mask == made["bezier"].mask and made["heldout"].strengths == made["bezier"].strengths
    trial = Trial((), pairs="published")
    local, region = replace(BY_NAME["local_dpo"], trials={"t": trial}), BY_NAME["region"]
    plan = replace(plan, arms=(BY_NAME["base"], local, region, BY_NAME["rectangles"]))
    assert [plan.store(arm, "t") for arm in plan.trained] == ["published", "published", "rectangle"]


def test_the_best_of_several_samples_wins_against_the_worst(tmp_path, made_pairs, wan, monkeypatch):
    """Samples are stood in for by their noise's number, the ranker by a table."""
    local = PairStore(made_pairs / "pairs" / "train")
    monkeypatch.setattr(
        stores, "sample_latents",
        lambda config, model, prompts, ids, seed, shape: torch.stack([torch.full(shape, float(i)) for i in ids]),
    )  # fmt: skip
    monkeypatch.setattr(type(wan), "decode_video", lambda self, latents: latents[:, 0, 0, 0, 0])
    score = np.array([0.1, 0.9, 0.5, 0.8, 0.2, 0.3, 0.4, 0.4, 0.4])
    monkeypatch.setattr(stores, "small_world_score", lambda prompts, numbers: score[numbers.long().numpy()])
    config = run_config(TINY, tmp_path, tmp_path)
    pairs, problems = stores._rank_rows(config, wan, local, 3, range(3), lambda count: None)
    assert [(p.winner.flatten()[0].item(), p.loser.flatten()[0].item()) for p in pairs] == [(1, 0), (3, 4), (8, 6)]
    assert [(p.origin_w.key[1], p.origin_l.key[1]) for p in pairs] == [(1, 0), (3, 4), (8, 6)]
    assert problems == [] and all((pair.mask == 1).all() for pair in pairs)


def test_the_error_of_regenerated_regions_is_of_the_regions(tmp_path, made_pairs, wan, monkeypatch):
    def again(config, model, pairs, text, device):
        clean, mask = (torch.stack([getattr(pair, name) for pair in pairs]) for name in ("winner", "mask"))
        return clean + torch.where(mask.bool(), 3.0, 100.0)

    monkeypatch.setattr(measure, "again", again)
    store = PairStore(made_pairs / "pairs" / "train")
    error = measure.region_error(run_config(TINY, tmp_path, tmp_path), wan, store, torch.device("cpu"))
    assert all(pair.winner.abs().max() < 13 for pair in store)
    # Half a unit in fp32's last place, 24 bits: of clean + 3, which is below 16, 2**-21; of the difference, below 4,
    # 2**-23; of its square 2**-24 of it. The means are taken in fp64.
    difference = (2**-21 + 2**-23) / 3
    assert error == pytest.approx(9.0, rel=(1 + difference) ** 2 * (1 + 2**-24) - 1)


def test_a_still_video_has_no_motion_and_no_flicker_and_a_jump_is_motion():
    still = torch.full((1, 8, 16, 16, 3), 90, dtype=torch.uint8)
    still[..., :8, :, :] = 30
    jump = still.clone()
    jump[:, 4:] += 60
    numbers = [measure._picture_numbers(video) for video in (still, jump)]
    assert numbers[0]["motion"] == numbers[0]["flicker"] == 0 and numbers[0]["edges"] > 0
    assert numbers[1]["motion"] == pytest.approx(60 / 7), "one step of 60 levels among seven"


def write_results(out: Path, results: dict[str, list[float]]) -> None:
    """By arm, the good samples' share of each seed, of four samples."""
    for arm, shares in results.items():
        for seed, share in enumerate(shares):
            folder = out / "wan" / "runs" / (f"{arm}-one-{seed}" if arm != "base" else f"base-{seed}")
            folder.mkdir(parents=True)
            faulty = [int(i >= 4 * share) for i in range(4)]
            numbers = {"good": share, "fault_rate": 1 - share, "frechet": 2 - share, "prompt_following": 1.0}
            numbers |= {"faulty": faulty, "followed": [1] * 4, "flicker": 0.3, "minutes": 1.0}
            write_json(folder / "test.json", numbers)


def test_the_table_is_means_and_half_ranges_and_only_what_is_beyond_the_spread_is_called_a_difference(tmp_path):
    arms = tuple(replace(arm, trials=ONE, curve=False) for arm in (BY_NAME["sft"], BY_NAME["local_dpo"]))
    plan = Plan("wan", (BY_NAME["base"], *arms), seeds=(0, 1))
    write_results(tmp_path, {"base": [0.25, 0.75], "sft": [0.75, 0.5], "local_dpo": [1.0, 1.0]})
    rows = write_up._rows(plan, tmp_path, {"sft": "one", "local_dpo": "one"})
    *_, sft, local = write_up._table(plan, rows, {"sft": "one", "local_dpo": "one"})
    assert "| SFT | one | 62.5 ± 12.5 | 37.5 ± 12.5 | 100.0 ± 0.0 |" in sft
    assert "| 100.0 ± 0.0 | 0.0 ± 0.0 |" in local
    lines = write_up._differences(plan, rows)
    assert "| SFT | base | nothing | nothing | +12.5 (" in next(line for line in lines if line.startswith("| SFT"))
    against_sft = next(line for line in lines if "| SFT |" in line and line.startswith("| LocalDPO"))
    assert "good samples, with a fault, Fréchet distance | nothing | +37.5 (" in against_sft


@pytest.mark.parametrize(
    ("differences", "side"),
    [([2, 2.5, 3], 1), ([-2, -2.5, -3], -1), ([1, 2, 3], 0), ([-1, 0, 4], 0), ([5], 0), ([0, 0, 0], 0), ([1, 1, 1], 1)],
)
def test_a_difference_is_one_only_beyond_the_spread(differences, side):
    assert write_up.compare(differences) == side


@pytest.mark.parametrize("family", [family for family in FAMILIES if (WRITTEN / family / "results.csv").exists()])
def test_the_pages_checked_in_follow_from_their_results(family):
    """The tables of docs/experiment are made again from its results.csv."""
    plan = make_plan(family, smoke=False)
    with (WRITTEN / family / "results.csv").open() as stream:
        rows = [
            {key: _number(key, value) for key, value in row.items() if value != ""} for row in csv.DictReader(stream)
        ]
    rows = [{"trial": ""} | row for row in rows]
    chosen = {row["arm"]: row["trial"] for row in rows if row["chosen"] and row["trial"]}
    assert chosen.keys() == {arm.name for arm in plan.trained}
    tables = [write_up._table(plan, rows, chosen), write_up._curve_table(plan, rows)]
    tables.append(write_up._search_table(plan, rows, chosen))
    page = (WRITTEN / family / "page.md").read_text()
    for table in tables:
        assert "\n".join(table) in page


def _number(key: str, text: str) -> float | str:
    return text if key in ("arm", "trial", "split", "diverged") else float(text)


def test_the_plans(tmp_path):
    whole, other, smoke = (
        make_plan("wan", smoke=False),
        make_plan("cogvideox", smoke=False),
        make_plan("wan", smoke=True),
    )
    assert len(whole.arms) == 13 and len(whole.seeds) == 3
    assert {arm.name for arm in other.arms} < {arm.name for arm in whole.arms} and len(other.seeds) == 3
    assert len(smoke.trained) <= 2 and len(smoke.seeds) == 1
    for plan in (whole, other):
        assert len(plan.arm("sft").trials) == len(plan.arm("local_dpo").trials), "tuned with as many trials"
        for arm in plan.trained:
            for trial in plan.arm(arm.like).trials if arm.like else arm.trials:
                assert run_config(plan, tmp_path, tmp_path, *settings_of(plan, arm, trial)).train.steps == plan.steps
