"""From rollouts to a ranking that `alignkit pairs` reads."""

import json
import shutil
import sys
import types
from collections import Counter

import pytest
import torch
from starting import one_line

from alignkit.apo.pairs import build_rollout_pairs
from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.media.videos import read_video
from alignkit.models import load_model
from alignkit.rankers.asking import digests_of
from alignkit.rankers.people import read_comparisons
from alignkit.rankers.people.votes import record
from alignkit.rankers.rollouts import rank_rollouts, ranking_file, rankings_folder
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore

CPU = torch.device("cpu")


@pytest.fixture
def settings(made_rollouts, rollout_overrides, config_file, tmp_path):
    """`settings("ranker.min_margin=0.2")`: of the made rollouts, ranked by a function that the test sets."""

    def make(*more):
        rollouts = f"data.rollouts={made_rollouts / 'rollouts'}"
        return load_config(config_file, rollout_overrides(tmp_path / "run", rollouts, "ranker.by=mine:better", *more))

    return make


@pytest.fixture
def ranked_by(monkeypatch):
    """Sets the function that compares."""

    def use(function):
        module = types.ModuleType("mine")
        module.better = function
        monkeypatch.setitem(sys.modules, "mine", module)

    return use


def brighter(prompt, video_a, video_b):
    return float(video_a.double().mean() > video_b.double().mean())


def test_the_best_and_the_worst_of_each_prompt_become_its_pair(settings, ranked_by, made_rollouts):
    ranked_by(brighter)
    config = settings()
    ranked = rank_rollouts(config, CPU, show=False)
    rollouts, model = RolloutStore(made_rollouts / "rollouts"), load_model(config.model, with_transformer=False)
    videos = {r.id: read_video(rankings_folder(config) / "videos" / f"{r.id:06d}.mp4") for r in rollouts}
    decoded = model.decode_video(rollouts.by_id(0).latents[None])[0]
    assert (videos[0].double() - decoded.double()).abs().mean() < 4, "each file is its rollout"
    rows = [json.loads(line) for line in ranked.file.read_text().splitlines()]
    assert len(rows) == ranked.pairs == ranked.prompts == len(set(r.prompt_id for r in rollouts)) and ranked.ties == 0
    for row in rows:
        light = {r.id: videos[r.id].double().mean().item() for r in rollouts if r.prompt == row["prompt"]}
        assert (row["chosen"], row["rejected"]) == (max(light, key=light.get), min(light, key=light.get))
    pairs = config.model_copy(update={"data": config.data.model_copy(update={"pairs": ranked.file})})
    assert sum(build_rollout_pairs(pairs, CPU, show=False).values()) == ranked.pairs
    (first, *_) = PairStore(config.output.dir / "pairs" / "train")
    assert first.origin_w.kind == "rollout"


def test_every_pair_that_is_no_tie_is_kept_if_asked_for_and_ties_are_counted(settings, ranked_by):
    ranked_by(lambda prompt, a, b: 0.5)
    with pytest.raises(DataError, match=r"no rollout is better .* ranker.min_margin=0.1; look at the videos there"):
        rank_rollouts(settings(), CPU, show=False)
    answers = iter([0.9, 0.52, 0.1] * 3)
    shutil.rmtree(rankings_folder(settings()))
    ranked_by(lambda prompt, a, b: next(answers))
    ranked = rank_rollouts(settings("ranker.keep=all"), CPU, show=False)
    assert (ranked.pairs, ranked.ties) == (6, 3)
    rows = [json.loads(line) for line in ranked.file.read_text().splitlines()]
    assert Counter(row["p"] for row in rows) == {0.9: 6}, "P of the better one"


def test_stopped_in_the_middle_it_asks_for_the_rest_alone(settings, ranked_by):
    asked = []

    def fails_later(prompt, video_a, video_b):
        asked.append(prompt)
        return brighter(prompt, video_a, video_b) if len(asked) < 5 else None

    ranked_by(fails_later)
    with pytest.raises(DataError, match="answered None"):
        rank_rollouts(settings(), CPU, show=False)
    kept = (rankings_folder(settings()) / "answers.jsonl").read_text()
    assert len(kept.splitlines()) == 4 and not ranking_file(settings()).exists()
    asked.clear()
    ranked_by(lambda prompt, a, b: asked.append(prompt) or brighter(prompt, a, b))
    rank_rollouts(settings(), CPU, show=False)
    assert len(asked) == 9 - 4
    assert (rankings_folder(settings()) / "answers.jsonl").read_text().startswith(kept)


