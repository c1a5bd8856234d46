"""Runs that are killed or stopped, at random moments and inside a save, end with the metrics of an unbroken run."""

import os
import random
import signal
import time
from functools import partial

import psutil
import pytest

from alignkit.commands import run_command
from alignkit.config import OutputSection
from alignkit.experiments import driver
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder
from alignkit.training.loop import _stop_signals, train, train_folder
from alignkit.training.metrics import MetricsLog, read_metrics

# Ends the process at the worst moment of the second save: everything written, not yet renamed.
KILLED_IN_A_SAVE = """
import os, signal, sys
from alignkit.training import checkpoints
rename, saves = os.rename, []
def kill_at_second(source, target):
    if "step-" in str(target):
        saves.append(target)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
checkpoints.os.rename = kill_at_second
sys.argv = ["alignkit", *sys.argv[1:]]
from alignkit.__main__ import main
main()
"""


@pytest.fixture
def unbroken(run_with_pairs):
    config, _ = run_with_pairs("unbroken")
    train(config, start_process())
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def test_killed_at_random_moments_it_reaches_the_same_metrics(run_with_pairs, config_file, start_command, unbroken):
    config, settings = run_with_pairs("killed")
    draw = random.Random()
    file = train_folder(config) / "metrics.jsonl"
    moments = []
    for _ in range(2):
        child = start_command("train", config_file, *settings)
        lines = len(read_metrics(file)) if file.exists() else 0
        while child.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") <= lines):
            time.sleep(0.01)  # until its first step is done: starting takes longer than training
        moments.append(draw.uniform(0, 1.0))
        time.sleep(moments[-1])
        child.kill()
        child.wait()
    last = start_command("train", config_file, *settings)
    errors = last.communicate()[1]
    assert last.returncode == 0, f"killed {moments} s after a first step: {errors}"
    assert file.read_bytes() == unbroken, f"killed {moments} s after a first step"


def test_killed_inside_a_save_it_reaches_the_same_metrics(run_with_pairs, config_file, command, unbroken):
    config, settings = run_with_pairs("killed")
    result = command("train", config_file, *settings, python=("-c", KILLED_IN_A_SAVE))
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = {path.name for path in (train_folder(config) / "checkpoints").iterdir()}
    assert "step-00000002" in names and "step-00000004" not in names
    result = command("train", config_file, *settings)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stderr
    assert (train_folder(config) / "metrics.jsonl").read_bytes() == unbroken


def test_sigterm_saves_a_checkpoint_on_both_processes_and_exits_0(run_with_pairs, config_file, start_command):
    config, settings = run_with_pairs("stopped", "train.steps=200", "train.checkpoint_every=1000")
    child = start_command("train", config_file, *settings, "--nproc", "2")
    file = train_folder(config) / "metrics.jsonl"
    while child.poll() is None and (not file.exists() or b"\n" not in file.read_bytes()):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    errors = child.communicate()[1]
    assert child.returncode == 0, errors
    done = len(read_metrics(file))
    assert 0 < done < 200
    assert (train_folder(config) / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()


@pytest.fixture(autouse=True)
def hang_ups_are_heard():
    """Also where all of this was started under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_whatever_asks_for_an_end_is_heard(number):
    with _stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_a_terminals_interrupt_that_a_launcher_passes_on_ends_nothing_at_once():
    """Whichever of the two comes first; a second one of the terminal's does."""
    with _stop_signals() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_lost_connection_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_to_a_terminal_that_is_gone_is_no_error():
    terminal, end = os.openpty()
    kept = os.dup(2)
    try:
        os.dup2(end, 2)
        os.close(terminal)
        with pytest.raises(OSError):
            os.write(2, b"stopped")
        with _stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(2, b"stopped")
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(end)


@pytest.mark.parametrize("caller", ["stage", "experiment"])
def test_what_calls_a_training_that_is_stopped_stops_too_and_goes_on_later(run_with_pairs, monkeypatch, caller):
    """The demo's next stages would fail without a model, or take an older one; the experiment would start over."""
    pairs, _ = run_with_pairs("pairs")
    out = pairs.output.dir if caller == "stage" else pairs.output.dir.parent / "arm"
    config, call = pairs.model_copy(update={"output": OutputSection(dir=out)}), partial(run_command, "train")
    if caller == "experiment":
        call = partial(driver._train, store=pairs.output.dir)
    write = MetricsLog.write

    def stop_after_the_third(log, step, *numbers):
        write(log, step, *numbers)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stop_after_the_third)
    with pytest.raises(SystemExit) as stopped:
        call(config)
    assert stopped.value.code == 0
    assert (train_folder(config) / "checkpoints" / "step-00000003").is_dir() and not export_folder(config).exists()
    assert not (out / "stages.json").exists(), "a stage that did not end has no time"
    call(config)
    assert export_folder(config).is_dir()
    assert [row["step"] for row in read_metrics(train_folder(config) / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_no_process_outlives_a_killed_launcher(run_with_pairs, config_file, start_command):
    config, settings = run_with_pairs("orphans", "train.steps=100000")
    child = start_command("train", config_file, *settings, "--nproc", "2")
    file = train_folder(config) / "metrics.jsonl"
    while child.poll() is None and (not file.exists() or b"\n" not in file.read_bytes()):
        time.sleep(0.05)
    workers = psutil.Process(child.pid).children()
    assert len(workers) == 2
    child.kill()
    child.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1], "a training process is still there"
