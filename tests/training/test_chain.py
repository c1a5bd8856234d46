"""A chain of stages: each starts from the fp32 weights of the one before, and a broken chain ends like a whole one."""

import gc
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import load_config
from alignkit.errors import CheckpointError
from alignkit.models.folder import LORA_FILE
from alignkit.stages import stage_configs
from alignkit.stages.chain import run_chain
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.masters import MASTERS, RECORD
from alignkit.training.metrics import MetricsLog, read_metrics

CHAIN = ("stages=[{name: sft, train: {steps: 3}}, {name: localdpo, train: {steps: 2}}]", "train.learning_rate=1e-3")
LORA = "train.lora={rank: 4, alpha: 8}"
CONFIG = Path(__file__).parents[2] / "configs" / "wan-tiny-localdpo.yaml"
EXPORTED = "transformer/*.safetensors", LORA_FILE


@pytest.fixture
def process():
    return start_process()


def results(config) -> dict[str, bytes]:
    """Every byte that a chain is for: the curves of its stages and what it hands on and exports."""
    files = [train_folder(stage) / name for _, stage in stage_configs(config) for name in ("metrics.jsonl", MASTERS)]
    files += export_folder(config).glob("transformer/*.safetensors")
    found = {str(file.relative_to(config.output.dir)): file.read_bytes() for file in files}
    for file in export_folder(config).glob(LORA_FILE):  # its header's entries stand in no fixed order
        found |= {name: value.numpy().tobytes() for name, value in load_file(file).items()}
    return found


@pytest.mark.parametrize("keys", [(), ("model.dtype=bf16",), (LORA,)], ids=["fp32", "bf16", "lora"])
def test_each_stage_starts_where_the_one_before_ended(run_with_pairs, process, keys, base_weights):
    config, _ = run_with_pairs("run", *CHAIN, *keys)
    assert run_chain(config, process)
    (_, sft), (_, localdpo) = stage_configs(config)
    first, second = (read_metrics(train_folder(stage) / "metrics.jsonl") for stage in (sft, localdpo))
    assert [row["step"] for row in first] == [1, 2, 3] and [row["step"] for row in second] == [1, 2]
    # the reference is the stage's start, with the adapters that were trained before
    assert second[0]["rewards/margins"] == second[0]["region/logit"] == 0.0 and second[1]["rewards/margins"] != 0.0
    handed = [load_file(train_folder(stage) / MASTERS) for stage in (sft, localdpo)]
    assert handed[0].keys() == handed[1].keys()
    assert all(value.dtype == torch.float32 for value in handed[0].values())
    assert not export_folder(sft).exists() and not export_folder(localdpo).exists()
    if keys != (LORA,):
        exported = load_file(next(export_folder(config).glob("transformer/*.safetensors")))
        assert all(torch.equal(value, handed[1][name]) for name, value in exported.items())

    # with a rate of 0 the second stage hands on exactly what it was handed
    still = CHAIN[0].replace("{steps: 2}", "{steps: 1, learning_rate: 0}")
    config, _ = run_with_pairs("still", still, CHAIN[1], *keys)
    assert run_chain(config, process)
    masters = [load_file(train_folder(stage) / MASTERS) for _, stage in stage_configs(config)]
    assert all(torch.equal(value, masters[1][name]) for name, value in masters[0].items())
    if keys != (LORA,):
        assert any(not torch.equal(value, base_weights[name]) for name, value in masters[1].items())


@pytest.mark.parametrize("keys", [("model.dtype=bf16",), (LORA,)], ids=["bf16", "lora"])
def test_after_a_stage_that_trains_nothing_comes_the_plain_run(run_with_pairs, process, keys):
    """To the last bit: handing on loses nothing, whatever the network's dtype."""
    plain, _ = run_with_pairs("plain", "train.steps=3", *keys)
    train(plain, process)
    stages = "stages=[{name: sft, train: {steps: 1, learning_rate: 0}}, {name: localdpo, train: {steps: 3}}]"
    config, _ = run_with_pairs("chain", stages, *keys)
    assert run_chain(config, process)
    runs = plain, stage_configs(config)[1][1]
    curves = [(train_folder(run) / "metrics.jsonl").read_bytes() for run in runs]
    assert curves[0] == curves[1]
    exports = [load_file(next(export_folder(run).glob(EXPORTED[keys == (LORA,)]))) for run in (plain, config)]
    assert all(torch.equal(value, exports[1][name]) for name, value in exports[0].items())


