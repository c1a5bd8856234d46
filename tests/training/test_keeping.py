"""Nothing that was saved is lost: damaged checkpoints, changed settings, folders that are not one, silent processes."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from alignkit.config import load_config
from alignkit.errors import CheckpointError, ConfigError, MomentError
from alignkit.training import loop
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import MetricsLog, read_metrics
from alignkit.training.run import Run


@pytest.fixture
def process():
    return start_process()


def changed(config, **keys):
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def metrics(config) -> bytes:
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def names(config) -> list[str]:
    return sorted({path.parent.name for path in (train_folder(config) / "checkpoints").glob("*/*_states.pt")})


def tree(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def hurt(checkpoint, how: str = "flipped") -> None:
    file = max(checkpoint.rglob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    match how:
        case "flipped":
            file.write_bytes(bytes(data))
        case "cut off":
            file.write_bytes(bytes(data[: len(data) // 2]))
        case "no manifest":
            (checkpoint / "manifest.json").unlink()
        case "a shard struck out":
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            (name,) = (name for name in manifest["files"] if name.endswith("optim_states.pt"))
            del manifest["files"][name], manifest["digest"]
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def six_steps(made_pairs, overrides, config_file, tmp_path_factory):
    """A run of six steps, saved after 2, 4 and 6, all three kept."""
    out = tmp_path_factory.mktemp("six") / "run"
    shutil.copytree(made_pairs, out)
    config = load_config(config_file, overrides(out, "train.keep_checkpoints=3"))
    train(config, start_process())
    return config


@pytest.fixture
def copied(six_steps, overrides, config_file, tmp_path):
    """`copied("train.steps=8")`: a copy of that run, to be gone on with."""

    def copy(*more):
        shutil.copytree(six_steps.output.dir, tmp_path / "run")
        return load_config(config_file, overrides(tmp_path / "run", "train.keep_checkpoints=3", *more))

    return copy


def test_damaged_checkpoints_are_set_aside_and_new_ones_live_beside_them(copied, process, capfd, six_steps):
    """Two with high numbers made a run start over and delete each new save as soon as it was written."""
    config = copied("train.keep_checkpoints=1")
    folder = train_folder(config) / "checkpoints"
    hurt(folder / "step-00000006", "flipped")
    hurt(folder / "step-00000004", "cut off")
    for number in (98, 99):
        shutil.copytree(folder / "step-00000004", folder / f"step-{number:08d}")
    train(config, process)
    said = capfd.readouterr().err
    assert said.count("passing over checkpoint") == 4 and "resuming after step 2" in said
    damaged = [f"damaged-step-{number:08d}" for number in (4, 6, 98, 99)]
    assert names(config) == [*damaged, "step-00000006"]
    assert metrics(config) == metrics(six_steps)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_set_aside(copied, process, six_steps):
    config = copied()
    newest = train_folder(config) / "checkpoints" / "step-00000006"
    file = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    file.rename(newest / "kept")
    file.symlink_to("/proc/self/mem")  # gives EIO
    before = names(config)
    with pytest.raises(MomentError, match=r"step-00000006: the machine cannot read it just now"):
        train(config, process)
    assert names(config) == before
    (newest / "kept").replace(file)
    train(config, process)
    assert names(config) == before and metrics(config) == metrics(six_steps)


def test_a_folder_whose_name_is_a_pattern_resumes_from_its_own_checkpoint(
    six_steps, overrides, config_file, tmp_path, process
):
    """DeepSpeed loaded r[a]'s weights from ra."""
    for name in ("ra", "r[a]", "plain"):
        shutil.copytree(six_steps.output.dir, tmp_path / name)
    for file in (tmp_path / "ra/train/checkpoints").rglob("*.pt"):
        file.write_bytes(b"another run's")
    runs = [load_config(config_file, overrides(tmp_path / name, "train.steps=7")) for name in ("r[a]", "plain")]
    for config in runs:
        train(config, process)
    assert metrics(runs[0]) == metrics(runs[1]) and metrics(runs[0]).count(b"\n") == 7


@pytest.mark.parametrize("accepted", ["train.ema", "reference.strategy"])
def test_a_term_that_no_checkpoint_can_follow_changes_nothing_where_it_is_accepted(copied, process, accepted):
    key = {"train.ema": "train.ema=0.9", "reference.strategy": "reference={strategy: ema, decay: 0.9}"}[accepted]
    config = copied(key, f"train.accept=[{accepted}]")
    hurt(train_folder(config) / "checkpoints" / "step-00000006")
    before = tree(config.output.dir)
    with pytest.raises((CheckpointError, ConfigError)):
        train(config, process)
    assert tree(config.output.dir) == before


