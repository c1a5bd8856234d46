"""A second model that follows the policy, or begins at the base: where it is, and what a checkpoint keeps of it."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.stages import stage_configs
from alignkit.stages.chain import run_chain
from alignkit.stores.pairs import Pair, PairStore, write_block
from alignkit.training import loop
from alignkit.training.distributed import start_process
from alignkit.training.engine import full_precision_weights
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit.training.references.moving import Moving
from alignkit.training.state import load_state, rank_file, save_local_state, save_state, state_damage

BATCH = ("train.global_batch_size=2", "train.checkpointing=none")
RATE = "train.learning_rate=1e-4"
LORA = "train.lora={rank: 4, alpha: 8}"
EMA = ("reference={strategy: ema, every: 2, decay: 0.5}", RATE, *BATCH)


@pytest.fixture
def process():
    return start_process()


@pytest.fixture
def runs(monkeypatch):
    """Those that are started."""
    start, runs = loop.start_run, []
    monkeypatch.setattr(loop, "start_run", lambda *given: runs.append(start(*given)) or runs[-1])
    return runs


def rows_of(config):
    return read_metrics(train_folder(config) / "metrics.jsonl")


def metrics(config) -> bytes:
    return (train_folder(config) / "metrics.jsonl").read_bytes()


def longer(config, steps):
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def agree(row) -> bool:
    return row["rewards/margins"] == row["region/logit"] == row["global/gap_w"] == row["global/gap_l"] == 0.0


def shown(reference) -> dict:
    """The network's parameters, flat, in one process."""
    network = getattr(reference.network, "module", reference.network)
    return {name: getattr(value, "ds_tensor", value).flatten() for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("preset", "dtype", "more"),
    [
        ("zero2", "bf16", (LORA,)),
        ("zero3", "fp32", (LORA,)),
        ("zero3", "bf16", ()),
        ("zero3-offload", "bf16", ()),
    ],
)
def test_a_reference_that_was_set_equal_computes_what_the_policy_does(run_with_pairs, process, preset, dtype, more):
    keys = "reference={strategy: sync, every: 2}", f"deepspeed.preset={preset}", f"model.dtype={dtype}", *BATCH
    config, _ = run_with_pairs("run", "train.steps=3", "train.learning_rate=1e-3", *keys, *more)
    train(config, process)
    assert [agree(row) for row in rows_of(config)] == [True, False, True]


@pytest.mark.parametrize(("preset", "dtype"), [("zero2", "bf16"), ("zero3", "fp32")])
def test_an_average_follows_the_fp32_weights(run_with_pairs, process, monkeypatch, preset, dtype, base_weights):
    """At a rate of which bf16 shows next to nothing."""
    keys = f"deepspeed.preset={preset}", f"model.dtype={dtype}", "train.learning_rate=1e-6"
    config, _ = run_with_pairs("run", *EMA, "train.steps=4", *keys)
    average = {name: value.double() for name, value in base_weights.items()}
    after_step, moves = Moving.after_step, []

    def followed(reference, policy):
        after_step(reference, policy)
        moves.append(reference.state()["steps"] % 2 == 0)
        for name, value in full_precision_weights(policy).items():
            if moves[-1]:
                average[name] = (average[name] + value.double()) / 2
            kept, network = reference.local_state()[name], shown(reference)[name]
            # of one move, both products and their sum are rounded
            torch.testing.assert_close(kept.double(), average[name].flatten(), rtol=2 * 2 * 2**-24, atol=1e-12)
            assert torch.equal(network, kept.to(network.dtype)), name

    monkeypatch.setattr(Moving, "after_step", followed)
    train(config, process)
    assert moves == [False, True, False, True]
    assert sum((average[name] != value.double()).sum().item() for name, value in base_weights.items()) > 1000


def test_a_resumed_run_has_the_reference_that_it_had(run_with_pairs, process, capfd):
    for keys in (("deepspeed.preset=zero2", LORA), ("deepspeed.preset=zero3", "model.dtype=bf16")):
        whole, _ = run_with_pairs(f"whole {keys[0]}", *EMA, *keys, "train.steps=3")
        train(whole, process)
        parts, _ = run_with_pairs(f"parts {keys[0]}", *EMA, *keys, "train.steps=2", "train.checkpoint_every=1")
        train(parts, process)
        # the newest one's is missing: the whole checkpoint is, and the one before is taken
        newest = train_folder(parts) / "checkpoints/step-00000002"
        (newest / rank_file(0)).unlink()
        train(longer(parts, 3), process)
        said = capfd.readouterr().err
        assert f"passing over checkpoint {newest}: {rank_file(0)} is missing" in said and "after step 1" in said
        assert metrics(parts) == metrics(whole) and not agree(rows_of(whole)[2])