@pytest.mark.parametrize("keys", [("deepspeed.preset=zero3",), (LORA,)], ids=["full zero3", "lora"])
def test_a_chain_that_is_broken_anywhere_ends_like_a_whole_one(run_with_pairs, process, monkeypatch, keys):
    whole, _ = run_with_pairs("whole", *CHAIN, *keys)
    assert run_chain(whole, process)
    broken, _ = run_with_pairs("broken", *CHAIN, *keys)
    write, stops = MetricsLog.write, [2, 5]

    def stop_twice(log, step, *numbers):
        write(log, step, *numbers)
        stop_twice.count += 1
        if stop_twice.count in stops:
            signal.raise_signal(signal.SIGTERM)

    stop_twice.count = 0
    monkeypatch.setattr(MetricsLog, "write", stop_twice)
    assert not run_chain(broken, process), "stopped in the first stage"
    assert not (train_folder(stage_configs(broken)[0][1]) / RECORD).exists()
    assert not run_chain(broken, process), "stopped at the last step of the second"
    assert run_chain(broken, process)
    assert results(broken) == results(whole)
    assert stop_twice.count == 5, "no step was made twice"
    before = {file: file.stat().st_mtime_ns for file in broken.output.dir.rglob("*.safetensors")}
    assert run_chain(broken, process) and stop_twice.count == 5
    assert before == {file: file.stat().st_mtime_ns for file in broken.output.dir.rglob("*.safetensors")}


def test_an_earlier_stage_that_was_changed_is_noticed(run_with_pairs, process):
    config, _ = run_with_pairs("run", *CHAIN)
    assert run_chain(config, process)

    def changed(**keys):
        stages = tuple(s.model_copy(update={"train": s.train | keys} if s.name == "sft" else {}) for s in config.stages)
        return config.model_copy(update={"stages": stages})

    with pytest.raises(CheckpointError, match=r"01-sft/train: this stage was done with train\.learning_rate = 0\.001"):
        run_chain(changed(learning_rate=1e-4), process)
    with pytest.raises(CheckpointError, match=r"02-localdpo/train: this stage was done with stage before = "):
        run_chain(changed(steps=4), process)  # trained on, which changes what the next one starts from


@pytest.mark.parametrize("file", [MASTERS, RECORD])
def test_what_was_handed_on_and_is_damaged_is_refused(run_with_pairs, process, file):
    config, _ = run_with_pairs("run", *CHAIN)
    assert run_chain(config, process)
    target = train_folder(stage_configs(config)[0][1]) / file
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 0x20 if file == MASTERS else 0xFF
    target.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=file):
        run_chain(config, process)


def test_two_processes_run_a_chain_like_one(run_with_pairs, process, command, config_file):
    one, _ = run_with_pairs("one", *CHAIN)
    assert run_chain(one, process)
    two, settings = run_with_pairs("two", *CHAIN)
    result = command("train", config_file, *settings, "--nproc", "2")
    assert result.returncode == 0, result.stderr
    assert json.loads((train_folder(stage_configs(two)[1][1]) / "run.json").read_text())["processes"] == 2
    for (_, a), (_, b) in zip(stage_configs(one), stage_configs(two), strict=True):
        rows = zip(*(read_metrics(train_folder(stage) / "metrics.jsonl") for stage in (a, b)), strict=True)
        for x, y in rows:  # the same numbers summed in another order, as without stages; rates are larger here
            assert x["error_w"] == pytest.approx(y["error_w"], rel=1e-3)


@pytest.mark.parametrize("preset", ["zero2", "zero3", "zero3-offload"])
def test_a_stage_leaves_no_weights_in_memory_for_the_next(run_with_pairs, process, preset, base_weights):
    """DeepSpeed's hooks keep an engine alive that nobody holds: two stages of 14B would need the memory of both."""

    def held() -> int:
        return sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor))

    before = held()
    config, _ = run_with_pairs("run", f"deepspeed.preset={preset}", "train.steps=1")
    train(config, process)
    left = held() - before
    assert left < 0.1 * sum(value.numel() for value in base_weights.values())


def test_fewer_steps_than_a_stage_has_are_refused(run_with_pairs, process):
    config, settings = run_with_pairs("run", *CHAIN)
    assert run_chain(config, process)
    fewer = load_config(CONFIG, [*settings, CHAIN[0].replace("steps: 2", "steps: 1")])
    with pytest.raises(CheckpointError, match="02-localdpo/train: this stage was trained for 2 steps, more than"):
        run_chain(fewer, process)
    (train_folder(stage_configs(config)[1][1]) / RECORD).unlink()
    with pytest.raises(CheckpointError, match="02-localdpo/train: this stage was trained for 2 steps, more than"):
        run_chain(fewer, process)


def test_a_shorter_chain_and_a_run_without_one_export_their_own(run_with_pairs, process):
    config, settings = run_with_pairs("run", *CHAIN)
    assert run_chain(config, process)
    alone = load_config(CONFIG, [*settings, "stages=[{name: sft, train: {steps: 3}}]"])

    def exported():
        return load_file(next(export_folder(config).glob("transformer/*.safetensors")))

    def masters(number):
        return load_file(train_folder(stage_configs(config)[number][1]) / MASTERS)

    def same(a, b):
        return all(torch.equal(value, b[name]) for name, value in a.items())

    assert same(exported(), masters(1)) and not same(exported(), masters(0))
    assert run_chain(alone, process) and same(exported(), masters(0))
    plain = load_config(CONFIG, [*settings, "stages=null", "train.steps=1"])
    train(plain, process)
    assert not same(exported(), masters(0))
    assert run_chain(config, process) and same(exported(), masters(1))
