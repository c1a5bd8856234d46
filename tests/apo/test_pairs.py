"""Pairs of rollouts: each side keeps its origin and its path; rows that make no sense are left out with the reason."""

import dataclasses
import json
import shutil

import pytest
import torch

from alignkit.apo.pairs import build_rollout_pairs, check_rollouts, read_rankings, split_prompts
from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.given.build import find_given
from alignkit.localdpo.build import check_settings
from alignkit.models import load_model
from alignkit.objectives.states.checks import check_noise, check_origins
from alignkit.stores.origins import GIVEN
from alignkit.stores.pairs import PairStore, write_block
from alignkit.stores.rollouts import RolloutStore
from alignkit.stores.store import open_for_building

CPU = torch.device("cpu")


@pytest.fixture
def rollouts(made_rollouts):
    return RolloutStore(made_rollouts / "rollouts")


@pytest.fixture
def build(made_rollouts, rollout_overrides, config_file, clips, tmp_path):
    """`build([(0, "000.mp4")], "noise.anchor=shared")`: the train pairs of those rankings and of some others."""

    def make(rankings, *more, out="run"):
        file = tmp_path / f"{out}.jsonl"
        rows = [{"chosen": better, "rejected": worse} for better, worse in [*rankings, (6, 7), (8, 6)]]
        file.write_text("\n".join(map(json.dumps, rows)))
        files = [f"data.pairs={file}", f"data.rollouts={made_rollouts / 'rollouts'}", "data.heldout=0.5"]
        config = load_config(config_file, rollout_overrides(tmp_path / out, *files, *more))
        build_rollout_pairs(config, CPU, show=False)
        stores = [PairStore(tmp_path / out / "pairs" / split) for split in ("train", "heldout")]
        return config, next(store for store in stores if 0 in store.ids)

    return make


def test_a_pair_is_two_rollouts_with_their_paths(build, rollouts):
    _, store = build([(1, 2)])
    pair = store[store.ids.index(0)]
    for side, latents, origin, path in (
        (1, pair.winner, pair.origin_w, pair.path_w), (2, pair.loser, pair.origin_l, pair.path_l),
    ):  # fmt: skip
        rollout = rollouts.by_id(side)
        assert torch.equal(latents, rollout.latents) and origin == rollout.origin
        assert torch.equal(path.states, rollout.path.states) and torch.equal(path.following, rollout.path.following)
        assert pair.path_rows == rollout.path_rows and path.error is None
    assert pair.prompt == rollouts.prompt_of(1) and (pair.mask == 1).all() and not store.inverted


@pytest.mark.parametrize("anchor", ["inversion", "shared"])
def test_a_real_video_beside_a_rollout_is_an_anchor(build, rollouts, clips, anchor):
    video = str(next(clips.glob("*.mp4")))
    config, store = build([(video, 1)], f"noise.anchor={anchor}")
    pair = store[store.ids.index(0)]
    assert pair.origin_w.kind == "real" and pair.origin_l == rollouts.by_id(1).origin
    assert pair.path_rows == rollouts.by_id(1).path_rows
    if anchor == "shared":
        assert pair.path_w is None and not store.inverted
    else:
        assert 0 < pair.path_w.error < 1 and pair.path_w.states.shape == pair.path_l.states.shape
        assert store.inversion_errors[store.ids.index(0)] == pair.path_w.error
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_origins(config, model, check_noise(config, model), store)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": 1, "rejected": 1}, "rollout 1 is on both sides"),
        ({"chosen": 1, "rejected": 99}, "rejected: no rollout has the number 99"),
        ({"chosen": 1, "rejected": 4}, "its rollouts are of two prompts"),
        ({"chosen": "a.mp4", "rejected": "b.mp4"}, "neither is a rollout"),
        ({"chosen": 1}, "rejected: expected a rollout's number or a video's path, got None"),
        ({"chosen": 1, "rejected": True}, "rejected: expected a rollout's number"),
        ({"chosen": 1, "rejected": 2, "prompt": "another"}, "its prompt 'another' is not its rollouts'"),
        ({"chosen": 0, "rejected": 1}, "repeats ranking.jsonl:1"),
        ({"chosen": 1, "rejected": 0}, "contradicts ranking.jsonl:1"),
        ("{", "is not JSON"),
    ],
)
def test_rows_that_make_no_sense_are_left_out(rollouts, tmp_path, row, words):
    file = tmp_path / "ranking.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    file.write_text(json.dumps({"chosen": 0, "rejected": 1}) + "\n" + text + "\n")
    rankings, problems = read_rankings(file, rollouts)
    assert [ranking.pair_id for ranking in rankings] == [0]
    assert [problem.video for problem in problems] == ["ranking.jsonl:2"] and words in problems[0].reason


