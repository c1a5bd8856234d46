"""Training at each side's own states: the same numbers on 1, 2 and 4 processes, resumed or not, in every mode."""

import json

import pytest
import torch

from alignkit.apo.pairs import build_rollout_pairs
from alignkit.config import load_config
from alignkit.errors import CheckpointError
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics

BASE = ("noise.path_between=false", "deepspeed.preset=zero2", "train.micro_batch_size=1", "train.global_batch_size=4")
MODES = {
    "shared": ("noise.source=shared", "noise.timesteps=logit_normal"),
    "initial": ("noise.source=initial",),
    "path": ("noise.source=path", "noise.timesteps=uniform"),
    "between": ("noise.source=path", "noise.path_between=true"),
    "inversion": ("noise.source=inversion", "noise.max_inversion_error=0.01"),
    "guided": ("noise.source=path", "noise.guided=true", "deepspeed.preset=zero3"),
    "adaptive": ("noise.source=path", "noise.timesteps=adaptive", "train.learning_rate=1e-4"),
}
STEPS = 2
ON_SEVERAL = {2: ("shared", "path", "guided", "adaptive"), 4: ("initial", "between", "inversion")}  # each once: seconds
IN_EVERY_MODE = """
import json, os, sys
import torch
from pathlib import Path
from alignkit.config import load_config
from alignkit.models import load_model
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import free_port, start_process
from alignkit.training.engine import load_network
from alignkit.training.run import start_run
from alignkit.training.weights import open_start

def train(file, modes):
    process, linear = start_process(), torch.nn.functional.linear
    torch.set_num_threads(1)
    answers = {}
    for mode, settings in modes.items():
        torch.nn.functional.linear = linear  # of ZeRO-3's own rounding
        config = load_config(sys.argv[1], settings)
        model = load_model(config.model, with_transformer=False, with_encoders=False)
        start = open_start(config, model)
        model.transformer, _ = load_network(config, process, model, start)
        run = start_run(config, process, model, PairStore(pairs_folder(config, "train")), start)
        answers[mode] = [run.step(number).metrics for number in range(int(sys.argv[3]))]
        run.release()
    if process.main:
        file.write_text(json.dumps(answers))

for count, names in json.loads(sys.argv[4]):  # forked: the imports are paid for once
    modes = {name: settings for name, settings in json.loads(sys.argv[2]).items() if name in names}
    address, running = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}, []
    for rank in range(count):
        child = os.fork()
        if not child:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update(address, **{name: str(number) for name, number in numbers.items()})
            train(Path(sys.argv[5]) / f"{count}.json", modes)
            sys.exit()
        running.append(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status:  # the others would wait for it
            for other in running:
                os.kill(other, 9)
            sys.exit(1)
"""


@pytest.fixture(scope="module")
def stores(made_rollouts, rollout_overrides, config_file, tmp_path_factory):
    """Folders of pairs: with the rollouts' own states, and with inversions of the same videos."""
    out = tmp_path_factory.mktemp("inverted") / "run"
    more = [f"data.rollouts={made_rollouts / 'rollouts'}", "noise.source=inversion", "noise.path_between=false"]
    build_rollout_pairs(load_config(config_file, rollout_overrides(out, *more)), torch.device("cpu"), show=False)
    return {"own": made_rollouts / "pairs", "inverted": out / "pairs"}


def settings_of(mode, stores, rollout_overrides, out):
    store = stores["inverted" if mode == "inversion" else "own"]
    return rollout_overrides(out, f"pairs.folder={store}", *BASE, *MODES[mode])


@pytest.fixture(scope="module")
def metrics_on(stores, rollout_overrides, config_file, command, tmp_path_factory):
    """Every mode's metrics of two steps, by the number of processes."""
    folder = tmp_path_factory.mktemp("modes")
    settings = {mode: settings_of(mode, stores, rollout_overrides, folder / mode) for mode in MODES}
    counts = {1: tuple(MODES), **ON_SEVERAL}
    arguments = [config_file, json.dumps(settings), str(STEPS), json.dumps([*counts.items()]), folder]
    result = command(*arguments, python=("-c", IN_EVERY_MODE))
    assert result.returncode == 0, result.stderr
    return {count: json.loads((folder / f"{count}.json").read_text()) for count in counts}


