"""Pairs and rollouts by processes that share each video's tokens: those of one process, but for rounding.

Of each group the second process is blind: it can open no video.
"""

import json
import os
import re
import signal
import time

import pytest
import torch
from starting import one_line

from alignkit.apo.pairs import build_rollout_pairs
from alignkit.apo.rollouts import build_rollouts
from alignkit.config import load_config
from alignkit.errors import DataError
from alignkit.given.build import build_given_pairs
from alignkit.launch import free_port, group_size
from alignkit.localdpo.build import build_pairs
from alignkit.sharing import run_lock
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore

CPU = torch.device("cpu")
PAIRS, ROLLOUTS = "pairs.context_parallel=2", "rollout.context_parallel=2"
FAMILIES = {"wan": 2, "experts": 2, "2b": 2, "5b": 4}  # by processes: one group, or two that share the blocks out


@pytest.fixture(scope="module")
def made(pairs_of, rollout_overrides, together_once, tmp_path_factory):
    """Folder of runs, by family: "rollouts" too, each made by groups of two processes."""
    root, jobs = tmp_path_factory.mktemp("made"), {2: [], 4: []}
    for family, count in FAMILIES.items():
        jobs[count].append(
            ("pairs", [*pairs_of(family)[0], f"output.dir={root / family}", "pairs.block_size=3", PAIRS])
        )
    jobs[4].append(("pairs", [*pairs_of("wan")[0], f"output.dir={root / 'two groups'}", "pairs.block_size=3", PAIRS]))
    jobs[2].append(("rollout", rollout_overrides(root / "rollouts", ROLLOUTS)))
    together_once(*jobs.items())
    return root