def test_videos_of_other_rollouts_are_refused(settings, ranked_by):
    ranked_by(brighter)
    rank_rollouts(settings(), CPU, show=False)
    with pytest.raises(DataError, match="holds videos of other rollouts than there are now"):
        rank_rollouts(settings("model.vae_tiling=true"), CPU, show=False)  # other pictures of the same latents
    file = rankings_folder(settings()) / "rollouts.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="holds videos of other rollouts than there are now"):
        rank_rollouts(settings(), CPU, show=False)


def test_the_command_says_what_to_do_next_and_a_ranker_that_is_not_set_changes_nothing(
    command, config_file, rollout_overrides, made_rollouts, tmp_path
):
    given = rollout_overrides(tmp_path / "run", f"data.rollouts={made_rollouts / 'rollouts'}")
    refused = command("rank", "run", config_file, *given)
    assert one_line(refused).startswith("alignkit: ranker.by: not set")
    assert not (tmp_path / "run").exists()
    result = command("rank", "run", config_file, *given, "ranker.by=motion", "ranker.min_margin=0")
    assert result.returncode == 0, result.stderr
    assert "3 pairs from 3 prompts, 0 dropped as ties" in result.stderr and "alignkit pairs" in result.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("ranker.by=endpoint",), "endpoint: goes with ranker.by: endpoint, and needs url and model"),
        (("ranker.endpoint={url: http://localhost/v1, model: m}",), "goes with ranker.by: endpoint"),
        (("ranker.by=endpoint", "ranker.endpoint={url: http://localhost/v1}"), "endpoint.model: missing"),
    ],
)
def test_an_endpoint_is_described_where_it_is_asked_and_only_there(settings, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(*given)


def test_an_endpoint_that_is_down_is_one_line_and_what_it_has_cost_is_said(settings, capsys):
    asked = "ranker.endpoint={url: 'http://127.0.0.1:9/v1', model: m, key_env: null, retries: 0}"
    with pytest.raises(DataError, match=r"^127.0.0.1:9: cannot be reached .* what was answered is kept$"):
        rank_rollouts(settings("ranker.by=endpoint", asked), CPU)
    assert "0 questions, 0 tokens in, 0 out" in capsys.readouterr().err


def test_an_endpoint_given_as_an_address_is_refused_without_showing_it(settings):
    with pytest.raises(ConfigError) as caught:
        settings("ranker.by=endpoint", "ranker.endpoint=http://me:secret@host/v1")
    assert "ranker.endpoint: input should be a section" in str(caught.value) and "secret" not in str(caught.value)


def vote_of_everybody(folder, answer="a"):
    comparisons = read_comparisons(folder)
    for comparison, digest in zip(comparisons, digests_of(comparisons).values(), strict=True):
        record(folder, "ada", comparison.id, digest, answer, "a")
    return comparisons


def test_people_are_waited_for_and_their_votes_become_the_ranking(
    command, config_file, rollout_overrides, made_rollouts, settings, tmp_path
):
    given = rollout_overrides(tmp_path / "run", f"data.rollouts={made_rollouts / 'rollouts'}", "ranker.by=people")
    folder = tmp_path / "run" / "rankings"
    first = command("rank", "run", config_file, *given)
    assert first.returncode == 0
    assert f"waiting for 9 votes, to be given by: alignkit rank serve {folder}" in first.stderr
    assert not (folder / "ranking.jsonl").exists()
    vote_of_everybody(folder)
    two = command("rank", "run", config_file, *given, "ranker.votes=2")
    assert "waiting for 9 votes" in two.stderr
    done = command("rank", "run", config_file, *given)
    assert done.returncode == 0 and "3 pairs from 3 prompts, 0 dropped as ties" in done.stderr
    rows = [json.loads(line) for line in (folder / "ranking.jsonl").read_text().splitlines()]
    assert [(row["chosen"] % 3, row["rejected"] % 3, row["p"]) for row in rows] == [(0, 2, 1.0)] * 3
    results = command("rank", "results", folder)
    assert results.returncode == 0 and results.stdout.startswith("9 of 9 comparisons answered: 9 votes")