def test_a_global_batch_has_the_same_numbers_on_any_number_of_processes(metrics_on):
    one = metrics_on[1]
    for processes in (2, 4):
        several = metrics_on[processes]
        for mode in several:
            first, second = ((a, b) for a, b in zip(one[mode], several[mode], strict=True))
            # the first step's pairs are the same numbers, summed over processes in another order, in fp64
            for key, value in first[0].items():
                if key != "grad_norm" and isinstance(value, float):
                    assert first[1][key] == pytest.approx(value, rel=1e-12, abs=1e-15), (mode, processes, key)
            assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4), (mode, processes)
            # the second's come after a step whose gradients were summed in another order (see test_training)
            assert second[0]["error_w"] == pytest.approx(second[1]["error_w"], rel=1e3 * 2**-24), (mode, processes)
            assert second[0]["rewards/margins"] == pytest.approx(
                second[1]["rewards/margins"], abs=2500 * 1e3 * 2**-24
            ), (mode, processes)
    for mode, (first, second) in one.items():
        assert first["rewards/margins"] == first["region/logit"] == 0.0, f"{mode}: at the reference every logit is 0"
        assert second["rewards/margins"] != 0.0
    assert one["inversion"][0]["inversion/error"] > 0 and "inversion/error" not in one["path"][0]
    assert (
        len({one[mode][0]["error_w"] for mode in ("shared", "initial", "path", "between", "inversion", "guided")}) == 6
    )


@pytest.mark.parametrize("mode", ["between", "adaptive", "inversion"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(mode, stores, rollout_overrides, config_file, tmp_path):
    files = {}
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            settings = settings_of(mode, stores, rollout_overrides, tmp_path / name)
            assert train(load_config(config_file, [*settings, f"train.steps={steps}"]), start_process())
        files[name] = (train_folder(load_config(config_file, settings)) / "metrics.jsonl").read_bytes()
    assert files["parts"] == files["whole"]
    rows = read_metrics(tmp_path / "whole" / "train" / "metrics.jsonl")
    assert rows[3]["rewards/margins"] != 0.0 and "signal" not in rows[3]


def test_what_an_adaptive_law_has_learnt_moves_what_is_trained_next(stores, rollout_overrides, config_file, tmp_path):
    """Else the state of a resumed run could be lost and no test would see it."""
    seen = {}
    for name in ("adaptive", "path"):
        settings = settings_of(name, stores, rollout_overrides, tmp_path / name)
        config = load_config(config_file, [*settings, "noise.timesteps=" + ("adaptive" if name == "adaptive" else
        "schedule"), "train.steps=6", "train.learning_rate=1e-4"])  # fmt: skip
        assert train(config, start_process())
        seen[name] = [row["noise_level"] for row in read_metrics(train_folder(config) / "metrics.jsonl")]
    assert seen["adaptive"][0] == seen["path"][0] and seen["adaptive"] != seen["path"]


def test_other_terms_than_a_checkpoints_are_named(stores, rollout_overrides, config_file, tmp_path):
    settings = settings_of("path", stores, rollout_overrides, tmp_path / "run")
    assert train(load_config(config_file, [*settings, "train.steps=1"]), start_process())
    for change, words in (
        ("noise.interval=[0.1,1.0]", r"noise.interval = None, now it is \[0.1, 1.0\]"),
        ("noise.guided=true", "noise.guided = None, now it is True"),
        ("noise.timesteps=schedule", "noise.timesteps = 'uniform', now it is 'schedule'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            train(load_config(config_file, [*settings, change, "train.steps=2"]), start_process())