def distance(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_those_of_one_process(made, pairs_of, family):
    for split in ("train", "heldout"):
        ours, theirs = (PairStore(folder / "pairs" / split) for folder in (made / family, pairs_of(family)[1]))
        assert len(ours) == len(theirs) and ours.info.made["context_parallel"] == 2
        assert "context_parallel" not in theirs.info.made
        for one, other in zip(ours, theirs, strict=True):
            assert (one.id, one.source, one.prompt, one.steps) == (other.id, other.source, other.prompt, other.steps)
            assert torch.equal(one.mask, other.mask) and torch.equal(one.winner, other.winner)
            changed = one.mask.bool().expand_as(one.loser)
            assert torch.equal(one.loser[~changed], one.winner[~changed])
            # sums of another order, over the steps of a sampler
            assert distance(one.loser, other.loser) <= 1e-5
            assert one.origin_l.recipe["regime"]["context_parallel"] == 2


def test_however_many_groups_there_are_the_bytes_are_the_same(made):
    """And however many threads a process may take."""
    one, two = ({file.name: file.read_bytes() for file in (made / name / "pairs/train").glob("block-*.arrow")}
                for name in ("wan", "two groups"))  # fmt: skip
    assert one == two and len(one) == 3


def test_rollouts_are_those_of_one_process(made, made_rollouts):
    ours, theirs = (RolloutStore(folder / "rollouts") for folder in (made / "rollouts", made_rollouts))
    assert ours.ids == theirs.ids and ours.info.made["regime.context_parallel"] == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.path_rows == other.path_rows and one.origin.key == other.origin.key
        assert distance(one.latents, other.latents) <= 1e-5
        assert distance(one.path.states, other.path.states) <= 1e-5
        assert one.origin.recipe["regime"]["context_parallel"] == 2


def test_what_one_process_would_make_is_not_mixed_with_it(made, pairs_of, rollout_overrides, config_file):
    pairs = [*pairs_of("wan")[0], f"output.dir={made / 'wan'}", "pairs.block_size=3"]
    with pytest.raises(DataError, match="context_parallel"):
        build_pairs(load_config(config_file, pairs), CPU, show=False)
    with pytest.raises(DataError, match="context_parallel"):
        build_rollouts(load_config(config_file, rollout_overrides(made / "rollouts")), CPU, show=False)


def test_a_stage_of_a_chain_makes_its_pairs_so_and_trains_on_them(pairs_of, command, config_file, tmp_path):
    stages = "stages=[{name: localdpo, pairs: {seed: 1, context_parallel: 2}}]"
    settings = [*pairs_of("wan")[0], f"output.dir={tmp_path}", "train.steps=1", stages]
    refused = one_line(command("train", config_file, *settings, "train.global_batch_size=6", "--nproc", 3))
    assert "stage localdpo: pairs.context_parallel: 2 does not divide the 3" in refused
    assert not list(tmp_path.rglob("block-*"))
    done = command("train", config_file, *settings, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    (folder,) = {file.parent for file in tmp_path.rglob("train/block-*.arrow")}
    assert PairStore(folder).info.made["context_parallel"] == 2 and (tmp_path / "export").is_dir()


def test_a_stage_whose_videos_cannot_be_used_is_one_line(pairs_of, command, config_file, tmp_path):
    """What the first of a group alone finds out is not taken for pairs that are made."""
    (tmp_path / "empty").mkdir()
    own = f"data: {{videos: {tmp_path / 'empty'}}}, pairs: {{context_parallel: 2}}"
    settings = [*pairs_of("wan")[0], f"output.dir={tmp_path / 'run'}", f"stages=[{{name: localdpo, {own}}}]"]
    line = one_line(command("train", config_file, *settings, "--nproc", 2))
    assert str(tmp_path / "empty") in line and "pairs" not in line


def test_what_cannot_be_shared_is_refused_before_an_earlier_stage_trains(pairs_of, command, config_file, tmp_path):
    settings, folder = pairs_of("wan")
    stages = "stages=[sft, {name: localdpo, pairs: {seed: 1, context_parallel: 3}}]"
    places = f"output.dir={tmp_path}", f"pairs.folder={folder / 'pairs'}"
    batch = "train.global_batch_size=6", "train.micro_batch_size=1"
    line = one_line(command("train", config_file, *settings, *places, *batch, stages, "--nproc", 3))
    assert "stage localdpo: pairs.context_parallel: 3 does not divide the 4 attention heads" in line


@pytest.fixture(params=["given", "anchors"])
def inverted(request, pairs_of, made_rollouts, rollout_overrides, clips, tmp_path):
    """(settings, builder) of pairs with an inverted video on either side, or beside a rollout."""
    videos = [str(clips / f"clip_{number:06d}.mp4") for number in range(4)]
    given = request.param == "given"
    sides = (
        zip(("a", "b"), videos[::2], videos[1::2], strict=True) if given else zip("ab", videos, (1, 6), strict=False)
    )
    rows = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in sides]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row if given else {**row, "prompt": None}) for row in rows))
    places = [f"data.pairs={file}", "data.heldout=0.5"]
    if given:
        noise = "noise={source: inversion, timesteps: schedule, path_steps: 2}"
        more = "objective.name=dpo", noise, "sample.num_inference_steps=4"
        return [*pairs_of("wan")[0][1:], *places, *more], build_given_pairs
    places += [f"data.rollouts={made_rollouts / 'rollouts'}", "noise.anchor=inversion"]
    return rollout_overrides(tmp_path, *places), build_rollout_pairs


def in_another_order(x, weight, bias=None, linear=torch.nn.functional.linear):
    half = x.shape[-1] // 2
    return linear(x[..., :half], weight[:, :half]) + linear(x[..., half:], weight[:, half:], bias)


def test_an_inversion_is_that_of_one_process(inverted, together, config_file, tmp_path, monkeypatch):
    """As near to it as one process comes that adds the products of its layers up in another order."""
    settings, build = inverted
    names = "alone", "reordered", "both"
    alone, reordered, both = ([*settings, f"output.dir={tmp_path / name}"] for name in names)
    build(load_config(config_file, alone), CPU, show=False)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", in_another_order)
        build(load_config(config_file, reordered), CPU, show=False)
    together((2, [("pairs", [*both, PAIRS])]))
    for split in ("train", "heldout"):
        stores = [PairStore(tmp_path / name / "pairs" / split) for name in names]
        assert [store.info.made["inverted_by"].get("context_parallel") for store in stores] == [None, None, 2]
        (theirs,), (near,), (ours,) = stores
        rounding = distance(near.path_w.states, theirs.path_w.states)
        assert 0 < rounding < 1e-3 and ours.path_w.error is not None and ours.path_rows == theirs.path_rows
        assert distance(ours.path_w.states, theirs.path_w.states) <= 4 * rounding


