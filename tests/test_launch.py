"""What a launcher says in the environment, and what starts without anything heavy."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit import launch
from alignkit.errors import ConfigError
from alignkit.launch import (
    end_signals,
    first_host,
    first_of_several,
    lost_peer,
    run_processes,
    slurm_group,
    torchrun_group,
)

TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
NODES = {"SLURM_STEP_NODELIST": "gpu[03-04],cpu1", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a,b[1-2]", "a"),
        ("r[1,4]n-x,c", "r1n-x"),
        ("", ""),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("rack[0-3]_blade[0-41],x[7]", "rack0_blade0"),
    ],
)
def test_the_first_of_slurms_nodes_is_found(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_srun_knows_its_group():
    group = slurm_group(TASK | NODES | {"SLURM_TASKS_PER_NODE": "4,2"})
    port = group.pop("MASTER_PORT")
    assert group == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03",
    }  # fmt: skip
    assert 20_000 <= int(port) < 30_000
    assert slurm_group(TASK | NODES | {"SLURM_PROCID": "0"})["MASTER_PORT"] == port, "all of a step's tasks agree"
    assert slurm_group(TASK | NODES | {"SLURM_TASKS_PER_NODE": "3(x2)"})["LOCAL_WORLD_SIZE"] == "3"
    assert slurm_group(TASK)["MASTER_ADDR"] == "127.0.0.1"


def test_what_is_no_task_of_several_has_no_group():
    assert slurm_group({}) == {}
    assert slurm_group(TASK | {"SLURM_NTASKS": "1"}) == {}
    assert slurm_group({"SLURM_NTASKS": "4"}) == {}, "a shell inside salloc"
    script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "ENVIRONMENT": "BATCH"}
    assert slurm_group(script) == {}, "sbatch's own script"
    assert slurm_group(script | {"SLURM_STEP_ID": "0"}) != {}, "what it starts with srun"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        slurm_group(TASK | {"SLURM_NNODES": "2"})


GROUP = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_a_launcher_that_names_no_local_rank_starts_one_process_a_machine():
    """Kubeflow's PyTorchJob."""
    assert torchrun_group(GROUP) == {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert torchrun_group(GROUP | {"LOCAL_RANK": "1"}) == {}, "the deepspeed launcher"


@pytest.mark.parametrize(
    ("group", "environment", "said"),
    [
        (torchrun_group, {"RANK": "0"}, "RANK: set in the environment without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (torchrun_group, GROUP | {"RANK": "x"}, "RANK: should be a whole number, .* got 'x'"),
        (torchrun_group, GROUP | {"LOCAL_RANK": ""}, "LOCAL_RANK: should be a whole number, .* got ''"),
        (torchrun_group, GROUP | {"RANK": "2"}, "RANK: should be below WORLD_SIZE, 2, in the environment, got 2"),
        (slurm_group, TASK | {"SLURM_NTASKS": "x"}, "SLURM_NTASKS: should be a whole number, .* got 'x'"),
        (slurm_group, TASK | {"SLURM_NTASKS": ""}, "SLURM_NTASKS: should be a whole number, .* got ''"),
        (slurm_group, TASK | {"SLURM_TASKS_PER_NODE": ""}, r"SLURM_TASKS_PER_NODE: .* 4\(x3\),2 say, got ''"),
    ],
)
def test_a_variable_that_no_launcher_sets_so_is_named(group, environment, said):
    with pytest.raises(ConfigError, match=said):
        group(environment)


def test_who_cannot_read_its_number_says_so_itself(monkeypatch):
    """The command line asks while it tells an error, too."""
    monkeypatch.setenv("RANK", "x")
    assert first_of_several()


REFUSED = """
import sys
import time
from pathlib import Path
sys.argv = ["alignkit", *sys.argv[1:]]
from alignkit.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "diffusers", "transformers", "deepspeed", "peft", "av"} & sys.modules.keys()
    print("imported:", *sorted(heavy))
"""


@pytest.mark.parametrize(
    "words",
    [
        ("train", "CONFIG", "train.stepz=3"),
        ("run", "CONFIG", "stages=[{name: nothing}]"),
        ("pairs", "CONFIG", "data.videos=/nowhere"),
        ("rollout", "CONFIG", "data.prompts=/nowhere.txt"),
        ("pairs", "CONFIG", "data={pairs: /nowhere.jsonl}", "--nproc", "2"),
        ("train", "CONFIG", "model.path=/nowhere"),
        ("report", "nowhere.yaml"),
        ("train", "wan-tiny", "train.stepz=3"),
        ("train", "wan-tinny"),
        ("plan", "CONFIG", "--gpu", "TPU"),
        ("plan", "CONFIG", "train.stepz=3"),
    ],
    ids=" ".join,
)
def test_a_command_that_is_refused_for_its_configuration_imports_nothing_heavy(words, config_file, tmp_path):
    words = [str(config_file) if word == "CONFIG" else word for word in words]
    command = [sys.executable, "-c", REFUSED, *words, f"output.dir={tmp_path / 'out'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stdout.strip() == "imported:", result.stdout
    assert not list(tmp_path.iterdir())


def test_processes_that_srun_starts_train_as_one_run(run_with_pairs, start_command, monkeypatch):
    """`srun -n 2 alignkit train`, with a stand-in for srun: the variables it sets for its tasks."""
    config, settings = run_with_pairs("run", "train.steps=2")
    tasks = []
    for number in range(2):
        for name, value in {"JOB_ID": 99, "STEP_ID": os.getpid() % 9000, "NTASKS": 2, "PROCID": number}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        tasks.append(start_command("train", "wan-tiny-localdpo", *settings))
    errors = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert "training on 2 process(es)" in errors[0] and "training on" not in errors[1]
    assert list((config.output.dir / "train/checkpoints").glob("step-00000002/*rank_1*optim_states.pt"))


def test_nproc_beside_srun_is_refused(command, config_file, monkeypatch):
    for name, value in {"NTASKS": 2, "PROCID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    result = command("train", config_file, "--nproc", "2")
    assert result.returncode == 2 and "leave --nproc out" in result.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_a_signal_ended_is_named_by_who_started_it(run_with_pairs, start_command, config_file, number):
    """As the system does to one when memory runs out, which leaves no word of it."""
    config, settings = run_with_pairs("run", "train.steps=100000")
    started = start_command("train", config_file, *settings, "--nproc", 2)
    metrics = config.output.dir / "train" / "metrics.jsonl"
    while not metrics.exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
    assert len(children) == 2
    os.kill(children[number], signal.SIGKILL)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 128 + signal.SIGKILL
    assert f"alignkit: process {number} was ended by SIGKILL (of a machine without memory left, say" in said
    assert "Traceback" not in said


ASKING = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


@pytest.fixture
def handlers_put_back():
    before = {number: signal.getsignal(number) for number in ASKING}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where all of this was started under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_put_back")
@pytest.mark.parametrize("number", ASKING)
def test_whatever_asks_the_launcher_alone_for_an_end_reaches_who_it_started(monkeypatch, number):
    """A supervisor or a notebook interrupts no one else."""
    asked, sent = [], []

    class Child:
        def __init__(self, *_, **__):
            self.send_signal = sent.append

        def wait(self, timeout):
            if not asked:
                asked.append(os.kill(os.getpid(), number))
                raise subprocess.TimeoutExpired("it", timeout)
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    assert run_processes(["train"], 2) == 0
    assert sent == [signal.SIGTERM, signal.SIGTERM]


@pytest.mark.usefixtures("handlers_put_back")
def test_under_nohup_a_lost_connection_is_passed_over():
    assert signal.SIGHUP in end_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in end_signals()


class DistBackendError(RuntimeError):
    """As torch names NCCL's."""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14750."), True),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (DistBackendError("NCCL error: Duplicate GPU detected"), False),
        (RuntimeError("CAS service error: Request failed: Connection reset by peer (os error 104)"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_an_error_that_is_not_of_another_processs_end_is_not_taken_for_it(error, lost):
    assert lost_peer(error) is lost
