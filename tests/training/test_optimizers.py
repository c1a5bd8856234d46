"""`train.optimizer`: moments in fewer bits beside fp32 masters. What needs bitsandbytes runs where it is installed."""

import importlib.util

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import CheckpointError, ConfigError
from alignkit.planning import preset, work
from alignkit.planning.constants import gpu_named
from alignkit.planning.plan import plan
from alignkit.training import loop, optimizers
from alignkit.training.distributed import Process, start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.optimizers import AdamWBf16, make_optimizer
from alignkit.training.reshaping import universal_form
from alignkit.training.settings import deepspeed_config

KEYS = ("train.global_batch_size=2", "train.checkpointing=none", "train.learning_rate=1e-4")
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
LESS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
COUNT = 1000


def values(number: int) -> torch.Tensor:
    i = torch.arange(COUNT, dtype=torch.float64)
    return (torch.sin((1.3 + number) * i + number) * torch.cos(0.37 * i - number)).float()


def stepped(optimizer, parameter, numbers) -> torch.Tensor:
    for number in numbers:
        parameter.grad = values(number)
        optimizer.step()
    return parameter.detach().clone()


def test_moments_in_bf16_are_rounded_once_a_step_and_all_else_is_adamw():
    """Against fp64, with the same rounding: in a thousand numbers one or another moment may fall the other way, which
    changes the updates after it, at most twice the rate each, by a share of 2⁻⁸."""
    parameter = torch.nn.Parameter(values(0))
    got = stepped(AdamWBf16([parameter], SETTINGS), parameter, range(1, 6))
    weight, first, second = values(0).double(), torch.zeros(COUNT).double(), torch.zeros(COUNT).double()
    for number in range(1, 6):
        gradient = values(number).double()
        mean, square = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        first, second = mean.bfloat16().double(), square.bfloat16().double()
        weight *= 1 - 1e-2 * 0.1
        weight -= 1e-2 / (1 - 0.9**number) * mean / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
    far = (got.double() - weight).abs() > 1e-6  # by more than fp32
    assert far.sum() <= COUNT // 100
    torch.testing.assert_close(got.double(), weight, rtol=0, atol=4 * 2**-8 * 1e-2 * 2)
    own, other = (torch.nn.Parameter(values(0)) for _ in range(2))
    torch.testing.assert_close(
        stepped(AdamWBf16([own], SETTINGS), own, [1]), stepped(torch.optim.AdamW([other], **SETTINGS), other, [1])
    )


def test_in_any_chunks_it_is_the_same_and_it_goes_on_where_it_was(monkeypatch):
    whole, parts = (torch.nn.Parameter(values(0)) for _ in range(2))
    wanted = stepped(AdamWBf16([whole], SETTINGS), whole, range(1, 5))
    monkeypatch.setattr(optimizers, "CHUNK", 7)
    before = AdamWBf16([parts], SETTINGS)
    stepped(before, parts, [1, 2])
    after = AdamWBf16([parts], SETTINGS)
    after.load_state_dict(before.state_dict())
    assert after.state[parts]["exp_avg_sq"].dtype == torch.bfloat16
    assert torch.equal(stepped(after, parts, [3, 4]), wanted)


@pytest.mark.parametrize(
    ("zero", "dtype", "kind"),
    [
        ("zero2", "bf16", "adamw_bf16"),
        ("zero3-offload", "bf16", "adamw_bf16"),
        pytest.param("zero2", "bf16", "adamw_8bit", marks=LESS),
        pytest.param("zero3", "fp32", "adamw_8bit", marks=LESS),
    ],
)
def test_a_run_has_them_and_goes_on_where_it_was(run_with_pairs, monkeypatch, zero, dtype, kind):
    process = start_process()
    save, bits = loop.checkpoints.save, []

    def noted(engine, *given):
        state = next(iter(engine.optimizer.optimizer.state.values()))
        bits.append(
            {name: value.dtype for name, value in state.items() if torch.is_tensor(value) and value.numel() > 999}
        )
        save(engine, *given)

    monkeypatch.setattr(loop.checkpoints, "save", noted)
    keys = *KEYS, f"deepspeed.preset={zero}", f"model.dtype={dtype}", f"train.optimizer={kind}"
    whole, _ = run_with_pairs("whole", *keys, "train.steps=4")
    parts, _ = run_with_pairs("parts", *keys, "train.steps=2")
    train(whole, process)
    train(parts, process)
    train(parts.model_copy(update={"train": parts.train.model_copy(update={"steps": 4})}), process)
    wanted = (train_folder(whole) / "metrics.jsonl").read_bytes()
    assert (train_folder(parts) / "metrics.jsonl").read_bytes() == wanted
    names = {"adamw_bf16": ("exp_avg", "exp_avg_sq"), "adamw_8bit": ("state1", "state2")}[kind]
    narrow = torch.bfloat16 if kind == "adamw_bf16" else torch.uint8
    assert len(bits) > 3 and all(state.items() >= dict.fromkeys(names, narrow).items() for state in bits)