def test_names_are_read_as_in_tables_of_pairs(rollouts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.mp4 ").touch()
    (tmp_path / "r.jsonl").write_text(
        '{"chosen": "~/real.mp4", "rejected": 0}\n{"chosen": "a b.mp4 ", "rejected": 1}\n'
    )
    rankings, _ = read_rankings(tmp_path / "r.jsonl", rollouts)
    assert [row.chosen for row in rankings] == [tmp_path / "real.mp4", tmp_path / "a b.mp4 "]


def test_numbers_in_csv_are_numbers(rollouts, tmp_path):
    (tmp_path / "r.csv").write_text("chosen,rejected\n1,2\nreal.mp4,0\n")
    rankings, problems = read_rankings(tmp_path / "r.csv", rollouts)
    assert [(row.chosen, row.rejected) for row in rankings] == [(1, 2), (tmp_path / "real.mp4", 0)] and not problems


def test_files_without_a_usable_row_are_refused(rollouts, tmp_path):
    file = tmp_path / "r.jsonl"
    for text, words in (('{"chosen": 99, "rejected": 1}', "holds no row that can be used .r.jsonl:1"), ("", "columns")):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            read_rankings(file, rollouts)


def test_prompts_are_held_out_with_all_their_pairs(rollouts, tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(json.dumps({"chosen": a, "rejected": b}) for a, b in ((0, 1), (2, 0), (3, 4), (6, 8))))
    rankings, _ = read_rankings(file, rollouts)
    for seed in range(5):
        splits = split_prompts(rankings, 0.3, seed)
        prompts = {split: {row.prompt for row in rows} for split, rows in splits.items()}
        assert len(prompts["heldout"]) == 1 and not prompts["heldout"] & prompts["train"]
    with pytest.raises(DataError, match="all usable rows are of one prompt"):
        split_prompts(rankings[:2], 0.3, 0)


def test_a_video_that_cannot_be_decoded_is_left_out(build, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    _, store = build([(0, 1), ("broken.mp4", 2)], "noise.anchor=shared")
    assert 1 not in store.ids and 0 in store.ids


# --- what a source needs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (("rollout.num_inference_steps=5",), "schedule"),
        (("rollout.solver=model", "noise.path_between=false"), "solver"),
        (("rollout.guidance_scale=1.0",), "guidance"),
        (("rollout.negative_prompt=grey",), "negative_prompt"),
    ],
)
def test_rollouts_of_another_sampler_than_the_configurations_are_refused(
    build, made_rollouts, rollout_overrides, config_file, changes, name
):
    with pytest.raises(DataError, match=rf"data.rollouts: .*sampled with {name} = "):
        build([(0, 1)], *changes)
    config = load_config(config_file, rollout_overrides(made_rollouts, *changes))
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    with pytest.raises(DataError, match=rf"pair \d+: was sampled with {name} = .*set `rollout` to what it was"):
        check_origins(config, model, check_noise(config, model), PairStore(made_rollouts / "pairs/train"))


def check(config, folder):
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_origins(config, model, check_noise(config, model), PairStore(folder / "pairs" / "train"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("noise.source=path",), "noise.source 'path' is for rollouts"),
        (("noise.source=inversion",), "holds no inversion of its real video"),
        (("noise.source=initial",), r"regenerated from step 1 of 4 on.*noise.interval to end at 0.9\d\d or below"),
        (
            ("noise.source=initial", "noise.guided=true", "noise.interval=[0.1,0.5]"),
            "noise.guided is for pairs of roll",
        ),
    ],
)
def test_local_pairs_know_what_they_know(made_pairs, small_config, changes, words):
    with pytest.raises(DataError, match=words):
        check(small_config("sample.guidance_scale=2.0", *changes), made_pairs)


def test_local_pairs_train_on_their_corruption_noise_from_its_start_on(made_pairs, small_config):
    config = small_config("noise.source=initial", "noise.timesteps=schedule", "sample.num_inference_steps=4")
    start = load_model(config.model, with_transformer=False, with_encoders=False).schedule(4).timesteps[1] / 1000
    check(small_config("noise.source=initial", f"noise.interval=[0.0,{start:.3f}]"), made_pairs)
    with pytest.raises(DataError, match="knows no noisier point"):
        check(small_config("noise.source=initial", f"noise.interval=[0.0,{start + 0.002:.3f}]"), made_pairs)


