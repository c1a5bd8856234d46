"""Stages that make their pairs while they train: what is sampled, compared, kept and dropped, broken and resumed."""

import json
import os
import shutil
import signal
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import dump_config, load_config
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.rankers.asking import digests_of
from alignkit.rankers.people import read_comparisons
from alignkit.rankers.people.votes import record
from alignkit.stages import stage_configs
from alignkit.stages.chain import run_chain
from alignkit.stages.rounds import ID_STRIDE, Rounds
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.distributed import start_process
from alignkit.training.loop import train_folder
from alignkit.training.masters import MASTERS
from alignkit.training.metrics import read_metrics
from alignkit.training.run import Run

ONLINE = "{name: online, online: {every: 2, staleness: 4, prompts: 2}, train: {steps: 5}}"
STEPS = "stages=[{{name: half_online, online: {{every: {}}}, train: {{steps: {}}}}}]"
FAST = ("train.learning_rate=1e-3", "train.checkpointing=none", "deepspeed.preset=zero2")
SHORT = ("rollout.num_inference_steps=2", "rollout.per_prompt=2", "noise={}", "rollout.block_size=2")


@pytest.fixture
def process():
    return start_process()


@pytest.fixture
def chain(rollout_overrides, config_file, tmp_path, clips):
    """`chain("run", STAGES, "key=value")`: the configuration of a chain that samples in seconds, ranked by motion."""

    def make(name, stages, *more):
        given = rollout_overrides(tmp_path / name, *SHORT, *FAST, "data.rollouts=null", "data.pairs=null")
        ranked = ("ranker.by=motion", "ranker.min_margin=0", "train.checkpoint_every=3")
        return load_config(config_file, [*given, *ranked, f"stages=[{stages}]", *more])

    return make


def stage_of(config, number=0):
    return stage_configs(config)[number][1]


def rounds_of(config, number=0):
    return sorted((stage_of(config, number).output.dir / "rounds").glob("0*"))


def masters(config, number=0):
    return load_file(train_folder(stage_of(config, number)) / MASTERS)


def metrics_of(config, number=0):
    return read_metrics(train_folder(stage_of(config, number)) / "metrics.jsonl")