def test_two_processes_go_on_with_narrow_moments(run_with_pairs, together):
    kinds = ["adamw_bf16", *(["adamw_8bit"] if importlib.util.find_spec("bitsandbytes") else [])]
    jobs, compared = [], []
    for kind, zero in zip(kinds, ("zero3", "zero2"), strict=False):
        keys = *KEYS, f"deepspeed.preset={zero}", f"train.optimizer={kind}", "train.micro_batch_size=1"
        (whole, first), (parts, second) = (run_with_pairs(f"{kind} {name}", *keys) for name in ("whole", "parts"))
        jobs += [[*first, "train.steps=3"], [*second, "train.steps=1"], [*second, "train.steps=3"]]
        compared.append((whole, parts))
    together((2, [("train", settings) for settings in jobs]))
    for whole, parts in compared:
        rows = [(train_folder(config) / "metrics.jsonl").read_bytes() for config in (whole, parts)]
        assert rows[0] == rows[1]


@LESS
def test_eight_bits_take_the_first_step_that_fp32_takes(small_config):
    """Moments are rounded after they were used."""
    own, other = (torch.nn.Parameter(values(0).repeat(8)) for _ in range(2))
    own.grad = other.grad = values(1).repeat(8)
    for name, parameter in (("adamw_8bit", own), ("adamw", other)):
        make_optimizer(small_config(f"train.optimizer={name}"), [parameter], torch.device("cpu")).step()
    torch.testing.assert_close(own, other)


def test_what_cannot_be_is_refused_in_one_line(small_config, monkeypatch, tmp_path):
    eight = "train.optimizer=adamw_8bit"
    with pytest.raises(ConfigError, match=r"'adamw_8bit' is not for moments in main memory, deepspeed\.preset"):
        small_config(eight, "deepspeed.preset=zero3-offload")
    alone = Process(0, 1, 0, torch.device("cpu"))
    offload = "deepspeed.config.zero_optimization.offload_optimizer.device=cpu"
    with pytest.raises(ConfigError, match="'adamw_8bit' is not for moments in main memory; leave out"):
        deepspeed_config(small_config(eight, offload), alone)
    with pytest.raises(ConfigError, match="keeps no fp32 weights, and small updates are rounded away"):
        deepspeed_config(small_config("deepspeed.config.bf16.bf16_master_weights_and_grads=true"), alone)
    with pytest.raises(ConfigError, match=r"betas: 0\.999 is too slow for optimizer 'adamw_bf16'"):
        small_config("train.optimizer=adamw_bf16", "train.betas=[0.9, 0.999]")
    small_config("train.optimizer=adamw_bf16", "train.betas=[0.9, 0.996]")
    with pytest.raises(ConfigError, match=r"train\.accept: train\.optimizer: no setting that may change"):
        small_config("train.accept=[train.optimizer]")
    with pytest.raises(CheckpointError, match=r"moments of train\.optimizer 'adamw_8bit' cannot be converted"):
        universal_form(tmp_path, {"deepspeed": {}, "train.optimizer": "adamw_8bit"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'adamw_8bit' needs bitsandbytes: pip install 'alignkit\[8bit\]'"):
        train(small_config(eight), alone)


def test_a_moment_moves_at_the_slowest_decay_that_is_taken_and_not_at_the_next():
    """Of all bf16 mantissas."""
    every = torch.arange(128, 256).float() / 128
    for beta, moves in ((0.996, True), (1 - 2**-9, False)):
        assert ((every * beta).bfloat16() < every).all().item() is moves


def test_the_plan_counts_their_bytes_and_offloads_none_of_eight_bits(config_file):
    def planned(kind: str):
        keys = "deepspeed.preset=zero2", "train.lora=null", f"train.optimizer={kind}"
        return plan(load_config(config_file, ["output.dir=/nowhere", *keys]), gpu_named("H100"), 2).stages[0]

    stages = {kind: planned(kind) for kind in ("adamw", "adamw_bf16", "adamw_8bit")}
    count = stages["adamw"].count
    wide = {"adamw": 8, "adamw_bf16": 4, "adamw_8bit": 2 + 2 * 4 / 256}
    for kind, stage in stages.items():
        assert stage.memory.gpu["Adam's moments"] == pytest.approx(wide[kind] * count.trained / 2)
    saved = [work.checkpoint_bytes(stage.config, stage.run, count) for stage in stages.values()]
    assert saved[0] - saved[1] == 4 * count.trained
    config = load_config(config_file, ["output.dir=/nowhere", "deepspeed.preset=auto", "train.optimizer=adamw_8bit"])
    tiny = preset.outline(config)
    choice = preset.choose(config, tiny, count, preset.Room(1.0), 2)
    assert choice.preset != "zero3-offload" and "offload" not in choice.why