def test_on_two_processes_too(run_with_pairs, together, base_weights):
    jobs, compared = [], []
    for preset, dtype in (("zero2", "bf16"), ("zero3", "fp32")):
        keys = f"deepspeed.preset={preset}", f"model.dtype={dtype}", "train.micro_batch_size=1"
        whole, first = run_with_pairs(f"whole {keys[0]}", *EMA, *keys, "train.steps=3")
        parts, second = run_with_pairs(f"parts {keys[0]}", *EMA, *keys)
        jobs += [first, [*second, "train.steps=1"], [*second, "train.steps=3"]]
        compared.append((whole, parts))
    equal = []
    for preset in ("zero2", "zero3"):
        keys = f"deepspeed.preset={preset}", "model.dtype=bf16", "train.micro_batch_size=1", *BATCH
        more = "reference.strategy=sync", "train.steps=2", "train.learning_rate=1e-3"
        config, settings = run_with_pairs(f"equal {preset}", *keys, *more)
        jobs.append(settings)
        equal.append(config)
    together((2, [("train", settings) for settings in jobs]))
    for whole, parts in compared:
        assert metrics(parts) == metrics(whole) and not agree(rows_of(whole)[2])
        files = [train_folder(parts) / "checkpoints/step-00000003" / rank_file(rank) for rank in range(2)]
        held = [sum(value.numel() for value in load_file(file).values()) for file in files]
        whole_model = sum(value.numel() for value in base_weights.values())
        # under ZeRO-3 each tensor is filled up to an even size
        assert whole_model <= sum(held) <= whole_model + len(base_weights) and max(held) < 0.6 * whole_model
    assert all(agree(row) for config in equal for row in rows_of(config))


def test_a_step_that_is_skipped_does_not_count(run_with_pairs, process, runs):
    config, _ = run_with_pairs("run", "reference={strategy: sync, every: 2}", "train.steps=4", RATE, *BATCH)
    store = PairStore(config.output.dir / "pairs/train")
    pairs, size = list(store), store.info.block_size
    pairs[0] = Pair(**{**vars(pairs[0]), "winner": pairs[0].winner * math.nan})
    write_block(store.folder, 0, pairs[:size])
    train(config, process)
    skipped = [row["skipped"] for row in rows_of(config)]
    assert sum(skipped) == 1, "one pair of eight, batches of two, one epoch"
    assert runs[0].reference.state() == {"steps": 3}


def test_in_a_chain_a_reference_may_begin_at_the_base(run_with_pairs, process, runs, base_weights):
    """Also with adapters, which then have the values of new ones, and so no effect."""
    first = {}
    for name, strategy, more in (("copy", "copy", ()), ("full", "sync", ()), ("lora", "sync", (LORA,))):
        own = f"{{name: localdpo, train: {{steps: 2}}, reference: {{strategy: {strategy}, from: base}}}}"
        sft = "{name: sft, train: {steps: 1, learning_rate: 1e-3}}"
        keys = f"stages=[{sft}, {own}]", "deepspeed.preset=zero2", RATE, *BATCH
        config, _ = run_with_pairs(name, *keys, *more)
        assert run_chain(config, process)
        rows = rows_of(stage_configs(config)[1][1])
        first[name] = rows[0]
        assert not agree(rows[0]), "it is the base, and the stage does not begin there"
        assert agree(rows[1]) == (strategy == "sync")
    assert first["copy"] == first["full"]
    copied = shown(runs[1].reference)
    assert all(torch.equal(copied[name], value.flatten()) for name, value in base_weights.items())


def test_where_both_begin_at_the_base_they_must_agree(run_with_pairs, process, runs):
    config, _ = run_with_pairs(
        "run", "reference={strategy: ema, from: base}", "train.steps=1", "stages=[localdpo]", *BATCH
    )
    assert run_chain(config, process) and not runs[0].starts_apart


class Held:
    """Its numbers are shared out among the processes."""

    def __init__(self):
        self.numbers = torch.zeros(3)

    def state(self):
        return {"word": "a"}

    def load_state(self, state):
        assert state == {"word": "a"}

    def local_state(self):
        return {"numbers": self.numbers}

    def load_local_state(self, state):
        self.numbers = state["numbers"]


def test_what_a_process_holds_comes_back_or_the_checkpoint_is_damaged(tmp_path, process):
    part, other = Held(), Held()
    part.numbers = torch.tensor([0.1, 1e-30, 7.0])
    save_local_state(tmp_path, 3, {"one": part, "none": None})
    save_state(tmp_path, 3, {"one": part, "none": None})
    load_state(tmp_path, {"one": other, "none": None})
    assert torch.equal(other.numbers, part.numbers)
    listed = dict.fromkeys([file.name for file in tmp_path.iterdir()] + ["engine.pt"], "")
    assert state_damage(tmp_path, 3, listed) is None
    fewer = {name: "" for name in listed if name != rank_file(0)}
    assert state_damage(tmp_path, 3, fewer) == f"its manifest lists no {rank_file(0)}"
    save_file({"one/numbers": part.numbers}, tmp_path / rank_file(0), metadata={"step": "2"})
    assert state_damage(tmp_path, 3, listed) == f"{rank_file(0)} is of step 2"
