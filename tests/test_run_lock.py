"""One command at a time writes a run, and what a refused one met is as it was."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from alignkit import demo
from alignkit.errors import ConfigError
from alignkit.sharing import RUN_LOCK, run_lock
from alignkit.training.distributed import start_process
from alignkit.training.loop import train


def hold(folder: Path, command: str, shared: bool, ready, leave) -> None:
    with run_lock(folder, command, shared=shared):
        ready.set()
        leave.wait(60)


@pytest.fixture
def holder():
    """`holder(folder, "train", shared=False)`: another process that writes the run; (process, event to let it go)."""
    context, started = multiprocessing.get_context("fork"), []

    def start(folder: Path, command: str, *, shared: bool):
        ready, leave = context.Event(), context.Event()
        process = context.Process(target=hold, args=(folder, command, shared, ready, leave))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process, leave

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_command_is_told_who_writes_the_run(tmp_path, holder):
    process, leave = holder(tmp_path, "train", shared=False)
    for shared in (False, True):
        with (
            pytest.raises(ConfigError, match=rf"alignkit train, process {process.pid} on .* since 2"),
            run_lock(tmp_path, "pairs", shared=shared),
        ):
            pass
    leave.set()
    process.join()
    with run_lock(tmp_path, "pairs"):
        pass
    assert not list(tmp_path.iterdir())


def test_those_that_share_a_folders_files_out_may_be_many_but_nothing_else_beside_them(tmp_path, holder):
    first, leave = holder(tmp_path, "pairs", shared=True)
    holder(tmp_path, "pairs", shared=True)
    with run_lock(tmp_path, "pairs", shared=True):
        leave.set()
        first.join()
        assert (tmp_path / RUN_LOCK).exists(), "the first to leave takes nothing from those that stay"
    with pytest.raises(ConfigError, match="alignkit pairs, process"), run_lock(tmp_path, "train"):
        pass


def test_what_a_killed_command_held_is_free(tmp_path, holder):
    process, _ = holder(tmp_path, "train", shared=False)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / RUN_LOCK).exists()
    with run_lock(tmp_path, "train"), run_lock(tmp_path / ".." / tmp_path.name, "sample"):
        pass  # and had again within the command
    assert not list(tmp_path.iterdir())


def test_folders_made_for_the_lock_alone_are_gone_afterwards(tmp_path):
    with run_lock(tmp_path / "a" / "b", "train"):
        pass
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_everything_in_a_row_holds_the_run_from_first_to_last(holder, small_config, monkeypatch):
    config = small_config()
    seen = []
    monkeypatch.setattr(demo, "run_command", lambda name, config: seen.append((config.output.dir / RUN_LOCK).exists()))
    monkeypatch.setattr(demo, "_conclude", lambda config: None)
    demo.run(config)
    assert seen == [True] * 5 and not (config.output.dir / RUN_LOCK).exists()
    holder(config.output.dir, "train", shared=False)
    with pytest.raises(ConfigError, match="alignkit train, process"):
        demo.run(config)


def test_training_from_python_takes_the_lock_too(run_with_pairs, holder):
    config, _ = run_with_pairs()
    holder(config.output.dir, "train", shared=False)
    with pytest.raises(ConfigError, match=r"alignkit train, process .* writes it since"):
        train(config, start_process())
    assert not (config.output.dir / "train").exists()