def test_pairs_of_which_nothing_is_known_are_refused(made_rollouts, rollout_overrides, config_file, tmp_path):
    """Such as those that were made before pairs had origins."""
    shutil.copytree(made_rollouts, tmp_path / "run")
    folder = tmp_path / "run" / "pairs" / "train"
    store = PairStore(folder)
    pairs = [dataclasses.replace(pair, origin_w=GIVEN, origin_l=GIVEN, path_w=None, path_l=None) for pair in store]
    write_block(folder, 0, pairs)
    config = load_config(config_file, rollout_overrides(tmp_path / "run"))
    with pytest.raises(DataError, match="nothing is known of where its given videos come from"):
        check(config, tmp_path / "run")


def test_rollouts_without_states_are_refused_for_path(build, made_rollouts, rollout_overrides, config_file, tmp_path):
    """`initial` keeps no states: its pairs cannot be trained on at the sampler's states."""
    config, store = build([(0, 1)], "noise.source=initial", "noise.path_between=false")
    assert not any(any(sides) for sides in store.states_of)
    path = config.model_copy(update={"noise": config.noise.model_copy(update={"source": "path"})})
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_origins(config, model, check_noise(config, model), store)
    with pytest.raises(DataError, match="its rollouts hold no states of their path"):
        check_origins(path, model, check_noise(path, model), store)


def test_builders_refuse_what_their_videos_cannot_give(small_config, tmp_path):
    with pytest.raises(ConfigError, match=r"noise.source: 'path' is for rollouts"):
        check_settings(small_config("noise.source=path"))
    for source in ("initial", "path"):
        (tmp_path / "p.csv").write_text("prompt,chosen,rejected\n")
        given = small_config(f"noise.source={source}", "data.videos=null", f"data.pairs={tmp_path / 'p.csv'}")
        with pytest.raises(ConfigError, match=f"noise.source: '{source}' needs to know where videos come from"):
            find_given(given)


def test_stores_of_another_kind_are_named(made_rollouts, made_pairs, tmp_path):
    with pytest.raises(DataError, match="holds rollouts, not pairs"):
        PairStore(made_rollouts / "rollouts")
    with pytest.raises(DataError, match="holds pairs, not rollouts"):
        RolloutStore(made_pairs / "pairs" / "train")
    with pytest.raises(DataError, match="no rollouts here; run 'alignkit rollout'"):
        RolloutStore(tmp_path)
    info = RolloutStore(made_rollouts / "rollouts").info
    open_for_building(tmp_path / "part", info)
    shutil.copy(made_rollouts / "rollouts" / "block-00000.arrow", tmp_path / "part")
    with pytest.raises(DataError, match="2 of 3 blocks of rollouts are not made yet; run 'alignkit rollout'"):
        RolloutStore(tmp_path / "part")


# --- states are of one kind, schedule and interval --------------------------------------------------------------


def test_states_of_another_kind_or_schedule_are_refused(build, made_rollouts, rollout_overrides, config_file):
    """Sampled states are no inversions and inversions no sampled states; rows are of the schedule they were made on."""
    inversion = ("noise.source=inversion", "noise.path_between=false")
    config, inverted = build([(0, 1)], *inversion, out="inverted")
    own = PairStore(made_rollouts / "pairs" / "train")

    def refused(store, words, *changes):
        folder = store.folder.parents[1]
        settings = load_config(config_file, rollout_overrides(folder, "noise.path_between=false", *changes))
        model = load_model(settings.model, with_transformer=False, with_encoders=False)
        with pytest.raises(DataError, match=words):
            check_origins(settings, model, check_noise(settings, model), store)

    refused(inverted, "hold no states of their path", "noise.source=path")
    refused(own, "holds no inversion", "noise.source=inversion")
    for steps in (3, 12):
        refused(inverted, "inverted on the schedule", *inversion, f"rollout.num_inference_steps={steps}")
    refused(inverted, "no states that follow", *inversion, "noise.path_between=true")
    timesteps = load_model(config.model, with_transformer=False, with_encoders=False).schedule(6).timesteps / 1000
    free = next(row for row in range(6) if row not in own[0].path_rows)
    interval = f"noise.interval=[{timesteps[free] - 0.001:.4f},{timesteps[free]:.4f}]"
    refused(own, "of which none lies in noise.interval", interval, "noise.path_steps=1")
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_origins(config, model, check_noise(config, model), inverted)


def test_pairs_with_and_without_states_are_not_mixed(build):
    build([(0, 1)], "noise.source=initial", "noise.path_between=false")
    with pytest.raises(DataError, match="made with states = False, now it is True"):
        build([(0, 1)])


