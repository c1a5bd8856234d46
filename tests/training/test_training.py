"""The training loop on real pairs: repeatable, indifferent to the number of processes, and safe against bad numbers."""

import json
import math
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import TrainSection, dump_config
from alignkit.errors import AlignkitError, CheckpointError, ConfigError, DataError
from alignkit.stores.pairs import Pair, PairStore, write_block
from alignkit.training import engine
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder
from alignkit.training.loop import TrainingDiverged, train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit.training.run import learning_rate


def metrics_of(config):
    return read_metrics(train_folder(config) / "metrics.jsonl")


@pytest.fixture
def process():
    return start_process()


def test_two_runs_with_one_seed_write_the_same_metrics(run_with_pairs, process):
    files = []
    for name in ("one", "two"):
        config, _ = run_with_pairs(name, "train.steps=3")
        train(config, process)
        files.append((train_folder(config) / "metrics.jsonl").read_bytes())
    assert files[0] == files[1]
    rows = [json.loads(line) for line in files[0].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    first = rows[0]
    assert first["region/logit"] == first["rewards/margins"] == first["region/gap_w"] == 0.0
    assert first["region/accuracy"] == first["rewards/accuracies"] == first["region/gradient_factor"] == 0.5
    assert rows[2]["region/logit"] != 0.0


def test_two_processes_agree_with_one_whoever_starts_them(run_with_pairs, process, command, stand_in, monkeypatch):
    """And whatever the configuration is: the folder of a run, or a shipped name."""
    one, _ = run_with_pairs("one", "train.steps=3")
    train(one, process)
    two, _ = run_with_pairs("two", "train.steps=3")
    (two.output.dir / "config.yaml").write_text(dump_config(two))
    result = command("train", two.output.dir, "--nproc", "2")
    assert result.returncode == 0, result.stderr
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        # Both sum the same numbers in another order. A forward is some 10³ fp32 roundings deep, so errors agree to
        # 1e3·2⁻²⁴; a logit is β/2 = 2500 times a difference of errors near 1; Adam's first steps are sign-like,
        # so a weight whose gradient is all rounding may move the other way: 2·lr·steps of it. The gradient carries the
        # factor σ(−logit), whose logarithm has a slope of at most 1: its norm differs by no more than a logit.
        assert a["error_w"] == pytest.approx(b["error_w"], rel=1e3 * 2**-24)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=2500 * 1e3 * 2**-24)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2500 * 1e3 * 2**-24)
    for name, value in stand_in.items():
        monkeypatch.setenv(name, value)
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "alignkit")
    deepspeed = ("deepspeed.launcher.runner", "--num_gpus", "2", "--module", "alignkit")
    for launcher, *options in (torchrun, deepspeed):
        config, settings = run_with_pairs(launcher, "train.steps=3")
        code = f"import os, runpy; os.chdir({str(config.output.dir)!r})\n"
        code += f"runpy.run_module({launcher!r}, run_name='__main__', alter_sys=True)"
        result = command(*options, "train", "wan-tiny-localdpo", *settings, python=("-c", code))
        assert result.returncode == 0, result.stderr
        assert metrics_of(config) == metrics_of(two)


def test_gradient_accumulation_changes_nothing_but_rounding(run_with_pairs, process):
    norms = []
    for name, micro in (("whole", 4), ("parts", 1)):
        config, _ = run_with_pairs(name, "train.steps=1", f"train.micro_batch_size={micro}")
        train(config, process)
        norms.append(metrics_of(config)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e3 * 2**-24)


def test_batch_sizes_that_do_not_divide_are_refused_before_anything_loads(run_with_pairs, process):
    config, _ = run_with_pairs("run", "train.global_batch_size=3")
    with pytest.raises(ConfigError, match="global_batch_size: 3 is not a multiple"):
        train(config, process)


def test_captions_longer_than_the_network_is_to_see_are_refused_before_anything_loads(run_with_pairs, process):
    config, _ = run_with_pairs("run", "model.max_sequence_length=7")
    store = PairStore(config.output.dir / "pairs" / "train")
    longest = max(len(pair.text) for pair in store)
    assert store.longest_text == longest > 7
    with pytest.raises(DataError, match=rf"of {longest} tokens, more than model.max_sequence_length, 7; put that back"):
        train(config, process)
    assert not (config.output.dir / "train").exists()


def test_a_reference_that_is_not_the_policy_is_noticed_at_step_0(run_with_pairs, process, monkeypatch):
    config, _ = run_with_pairs("run", "deepspeed.preset=zero3")
    load = engine.load_partitioned
    loaded = []

    def slightly_off(*arguments):
        network = load(*arguments)
        loaded.append(network)
        if len(loaded) == 2:  # the policy comes first
            network.proj_out.bias.ds_tensor += 1e-3
        return network

    monkeypatch.setattr(engine, "load_partitioned", slightly_off)
    with pytest.raises(AlignkitError, match="step 0: policy and reference differ by"):
        train(config, process)


def spoil(config, rows):
    """Rewrite the training pairs so that `rows` hold a NaN."""
    folder = config.output.dir / "pairs" / "train"
    store = PairStore(folder)
    pairs, size = list(store), store.info.block_size
    for i in rows:
        winner = pairs[i].winner.clone()
        winner[0] = math.nan
        pairs[i] = Pair(**{**vars(pairs[i]), "winner": winner})
    for block in range(store.info.blocks):
        write_block(folder, block, pairs[block * size : (block + 1) * size])