@pytest.mark.parametrize(
    ("name", "settings", "processes", "words"),
    [
        ("pairs", [PAIRS], 1, "pairs.context_parallel: 2 does not divide the 1 process(es) of this run"),
        ("rollout", [ROLLOUTS], 3, "rollout.context_parallel: 2 does not divide the 3 process(es) of this run"),
        ("pairs", [PAIRS, "model.attention=flash_3"], 2, "which pairs.context_parallel asks for"),
        ("pairs", ["pairs.context_parallel=3"], 3, "pairs.context_parallel: 3 does not divide the 4 attention heads"),
        ("pairs", [PAIRS, "data.videos=null", "data.pairs=given.jsonl"], 2, "are shown to no network unless"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    command, overrides, rollout_overrides, config_file, tmp_path, name, settings, processes, words
):
    make = overrides if name == "pairs" else rollout_overrides
    arguments = make(tmp_path / "run", *settings)
    assert words in one_line(command(name, config_file, *arguments, "--nproc", processes))
    assert not list(tmp_path.rglob("block-*"))


SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "a[1-4]"}


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        (SLURM, 4),
        (SLURM | {"RANK": "9", "WORLD_SIZE": "32"}, 32),
    ],
)  # fmt: skip
def test_a_launcher_within_a_slurm_task_says_how_many_there_are(environment, size):
    assert group_size(environment) == size


def test_a_folder_that_another_command_writes_is_refused_by_all_of_a_group(command, overrides, config_file, tmp_path):
    settings = overrides(tmp_path / "run", PAIRS)
    with run_lock(tmp_path / "run", "train"):
        line = one_line(command("pairs", config_file, *settings, "--nproc", 2))
    assert "alignkit train, process" in line


def test_what_the_first_of_a_group_finds_wrong_ends_all_of_it(command, config_file, pairs_of, tmp_path):
    settings, folder = pairs_of("wan")
    settings = [*settings, f"output.dir={tmp_path / 'run'}", f"pairs.folder={folder / 'pairs'}", PAIRS]
    assert "context_parallel" in one_line(command("pairs", config_file, *settings, "--nproc", 2))


def started(start_command, name, config_file, settings, rank, port, **more):
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {key: str(value) for key, value in {"MASTER_ADDR": "127.0.0.1", **numbers, **more}.items()}
    return start_command(name, config_file, *settings, env=environment)


def blocks_of(folder):
    return {file.name: file.read_bytes() for file in (folder / "pairs" / "train").glob("block-*.arrow")}


def test_two_jobs_of_an_array_that_are_groups_share_the_work(made, pairs_of, start_command, config_file, tmp_path):
    settings = [*pairs_of("wan")[0], f"output.dir={tmp_path}", "pairs.block_size=3", PAIRS]
    jobs = []
    for task in (4, 5):
        port, array = free_port(), {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": 4}
        jobs += [started(start_command, "pairs", config_file, settings, rank, port, **array) for rank in range(2)]
    texts = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, texts
    assert blocks_of(tmp_path) == blocks_of(made / "wan")


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_a_group_that_is_killed_ends_the_other_and_nothing_is_lost(
    made, pairs_of, start_command, command, config_file, tmp_path, killed
):
    settings = [*pairs_of("wan")[0], f"output.dir={tmp_path}", "pairs.block_size=1", PAIRS]
    port = free_port()
    ranks = [started(start_command, "pairs", config_file, settings, rank, port) for rank in range(2)]
    while not (kept := blocks_of(tmp_path)):
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        time.sleep(0.01)
    os.kill(ranks[killed].pid, signal.SIGKILL)
    said = ranks[1 - killed].communicate(timeout=60)[1]
    assert ranks[1 - killed].returncode == 1
    assert re.search(
        "^alignkit: another process of this command has ended, or cannot be reached; what was saved", said, re.MULTILINE
    ), said
    assert "Traceback" not in said
    assert blocks_of(tmp_path).items() >= kept.items()
    result = command("pairs", config_file, *settings, "--nproc", 2)
    assert result.returncode == 0, result.stderr
