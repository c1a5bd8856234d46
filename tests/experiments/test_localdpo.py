"""The experiment: the whole of it in little, what each number is of, how it chooses a rate, and what is checked in."""

import csv
import json
from pathlib import Path

import pytest
import torch

from alignkit.errors import DataError
from alignkit.experiments import localdpo, measure, stores, write_up
from alignkit.experiments.localdpo import choose_rate, run, run_folder
from alignkit.experiments.plan import ARMS, Plan, make_plan, run_config
from alignkit.experiments.stores import heldout_store, store_folder
from alignkit.files import write_json
from alignkit.media.videos import VideoSpec, decode_clip
from alignkit.stores.pairs import PairStore

WRITTEN = Path(__file__).parents[2] / "docs" / "experiment"

TINY = Plan(
    "wan",
    tuple(arm for arm in ARMS if arm.name in ("base", "dpo_generated", "local_dpo")),
    rates=(1e-6, 1e-5),
    seeds=(3,),
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


def test_every_arm_is_measured_on_test_clips_and_a_second_run_makes_nothing_again(tiny, tmp_path, monkeypatch, wan):
    sampled, measured = [], []
    real_sample, real_measure = measure.sample_latents, localdpo.measure

    def sample(config, model, prompts, ids, seed, shape):
        sampled.append(seed)
        return real_sample(config, model, prompts, ids, seed, shape)

    def keep(config, section, store, *rest):
        numbers, frames = real_measure(config, section, store, *rest)
        measured.append((set(store.rows["prompt"]), config.data.videos, numbers))
        return numbers, frames

    monkeypatch.setattr(measure, "sample_latents", sample)
    monkeypatch.setattr(localdpo, "measure", keep)
    page = run("wan", tmp_path, smoke=True)
    assert set(sampled) == {3}, "samples start from the run's own noise"
    assert {videos for _, videos, _ in measured} == {tmp_path / "clips" / "heldout"}
    with (page.parent / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = {row["arm"] for row in rows if row["split"] == "test"}
    assert tested == {"base", "dpo_generated", "local_dpo"}
    for base in [row for row in rows if row["arm"] == "base"]:
        assert float(base["region_accuracy"]) == float(base["generated_accuracy"]) == 0.5
        assert float(base["winner_error_change"]) == 0
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
    by_split = {"validation": prompts[0], "test": prompts[1]}
    for row in rows:  # each number is of the part that it says it is
        (where,) = {name for got, _, numbers in measured if str(numbers["region_error"]) == row["region_error"]
                    for name, wanted in by_split.items() if got == wanted}  # fmt: skip
        assert where == row["split"]

    torch.set_num_threads(1)  # as pairs are made; the training since has taken as many as there are cores
    for name, folder in (("bezier", "train"), ("heldout", "heldout")):  # trained on one, measured on the other
        (pair, *_) = PairStore(store_folder(TINY, tmp_path, name) / "pairs" / folder)
        clip = decode_clip(tmp_path / "clips" / folder / pair.source, VideoSpec(48, 48, 17))
        assert torch.equal(pair.winner, wan.encode_video(clip[None])[0])
    for arm in TINY.trained:
        link = run_folder(TINY, tmp_path, arm, 1e-6, 3) / "pairs"
        assert link.resolve() == (store_folder(TINY, tmp_path, arm.pairs) / "pairs").resolve()

    stored = json.loads((tmp_path / "wan" / "plan.json").read_text())
    stored["settings"]["objective"]["beta"] = 1.0
    write_json(tmp_path / "wan" / "plan.json", stored)
    with pytest.raises(DataError, match="holds results of another settings"):
        run("wan", tmp_path, smoke=True)


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
        file = run_folder(TINY, tmp_path, arm, rate, 3) / "validation.json"
        file.parent.mkdir(parents=True)
        write_json(file, found)
    assert choose_rate(TINY, tmp_path, arm) == wanted


def test_only_the_rectangle_store_has_rectangles(tmp_path):
    plan = make_plan("wan", smoke=False)
    shapes = {name: stores._store_config(plan, tmp_path, name).pairs.mask.shape for name in (*plan.stores, "heldout")}
    assert shapes == {"bezier": "bezier", "generated": "bezier", "rectangle": "rectangle", "heldout": "bezier"}
    assert {arm.name: arm.pairs for arm in ARMS if arm.pairs not in (None, "bezier")} == {
        "dpo_generated": "generated",
        "rectangles": "rectangle",
    }


def test_the_likelier_of_two_samples_wins(tmp_path, made_pairs, wan, monkeypatch):
    """Samples are stood in for by their noise's number, the score by a table."""
    local = PairStore(made_pairs / "pairs" / "train")
    monkeypatch.setattr(
        stores, "sample_latents",
        lambda config, model, prompts, ids, seed, shape: torch.stack([torch.full(shape, float(i)) for i in ids]),
    )  # fmt: skip
    monkeypatch.setattr(stores, "thumbnails", lambda videos: videos)
    monkeypatch.setattr(type(wan), "decode_video", lambda self, latents: latents[:, 0, 0, 0, 0])
    score = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.5, 0.5])
    monkeypatch.setattr(stores, "log_probability", lambda numbers, wanted: score[numbers.long()])
    config = run_config(TINY, tmp_path, tmp_path)
    pairs, problems = stores._rank_rows(config, wan, local, 0, range(3), lambda count: None)
    assert [(p.winner.flatten()[0].item(), p.loser.flatten()[0].item()) for p in pairs] == [(1, 0), (2, 3), (4, 5)]
    assert problems == [] and all((pair.mask == 1).all() for pair in pairs)