def test_anchors_in_tiles_and_as_ever_are_not_mixed(build, clips):
    anchor = [(str(next(clips.glob("*.mp4"))), 1)]
    build(anchor, "noise.anchor=shared")
    with pytest.raises(DataError, match="holds pairs made with vae_tiling = "):
        build(anchor, "noise.anchor=shared", "model.vae_tiling=true")


@pytest.mark.parametrize("change", ["model.dtype=bf16", "noise.inversion_guidance=2.0", "noise.path_steps=2"])
def test_inversions_made_otherwise_are_not_mixed(build, change):
    keys = ("noise.source=inversion", "noise.path_between=false", "pairs.dtype=fp32")
    build([(0, 1)], *keys)
    with pytest.raises(DataError, match=r"holds pairs made with (inverted_by|noise) = "):
        build([(0, 1)], *keys, change)


def test_rollouts_without_the_states_that_are_asked_for_or_of_another_text_length_are_refused(
    made_rollouts, rollout_overrides, config_file, tmp_path
):
    stripped = tmp_path / "rollouts"
    shutil.copytree(made_rollouts / "rollouts", stripped)
    info = json.loads((stripped / "rollouts.json").read_text())
    for states, lacking in ((None, "holds none"), ({"path_between": False}, "none of those that follow")):
        (stripped / "rollouts.json").write_text(json.dumps(info | {"made": info["made"] | {"states": states}}))
        with pytest.raises(DataError, match=lacking):
            check_rollouts(load_config(config_file, rollout_overrides(tmp_path)))
    config = load_config(config_file, rollout_overrides(made_rollouts, "model.max_sequence_length=32"))
    with pytest.raises(DataError, match=r"regime.max_sequence_length = 64, now it is 32"):
        check_rollouts(config)


def test_the_same_pairs_the_other_way_round_are_other_pairs(build):
    """A run must not go on with labels that were exchanged meanwhile."""
    assert build([(0, 1)], out="one")[1].fingerprint == build([(0, 1)], out="again")[1].fingerprint
    assert build([(0, 1)], out="one")[1].fingerprint != build([(1, 0)], out="other")[1].fingerprint


def test_an_inversion_is_what_the_plain_functions_find(build, rollouts, clips):
    """At every stored row, with the pair's own prompt and the guidance that was asked for."""
    from alignkit.models import family_module
    from alignkit.schedules.inversion import invert, round_trip_error

    video = str(next(clips.glob("*.mp4")))
    for guidance in (1.0, 3.0):
        config, store = build([(video, 1)], f"noise.inversion_guidance={guidance}", out=f"g{guidance:g}")
        pair = store[store.ids.index(0)]
        model = load_model(config.model)
        text, negative = (model.pad_text(model.encode_text([p])) for p in (pair.prompt, config.sampler.negative_prompt))
        seen = {}

        def predict(state, timesteps, model=model, text=text, negative=negative, guidance=guidance):
            return family_module("wan").guided(model.transformer, state, timesteps, text, negative, guidance)

        schedule, first = model.schedule(6), pair.path_rows[0]
        top = invert(pair.winner[None], predict, schedule, first, seen.__setitem__)
        error = round_trip_error(pair.winner[None], top, predict, schedule, first).item()
        for place, row in enumerate(pair.path_rows):
            torch.testing.assert_close(pair.path_w.states[place], seen[row][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pair.path_w.following[place], seen[row + 1][0], rtol=1e-4, atol=1e-4)
        assert pair.path_w.error == pytest.approx(error, rel=1e-2)


def test_the_command_pairs_rollouts_in_a_folder_of_its_own(
    command, config_file, rollout_overrides, made_rollouts, tmp_path
):
    settings = rollout_overrides(tmp_path / "new", f"data.rollouts={made_rollouts / 'rollouts'}")
    result = command("pairs", config_file, *settings)
    assert result.returncode == 0, result.stderr
    assert len(PairStore(tmp_path / "new" / "pairs" / "train")) == 4
    refused = command("pairs", config_file, *settings, "rollout.num_inference_steps=9")
    assert refused.returncode == 2 and "loading" not in refused.stderr


def test_an_anchor_is_inverted_once_for_a_prompts_rollouts(build, clips, monkeypatch):
    from alignkit.apo import inversions

    calls, plain = [], inversions._inverted
    monkeypatch.setattr(inversions, "_inverted", lambda *given: calls.append(given) or plain(*given))
    video = str(next(clips.glob("*.mp4")))
    _, store = build([(video, 0), (video, 1), (2, video)])
    paths = [store[store.ids.index(0)].path_w, store[store.ids.index(1)].path_w, store[store.ids.index(2)].path_l]
    assert len(calls) == 1 and all(torch.equal(path.states, paths[0].states) for path in paths)