def test_a_step_that_is_not_finite_is_skipped_and_counted(run_with_pairs, process):
    config, _ = run_with_pairs("run", "train.steps=4", "noise.timesteps=uniform")
    spoil(config, [0])
    train(config, process)
    rows = metrics_of(config)
    assert sum(row["skipped"] for row in rows) == 2  # one pair of eight, batches of four, two epochs
    assert all((row["loss"] is None) == bool(row["skipped"]) for row in rows)
    weights = load_file(next(export_folder(config).glob("transformer/*.safetensors")))
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_several_bad_steps_in_a_row_stop_the_run_with_the_batch_saved(run_with_pairs, process):
    config, _ = run_with_pairs("run", "train.max_bad_steps=2")
    spoil(config, range(8))
    with pytest.raises(TrainingDiverged, match="2 steps in a row"):
        train(config, process)
    (file,) = train_folder(config).glob("diverged-step-*.parquet")
    assert len(datasets.Dataset.from_parquet(str(file), cache_dir=str(config.output.dir / "cache"))) == 4
    assert not export_folder(config).exists()


def test_pairs_of_another_model_are_refused(run_with_pairs, process, half_base, tmp_path):
    shutil.copytree(half_base, tmp_path / "other")
    (weights,) = (tmp_path / "other/transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    config, _ = run_with_pairs("run", f"model.path={tmp_path / 'other'}")
    with pytest.raises(DataError, match="its pairs were made with model"):
        train(config, process)


def test_pairs_of_a_strength_that_the_objective_does_not_know_are_refused(run_with_pairs, process):
    config, _ = run_with_pairs("run", "pairs.strengths=[4]", "objective.strength_range=[0.9,1.0]")
    with pytest.raises(DataError, match=r"strength 0\.75, outside objective\.strength_range \[0\.9, 1\]"):
        train(config, process)


def test_resuming_under_other_terms_is_refused_by_name(run_with_pairs, process):
    config, _ = run_with_pairs("run", "train.steps=2")
    train(config, process)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 1e-5, "steps": 4})})
    with pytest.raises(CheckpointError, match=r"train\.learning_rate = 3e-06, now it is 1e-05"):
        train(changed, process)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run_with_pairs, process, capfd):
    whole, _ = run_with_pairs("whole")
    train(whole, process)
    hurt, _ = run_with_pairs("hurt", "train.steps=4")
    train(hurt, process)
    newest = sorted((train_folder(hurt) / "checkpoints").glob("step-*"))[-1]
    file = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    longer = hurt.model_copy(update={"train": hurt.train.model_copy(update={"steps": 6})})
    train(longer, process)
    assert "does not match its hash" in capfd.readouterr().err
    assert metrics_of(longer) == metrics_of(whole)


def test_a_small_update_survives_a_bf16_run_in_the_export(run_with_pairs, process, base_weights):
    """Updates of a tenth of a bf16 ulp are in the fp32 master weights and so in the export."""
    config, _ = run_with_pairs("run", "train.steps=2", "model.dtype=bf16", "train.learning_rate=1e-6")
    train(config, process)
    exported = load_file(next(export_folder(config).glob("transformer/*.safetensors")))
    moved = rounded_away = total = 0
    for name, value in exported.items():
        assert value.dtype == torch.float32
        moved += int((value != base_weights[name].float()).sum())
        rounded_away += int((value.bfloat16() == base_weights[name].bfloat16()).sum())
        total += value.numel()
    assert moved > 0.9 * total
    assert rounded_away > 0.9 * total


def test_the_learning_rate_rises_and_stays_or_falls_by_half_a_cosine():
    warm = TrainSection(steps=10, learning_rate=2.0, warmup_steps=4)
    assert [learning_rate(warm, step) for step in range(10)] == [0.5, 1.0, 1.5, *[2.0] * 7]
    falling = TrainSection(steps=8, learning_rate=3.0, warmup_steps=2, schedule="cosine", min_learning_rate=1.0)
    wanted = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0), T_max=6, eta_min=1.0
    )
    rates = []
    for _ in range(6):
        wanted.optimizer.step(), wanted.step()
        rates.append(wanted.get_last_lr()[0])
    found = [learning_rate(falling, step) for step in range(8)]
    # torch's recursion divides by 1 + cos, 0.067 at the least, in six steps of some ten roundings each
    rounding = 6 * 10 * 2**-53 / 0.067
    assert found[:2] == [1.5, 3.0] and found[2:] == pytest.approx(rates, rel=rounding) and found[-1] == 1.0
    assert learning_rate(TrainSection(steps=1, schedule="cosine", learning_rate=1.0), 0) == pytest.approx(0.0)


def test_a_falling_rate_is_the_same_when_resumed_and_holds_the_steps(run_with_pairs, process):
    keys = "train.schedule=cosine", "train.steps=3", "train.checkpoint_every=1"
    whole, _ = run_with_pairs("whole", *keys)
    train(whole, process)
    broken, _ = run_with_pairs("broken", *keys)
    shutil.copytree(whole.output.dir / "train", broken.output.dir / "train")
    for step in (2, 3):
        shutil.rmtree(train_folder(broken) / f"checkpoints/step-{step:08d}", ignore_errors=True)
    train(broken, process)
    assert metrics_of(broken) == metrics_of(whole)
    assert [row["lr"] for row in metrics_of(whole)] == pytest.approx([2.25e-6, 0.75e-6, 0.0], abs=1e-20)
    longer = broken.model_copy(update={"train": broken.train.model_copy(update={"steps": 5})})
    with pytest.raises(CheckpointError, match=r"train\.steps = 3, now it is 5"):
        train(longer, process)