def test_no_start_over_in_silence_where_no_checkpoint_is_whole(copied, process, capfd, six_steps):
    config = copied()
    folder = train_folder(config) / "checkpoints"
    for checkpoint, how in zip(
        sorted(folder.glob("step-*")), ("flipped", "no manifest", "a shard struck out"), strict=True
    ):
        hurt(checkpoint, how)
    before = tree(config.output.dir)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of its 3 checkpoints is whole.*train\.restart=true"):
            train(config, process)
        assert tree(config.output.dir) == before, "a command that is refused changes nothing"
    train(changed(config, restart=True), process)
    assert [name for name in names(config) if name.startswith("step-")] == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert len([name for name in names(config) if name.startswith("damaged-")]) == 3
    assert metrics(config) == metrics(six_steps)
    train(changed(config, restart=True), process)  # a job that is started again with it goes on
    assert "resuming after step 6" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.steps=4"], r"was trained for 6 steps, more than its train\.steps, 4"),
        (["train.learning_rate=1e-5"], r"train\.learning_rate = 3e-06, now it is 1e-05"),
        (["train.weight_decay=0.5", "train.accept=[train.learning_rate]"], r"train\.weight_decay = 0\.001"),
        (["objective.beta=10"], r"objective\.beta = 5000\.0, now it is 10\.0"),
        (["model.max_sequence_length=60"], r"model\.max_sequence_length = 64, now it is 60"),
        (["noise.timesteps=schedule"], r"noise\.timesteps = 'path'|noise\.timesteps"),
    ],
)
def test_a_run_that_is_refused_for_its_checkpoint_changes_nothing(copied, process, settings, words):
    config = copied(*settings)
    before = tree(config.output.dir)
    with pytest.raises(CheckpointError, match=words):
        train(config, process)
    assert tree(config.output.dir) == before


def test_noise_levels_that_have_moved_are_noticed(copied, process, tmp_path):
    """The weights are the same; where on the path they are trained is another place."""
    config = copied("train.steps=7")
    moved = shutil.copytree(config.model.path, tmp_path / "moved")
    file = moved / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 12.0}))
    before = tree(config.output.dir)
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"path": str(moved)})})
    with pytest.raises(CheckpointError, match=r"step-00000006: written with scheduler = '\w+', now it is '\w+'"):
        train(elsewhere, process)
    assert tree(config.output.dir) == before
    manifest = train_folder(config) / "checkpoints" / "step-00000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["terms"]["scheduler"], content["digest"]  # as an older version wrote it
    manifest.write_text(json.dumps(content))
    train(config, process)
    assert metrics(config).count(b"\n") == 7


def test_a_setting_is_changed_on_purpose_and_it_is_on_record(copied, process, capfd):
    config = copied("train.steps=8", "train.learning_rate=1e-5", "train.weight_decay=0.5")
    config = changed(config, accept=("train.learning_rate", "train.weight_decay"))
    train(config, process)
    assert "resuming with train.learning_rate = 1e-05, which was 3e-06" in capfd.readouterr().err
    assert [row["lr"] for row in read_metrics(train_folder(config) / "metrics.jsonl")] == [3e-6] * 6 + [1e-5] * 2
    manifest = json.loads((train_folder(config) / "checkpoints/step-00000008/manifest.json").read_text())
    assert {"step": 6, "term": "train.weight_decay", "was": 0.001, "now": 0.5} in manifest["accepted"]
    train(changed(config, steps=10, accept=()), process)  # the new ones hold from now on
    manifest = json.loads((train_folder(config) / "checkpoints/step-00000010/manifest.json").read_text())
    assert len(manifest["accepted"]) == 2


def test_a_setting_that_cannot_change_is_not_accepted(config_file, overrides, tmp_path):
    for name in ("model", "train.lora", "train.stepz", "dtype"):
        with pytest.raises(ConfigError, match=rf"train\.accept: {re.escape(name)}"):
            load_config(config_file, overrides(tmp_path, f"train.accept=[{name}]"))


def test_a_key_that_an_older_version_did_not_write_is_as_its_default(copied, process, capfd):
    config = copied("train.steps=7")
    for checkpoint in (train_folder(config) / "checkpoints").glob("step-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["digest"]
        for key in ("version", "train.compile", "objective.poly_alpha", "objective.weight_sft"):
            del manifest["terms"][key]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    train(config, process)
    assert "resuming after step 6" in capfd.readouterr().err


def test_a_stop_between_micro_batches_drops_the_step_and_does_it_again(copied, process, capfd, monkeypatch, six_steps):
    """Torchrun and Slurm kill 30 seconds after SIGTERM, and a step of a large model takes minutes."""
    config = copied("train.steps=6", "train.checkpoint_every=100")
    shutil.rmtree(train_folder(config))
    forward, calls = Run._forward_backward, []

    def stopped_in_the_fourth_step(run, micro, number):
        calls.append(number)
        if calls.count(3) == 1 and number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, micro, number)

    monkeypatch.setattr(Run, "_forward_backward", stopped_in_the_fourth_step)
    assert train(config, process) is False
    assert calls == [0, 0, 1, 1, 2, 2, 3], "nothing after the micro-batch under way"
    assert "stopped in step 4, which will be done again" in capfd.readouterr().err
    assert names(config) == ["step-00000003"]
    assert train(config, process) is True
    assert metrics(config) == metrics(six_steps)