def test_the_error_of_regenerated_regions_is_of_the_regions(tmp_path, made_pairs, wan, monkeypatch):
    def regenerate(clean, mask, predict, schedule, key, steps):
        return clean + torch.where(mask.bool(), 3.0, 100.0)

    monkeypatch.setattr(measure, "regenerate", regenerate)
    store = PairStore(made_pairs / "pairs" / "train")
    error = measure.region_error(run_config(TINY, tmp_path, tmp_path), wan, store, torch.device("cpu"))
    assert all(pair.winner.abs().max() < 13 for pair in store)
    # Half a unit in fp32's last place, 24 bits: of clean + 3, which is below 16, 2**-21; of the difference, below 4,
    # 2**-23; of its square 2**-24 of it. The means are taken in fp64.
    difference = (2**-21 + 2**-23) / 3
    assert error == pytest.approx(9.0, rel=(1 + difference) ** 2 * (1 + 2**-24) - 1)


def test_a_sample_follows_its_prompt_where_everything_asked_for_is_seen(monkeypatch):
    seen = {"shape": ["circle", "circle", "square"], "color": ["red"] * 3, "motion": ["left", "right", "left"]}
    monkeypatch.setattr(measure, "classify", lambda frames: seen)
    monkeypatch.setattr(measure, "NAMED", tuple(seen))
    wanted = [{"shape": "circle", "color": "red", "motion": "left"}] * 3
    assert measure._as_prompted(torch.empty(3), wanted) == [True, False, False]


def test_a_still_video_has_no_motion_and_no_flicker_and_a_jump_is_motion():
    still = torch.full((1, 8, 16, 16, 3), 90, dtype=torch.uint8)
    still[..., :8, :, :] = 30
    jump = still.clone()
    jump[:, 4:] += 60
    numbers = [measure._picture_numbers(video) for video in (still, jump)]
    assert numbers[0]["motion"] == numbers[0]["flicker"] == 0 and numbers[0]["edges"] > 0
    assert numbers[1]["motion"] == pytest.approx(60 / 7), "one step of 60 levels among seven"


def test_the_table_is_means_and_half_ranges_and_changes_against_the_base_of_the_same_seed(tmp_path):
    plan = Plan("wan", tuple(arm for arm in ARMS if arm.name in ("base", "sft")), rates=(1e-5,), seeds=(0, 1))
    for name, values in {"base-0": 10.0, "base-1": 12.0, "sft-1e-05-0": 9.0, "sft-1e-05-1": 13.0}.items():
        folder = tmp_path / "wan" / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "test.json", {"frechet": values, "region_accuracy": 0.5, "minutes": 1.0})
    rows = write_up._rows(plan, tmp_path)
    assert [row["frechet_change"] for row in rows] == [0, 0, -1, 1]
    *_, sft = write_up._table(plan, rows, {"sft": 1e-5})
    assert "| SFT continued | 1e-05 | 0.500 ± 0.000 |" in sft
    assert "| 11.0 ± 2.0 | +0.00 ± 1.00 |" in sft


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_pages_checked_in_follow_from_their_results(family):
    """Every table of docs/experiment is made again from its results.csv."""
    plan = make_plan(family, smoke=False)
    with (WRITTEN / family / "results.csv").open() as stream:
        rows = [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(stream)]
    rows = [row | {"rate": row.get("rate")} for row in rows]
    chosen = {row["arm"]: row["rate"] for row in rows if row["chosen"] and row["rate"]}
    assert chosen.keys() == {arm.name for arm in plan.trained}
    smallest = {arm.name: min(plan.rates) for arm in plan.trained}
    tables = [write_up._table(plan, rows, chosen), write_up._table(plan, rows, smallest)]
    tables.append(write_up._search_table(plan, rows, chosen))
    page = (WRITTEN / family / "page.md").read_text()
    for table in tables:
        assert "\n".join(table) in page


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


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