def test_each_round_samples_the_policy_as_it_is_and_old_pairs_are_dropped(chain, process):
    config = chain("run", ONLINE)
    assert run_chain(config, process)
    first, second, third = rounds_of(config)
    seen = metrics_of(config)
    assert [row["online/round"] for row in seen] == [0, 0, 1, 1, 2]
    assert [row["online/pairs"] for row in seen] == [2, 2, 4, 4, 4], "a round's pairs are trained on for four steps"
    assert [row["epoch"] // (2 * 4) for row in seen] == [0, 0, 1, 1, 2], "no epoch, and so no noise, comes back"
    stores = [RolloutStore(folder / "rollouts") for folder in (first, second, third)]
    prompts = [[store.prompt_of(number) for number in store.ids[::2]] for store in stores]
    assert prompts[0] + prompts[1][:1] == [*dict.fromkeys(prompts[0] + prompts[1] + prompts[2])], "in turn"
    keys = [store[0].origin.key for store in stores]
    assert len({key[2] for key in keys}) == 3, "each round from noise of its own"
    networks = {store[0].origin.recipe["network"] for store in stores}
    assert {name.rsplit(" ", 1)[1] for name in networks} == {"0", "2", "4"}
    pairs = [PairStore(folder / "pairs" / "train") for folder in (first, second)]
    assert not set(pairs[0].ids) & set(pairs[1].ids)
    for folder, store in ((first, pairs[0]), (second, pairs[1])):
        rows = [json.loads(line) for line in (folder / "rankings" / "ranking.jsonl").read_text().splitlines()]
        assert [pair.source for pair in store] == [f"rollout {r['chosen']} over rollout {r['rejected']}" for r in rows]
        assert all(row["p"] > 0.5 for row in rows)


def test_a_round_is_dropped_at_its_very_step_also_when_resumed(chain, process):
    """Between two rounds, where the next one is still far."""
    stages = ONLINE.replace("staleness: 4", "staleness: 3")
    whole, broken = chain("whole", stages), chain("broken", stages.replace("steps: 5", "steps: 3"))
    assert run_chain(whole, process) and run_chain(broken, process)
    assert [row["online/pairs"] for row in metrics_of(whole)] == [2, 2, 4, 2, 4]
    again = chain("broken", stages)
    assert run_chain(again, process)
    assert metrics_of(again) == metrics_of(whole)


def test_a_queue_keeps_the_newest_pairs(chain, process):
    config = chain("run", ONLINE.replace("staleness: 4", "staleness: 4, queue: 3"))
    trained, real = [], Run.step

    def step(run, number):
        trained.append(run.store.ids)
        return real(run, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        assert run_chain(config, process)
    assert trained[:2] == [[0, 1]] * 2
    assert trained[2:4] == [[1, ID_STRIDE, ID_STRIDE + 1]] * 2
    assert trained[4:] == [[ID_STRIDE + 1, 2 * ID_STRIDE, 2 * ID_STRIDE + 1]]


def test_the_policy_moves_what_the_next_round_samples(chain, process):
    """Prompt 0 is sampled in rounds 0 and 3 of three prompts by two: from the same weights, were they not trained."""
    still = chain("still", ONLINE, "train.learning_rate=0.0", "online.prompts=null")
    moved = chain("moved", ONLINE)
    run_chain(still, process)
    run_chain(moved, process)
    a, b = (RolloutStore(rounds_of(config)[1] / "rollouts") for config in (still, moved))
    assert a[0].origin.key == b[0].origin.key and not torch.equal(a[0].latents, b[0].latents)


def test_broken_anywhere_and_resumed_the_stage_ends_in_the_same_bits(chain, process, monkeypatch):
    """After a step, before any checkpoint, and in the middle of the ranking of a later round."""
    whole = chain("whole", ONLINE)
    run_chain(whole, process)
    broken = chain("broken", ONLINE)

    class Killed(Exception):
        pass

    def dies_at(count, name, place):
        calls, real = [], getattr(place, name)

        def dying(*given, **options):
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return real(*given, **options)

        monkeypatch.setattr(place, name, dying)

    rounds, online = (sys.modules[f"alignkit.stages.{name}"] for name in ("rounds", "online"))
    for count, name, place in ((2, "step", Run), (2, "build_ranked", rounds), (1, "answers_about", online)):
        with monkeypatch.context():
            dies_at(count, name, place)
            with pytest.raises(Killed):
                run_chain(broken, process)
        monkeypatch.undo()
    assert run_chain(broken, process)
    assert metrics_of(broken) == metrics_of(whole)
    ours, theirs = masters(broken), masters(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for folder, other in zip(rounds_of(broken), rounds_of(whole), strict=True):
        assert PairStore(folder / "pairs" / "train").content() == PairStore(other / "pairs" / "train").content()


def test_a_round_that_is_gone_is_not_made_again_from_other_weights(chain, process):
    config = chain("run", ONLINE)
    with_more = chain("run", ONLINE.replace("steps: 5", "steps: 7"))
    run_chain(config, process)
    shutil.rmtree(rounds_of(config)[2])
    (train_folder(stage_of(config)) / "masters.json").unlink()
    with pytest.raises(DataError, match=r"0002: the pairs of step 4 are gone, and so are the weights"):
        run_chain(with_more, process)


@pytest.mark.parametrize("change", ["ranker.keep=all", "rollout.seed=5", "online.every=1"])
def test_another_rankers_rollouts_or_rounds_are_not_mixed(chain, process, change):
    run_chain(chain("run", ONLINE), process)
    stages = ONLINE.replace("every: 2, ", "") if change.startswith("online") else ONLINE
    with pytest.raises(CheckpointError, match="rounds = "):
        run_chain(chain("run", stages, change), process)


@pytest.fixture
def half_online(chain, clips, monkeypatch):
    """A half-online chain on two of the clips; `better` sets P(a is better) by the videos' frames."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    stage = STEPS.format(3, 3).removeprefix("stages=[").removesuffix("]")

    def make(name, better, *more):
        module.better = better
        given = ("data.prompts=null", f"data.videos={clips}", "data.heldout=0.7", "ranker.by=mine:better")
        return chain(name, stage, *given, *more)

    return make


def test_a_rollout_as_good_as_its_anchor_is_no_loser_and_is_counted(half_online, process):
    """SoPo's rule: at 0.5 or above the pair is dropped."""
    asked = []

    def better(prompt, video_a, video_b):
        asked.append((prompt, video_a.shape == video_b.shape))
        return [0.2, 0.5, 0.1, 0.9][(len(asked) - 1) % 4]

    config = half_online("run", better)
    assert run_chain(config, process)
    assert len(asked) == 3 * 2 and all(same for _, same in asked)
    store = PairStore(rounds_of(config)[0] / "pairs" / "train")
    assert {metrics["online/drop_rate"] for metrics in metrics_of(config)} == {3 / 6}
    assert [origin.kind for origin in store.origins[0]] == ["real"] * 3
    assert [origin.kind for origin in store.origins[1]] == ["rollout"] * 3
    assert stage_of(config).objective.name == "winner_guarded"


def test_a_round_without_a_pair_goes_on_with_those_before_it_also_when_resumed(half_online, process):
    """What success looks like: the rollouts have become as good as their anchors."""
    asked = []

    def better(prompt, video_a, video_b):
        asked.append(prompt)
        return 0.2 if len(asked) <= 6 else 0.5

    def train(name):
        asked.clear()
        config = half_online(name, better, STEPS.format(1, 3))
        assert run_chain(config, process)
        return config

    whole = train("whole")
    assert [row["online/drop_rate"] for row in metrics_of(whole)] == [0, 1, 1]
    assert [row["online/pairs"] for row in metrics_of(whole)] == [3, 3, 3]
    asked.clear()
    broken = half_online("broken", better, STEPS.format(1, 2), "train.checkpoint_every=1")
    assert run_chain(broken, process)
    assert run_chain(half_online("broken", better, STEPS.format(1, 3), "train.checkpoint_every=1"), process)
    assert metrics_of(broken) == metrics_of(whole)


def test_a_signal_ends_a_long_ranking_and_the_answers_are_kept(half_online, process, capfd):
    """An endpoint's answers may take hours, and a job's grace period is half a minute."""
    asked = []

    def better(prompt, video_a, video_b):
        asked.append(prompt)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.2

    config = half_online("run", better)
    assert not run_chain(config, process)
    assert len(asked) == 2 and "stopped in a ranking, with 2 of 6 answers" in capfd.readouterr().err
    assert run_chain(config, process)
    assert len(asked) == 6, "nothing is asked twice"
    asked[:] = [None] * 2  # no signal
    whole = half_online("whole", better)
    assert run_chain(whole, process)
    assert metrics_of(config) == metrics_of(whole)


def test_a_later_stages_faults_are_said_before_the_first_one_trains(chain, process, monkeypatch):
    monkeypatch.setattr("alignkit.stages.chain.train", lambda *_: pytest.fail("trained"))
    stages = "{name: offline, pairs: {seed: 3}}, {name: online}"
    for ranker, words in (("null", "stage online: ranker.by: not set"), ("no:where", "'no:where' cannot be imported")):
        with pytest.raises(ConfigError, match=words):
            run_chain(chain("run", stages, f"ranker.by={ranker}"), process)


def test_how_an_endpoint_is_reached_may_change_between_rounds_and_what_it_is_asked_may_not(chain):
    def terms(more):
        asked = f"ranker.endpoint={{url: http://localhost/v1, model: m, price_in: 1, price_out: 1{more}}}"
        config = chain("run", ONLINE, "ranker.by=endpoint", asked)
        return Rounds(stage_of(config), ["a"], "base").terms

    assert terms("") == terms(", budget: 3") == terms(", timeout_s: 7, retries: 1, at_once: 2") != terms(", frames: 5")


def test_a_stage_without_a_pair_says_so_and_what_to_do(half_online, process):
    config = half_online("run", lambda prompt, a, b: 0.5)
    with pytest.raises(DataError, match=r"0000: none of 6 comparisons gave a pair, .* ranker.min_margin"):
        run_chain(config, process)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{name: online, reference: {strategy: cached}}", r"entry 1 \(online\): reference.strategy: a cache"),
        ("{name: half_online, reference: {strategy: cached}}", "a cache holds errors of pairs that are there already"),
        ("{name: online, rollout: {per_prompt: 1}}", r"rollout.per_prompt: 1 leaves nothing to compare"),
        ("{name: online, online: {every: 5, staleness: 4}}", "staleness: 4 steps end before the next round, after 5"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(chain, stage, words):
    with pytest.raises(ConfigError, match=words):
        stage_configs(chain("run", stage))


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        (ONLINE, ("ranker.by=null",), "stage online: ranker.by: not set"),
        ("{name: half_online}", (), "stage half_online: data.videos, its anchors: not set"),
        (ONLINE, ("data.prompts=null",), "stage online: data.prompts or data.videos: not set"),
    ],
)
def test_what_a_stage_needs_is_said_before_weights_are_read(chain, process, monkeypatch, stages, more, words):
    monkeypatch.setattr("alignkit.training.loop.open_start", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=words):
        run_chain(chain("run", stages, *more), process)


def test_two_processes_make_and_train_on_the_rounds_of_one(chain, process, command):
    """Under ZeRO-3, where each forward needs both, on videos of their own or on one: the same pairs, and losses but for
    the order of sums."""
    zero3, short = "deepspeed.preset=zero3", ONLINE.replace("steps: 5", "steps: 3")
    one = chain("one", short, zero3)
    assert run_chain(one, process)
    for degree in (1, 2):
        two = chain(f"two-{degree}", short, zero3, f"train.context_parallel={degree}")
        file = two.output.dir.parent / "two.yaml"
        file.write_text(dump_config(two))
        result = command("train", file, "--nproc", "2")
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("round 1: 2 pairs, 0 of 2 dropped") == 1, "the first process speaks for both"
        for ours, theirs in zip(rounds_of(one), rounds_of(two), strict=True):
            a, b = (RolloutStore(folder / "rollouts") for folder in (ours, theirs))
            # as regimes agree that sum in another order: two thousand roundings of 2⁻²⁴ each
            torch.testing.assert_close(a[0].latents, b[0].latents, rtol=2e3 * 2**-24, atol=2e3 * 2**-24)
            assert [pair.source for pair in PairStore(ours / "pairs" / "train")] == [
                pair.source for pair in PairStore(theirs / "pairs" / "train")
            ]
        for x, y in zip(metrics_of(one), metrics_of(two), strict=True):
            assert x["error_w"] == pytest.approx(y["error_w"], rel=2 * 2e3 * 2**-24)  # a square doubles it


def test_run_does_everything_in_a_row_and_goes_on_where_it_was(command, config_file, overrides, tmp_path):
    """Stages of every kind on one set of videos: pairs, training, samples, numbers and the page."""
    stages = (
        "stages=[{name: sft, train: {steps: 1}}, {name: localdpo, train: {steps: 1}},"
        "{name: half_online, ranker: {by: flicker}, online: {prompts: 2}, train: {steps: 1}},"
        "{name: online, online: {prompts: 2}, train: {steps: 1}},"
        "{name: offline, pairs: {seed: 7}, train: {steps: 1}},"
        "{name: distill, online: {prompts: 2}, train: {steps: 1}},"
        "{name: drift_correction, online: {prompts: 2}, train: {steps: 1}}]"
    )
    ranked = ("ranker.by=motion", "ranker.min_margin=0", "rollout.per_prompt=2", "rollout.num_inference_steps=2")
    few = ("student.num_inference_steps=2", "sample.num_inference_steps=4")
    given = [*overrides(tmp_path / "run"), *ranked, *few, stages]
    result = command("run", config_file, *given)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.html").exists() and "alignment cannot be judged" in result.stderr
    names = ["01-sft", "02-localdpo", "03-half_online", "04-online", "05-offline", "06-distill", "07-drift_correction"]
    folders = sorted((tmp_path / "run" / "stages").iterdir())
    assert [folder.name for folder in folders] == names
    assert all((folder / "train" / "metrics.jsonl").exists() for folder in folders)
    assert [(folder / "pairs").exists() for folder in folders] == [False] * 4 + [True] + [False] * 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["student_steps"] == 2
    again = command("run", config_file, *given)
    assert again.returncode == 0 and "making" not in again.stderr and "step 1" not in again.stderr


def test_a_stage_ranked_by_people_stops_for_their_votes_and_goes_on_by_the_same_call(chain, process, capsys):
    config = chain("run", "{name: online, online: {every: 1}, train: {steps: 2}}", "ranker.by=people")
    for number in range(2):
        assert not run_chain(config, process)
        folder = rounds_of(config)[number] / "rankings"
        said = f"waiting for 3 votes, to be given by: alignkit rank serve {folder}; the same command continues"
        assert said in capsys.readouterr().err
        assert not run_chain(config, process), "nobody has voted yet"
        comparisons = read_comparisons(folder)
        for comparison, digest in zip(comparisons, digests_of(comparisons).values(), strict=True):
            record(folder, "ada", comparison.id, digest, "b", "a")
    assert run_chain(config, process)
    store = PairStore(rounds_of(config)[1] / "pairs" / "train")
    assert [pair.source for pair in store] == [f"rollout {2 * i + 1} over rollout {2 * i}" for i in range(3)]