def test_a_save_comes_by_the_clock_too(copied, process, monkeypatch):
    config = copied("train.steps=3", "train.checkpoint_every=100", "train.checkpoint_minutes=10")
    shutil.rmtree(train_folder(config))
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    write = MetricsLog.write

    def seven_minutes_a_step(log, *given):
        now[0] += 7 * 60
        write(log, *given)

    monkeypatch.setattr(MetricsLog, "write", seven_minutes_a_step)
    train(config, process)
    assert names(config) == ["step-00000002", "step-00000003"]


def test_a_skipped_step_names_the_pair(copied, process, monkeypatch, capfd):
    config = copied("train.steps=3")
    shutil.rmtree(train_folder(config))
    visited = Run.states
    ids, sources = [], []

    def spoiled(run, batch, epochs):
        states = visited(run, batch, epochs)
        if not ids:
            ids.append(int(batch.ids[1]))
            sources.append(run.store[run.store.ids.index(ids[0])].source)
            batch.winner[1].fill_(float("nan"))
        return states

    monkeypatch.setattr(Run, "states", spoiled)
    train(config, process)
    said = capfd.readouterr().err
    assert f"step 1 is skipped, its loss or gradient is not finite: pair {ids[0]} ({sources[0]})\n" in said
    assert said.count("is skipped") == 1


def environment(rank: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}


IMPATIENT = """
from alignkit.__main__ import main
from alignkit.training import distributed

distributed.SEEN_WITHIN_S = 1.0
main()
"""


def test_a_folder_that_the_processes_do_not_share_is_refused(run_with_pairs, config_file, start_command, tmp_path):
    from alignkit.launch import free_port

    port, ranks = free_port(), []
    for rank in range(2):
        _, settings = run_with_pairs(f"node{rank}")
        ranks.append(start_command("train", config_file, *settings, code=IMPATIENT, env=environment(rank, port)))
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert "is not one folder for all processes: 1 on" in errors[0]
    for rank in range(2):
        assert not (tmp_path / f"node{rank}" / "train").exists()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_named_and_the_run_ends(run_with_pairs, config_file, start_command, stopped):
    from alignkit.launch import free_port

    config, settings = run_with_pairs("run", "train.steps=100000", "train.stuck_seconds=3")
    port, ranks = free_port(), []
    for rank in range(2):
        ranks.append(start_command("train", config_file, *settings, env=environment(rank, port)))
    try:
        file = train_folder(config) / "metrics.jsonl"
        while all(rank.poll() is None for rank in ranks) and (not file.exists() or file.read_bytes().count(b"\n") < 3):
            time.sleep(0.05)
        ranks[stopped].send_signal(signal.SIGSTOP)
        said = ranks[1 - stopped].communicate(timeout=60)[1]
        assert ranks[1 - stopped].returncode == 1
        assert re.search(rf"alignkit: process {stopped} on \S+, last at \S.*, is not heard of for", said)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_is_one_line_of_the_other(run_with_pairs, config_file, start_command, killed):
    from alignkit.launch import free_port

    config, settings = run_with_pairs("run", "train.steps=100000")
    port = free_port()
    ranks = [start_command("train", config_file, *settings, env=environment(rank, port)) for rank in range(2)]
    try:
        file = train_folder(config) / "metrics.jsonl"
        while all(rank.poll() is None for rank in ranks) and (not file.exists() or file.read_bytes().count(b"\n") < 3):
            time.sleep(0.05)
        os.kill(ranks[killed].pid, signal.SIGKILL)
        said = ranks[1 - killed].communicate(timeout=60)[1]
        assert ranks[1 - killed].returncode == 1
        assert "Traceback" not in said and said.count("alignkit: ") == 1, said
        assert re.search(
            r"^alignkit: .*process.* has ended, or cannot be reached; what was saved is kept", said, re.MULTILINE
        )
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


SILENT = """
import ctypes, os, signal, sys, time
import torch
from alignkit.training.distributed import Process
from alignkit.training.heartbeat import heartbeat

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
with heartbeat(Process(rank, 2, rank, torch.device("cpu")), 1.0):
    if rank == 0 and sys.argv[1] == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0:
        ctypes.PyDLL(None).sleep(600)  # as a library that waits with the interpreter's lock in its hands
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["stopped", "locked"])
def test_a_first_process_that_falls_silent_before_a_beat_was_heard_is_named(start_command, how):
    from alignkit.launch import free_port

    port = free_port()
    ranks = [start_command(how, code=SILENT, env=environment(rank, port)) for rank in range(2)]
    try:
        said = ranks[1].communicate(timeout=60)[1]
        assert ranks[1].returncode == 1
        assert re.search(r"alignkit: process 0 on \S+, last at loading, is not heard of for", said)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
