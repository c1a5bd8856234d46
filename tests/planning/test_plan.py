"""Memory by part, work and advice of `alignkit plan`: they follow the configuration, and the advice helps."""

from pathlib import Path

import pytest

from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.planning import work
from alignkit.planning.constants import DEEPSPEED, FILLED, gpu_named
from alignkit.planning.counting import activation_bytes
from alignkit.planning.plan import gpus_that_fit, plan
from alignkit.planning.report import head, report

CONFIGS = Path(__file__).parents[2] / "configs"
BILLION_3 = "wan2.1-1.3b-localdpo.yaml"
PARAMETERS = 1_418_996_800


def planned(name: str, *keys: str, gpus: int = 8, gpu: str = "H100"):
    return plan(load_config(CONFIGS / name, keys), gpu_named(gpu), gpus)


def parts(*keys: str, gpus: int = 8) -> dict[str, float]:
    return planned(BILLION_3, *keys, gpus=gpus).largest.memory.gpu


def bytes_a_parameter(memory: dict[str, float], *names: str) -> float:
    return sum(memory.get(name, 0) for name in names) / PARAMETERS


KEPT = ("weights", "reference (copy)", "gradients", "fp32 masters", "Adam's moments")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), 20 / 8),
        (("deepspeed.preset=zero2",), 4 + 16 / 8),
        (("deepspeed.config.zero_optimization.stage=1", "deepspeed.preset=zero2"), 4 + 4 + 12 / 8),
        (("deepspeed.config.data_types.grad_accum_dtype=bf16",), 18 / 8),
        (("reference.strategy=cached",), 18 / 8),
        (("objective={name: sft}",), 18 / 8),
        (("deepspeed.preset=zero3-offload",), 0),
    ],
    ids=str,
)
def test_bytes_a_parameter_are_those_of_the_documents(keys, expected):
    assert bytes_a_parameter(parts(*keys), *KEPT) == pytest.approx(expected)


def test_one_gpu_gathers_no_weights_unless_they_are_in_the_main_memory():
    bucket = 2 * DEEPSPEED["reduce_bucket_size"]
    assert parts(gpus=1)["buffers"] == bucket
    live = DEEPSPEED["stage3_max_live_parameters"] + DEEPSPEED["stage3_prefetch_bucket_size"]
    gathered = 2 * 2 * min(PARAMETERS, live)  # of the policy and of its reference
    assert parts(gpus=8)["buffers"] == bucket + gathered == parts("deepspeed.preset=zero3-offload", gpus=1)["buffers"]


def test_what_is_offloaded_is_in_the_main_memory():
    host = planned(BILLION_3, "deepspeed.preset=zero3-offload", gpus=16).largest.memory.host
    assert bytes_a_parameter(host, *KEPT) == pytest.approx(24 / 2), "of two machines each has half"
    assert host["export"] == 4 * PARAMETERS


def test_a_reference_that_moves_and_fp32_and_adapters_are_counted():
    assert parts("reference.strategy=ema")["reference (ema)"] == pytest.approx(6 / 8 * PARAMETERS)
    assert bytes_a_parameter(parts("model.dtype=fp32"), "weights", "flat copy") == pytest.approx(1.0)
    adapters = parts("train.lora={}")
    assert "reference (copy)" not in adapters and adapters["Adam's moments"] < 0.05 * PARAMETERS


def test_an_average_is_counted_where_it_is_held_saved_and_exported():
    assert parts("train.ema=0.999")["average (train.ema)"] == pytest.approx(4 / 8 * PARAMETERS)
    stages = [planned(BILLION_3, f"train.ema={decay}").stages[0] for decay in ("0.999", "null")]
    saved = [work.checkpoint_bytes(stage.config, stage.run, stage.count) for stage in stages]
    assert saved[0] - saved[1] == 4 * PARAMETERS


def test_deepspeeds_own_sizes_are_what_it_says():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = DeepSpeedZeroConfig(stage=3)
    for name, size in DEEPSPEED.items():
        assert getattr(settings, name.removeprefix("stage3_")) == size
    small = parts("deepspeed.config.zero_optimization.reduce_bucket_size=1000000")
    assert parts()["buffers"] - small["buffers"] == pytest.approx(2 * (5e8 - 1e6))


def test_a_step_is_forwards_backward_and_what_is_recomputed():
    whole = planned(BILLION_3)
    videos = 2 * 128
    flops, forward = whole.stages[0].step.flops, whole.forward
    assert flops["forward"] == flops["reference"] == flops["recomputing"] == videos * forward.flops
    assert flops["backward"] == videos * (2 * forward.products + 2.5 * forward.attention)
    cached = planned(BILLION_3, "reference.strategy=cached", "train.checkpointing=none").stages[0].step.flops
    assert set(cached) == {"forward", "backward"}
    twice = planned(BILLION_3, gpus=16).stages[0].step
    assert twice.time == pytest.approx(whole.stages[0].step.time / 2)
    assert planned(BILLION_3, "deepspeed.preset=zero3-offload").stages[0].step.moving > 0


def test_sides_in_turn_halve_the_activations_for_a_forward_more():
    together, apart = (planned(BILLION_3, f"train.branches={how}").stages[0] for how in ("together", "apart"))
    whole, run = planned(BILLION_3, "train.branches=apart"), apart.run
    of_one = activation_bytes(whole.outline, whole.config, run.dtype, run.checkpointing, 1, run.stage)
    assert apart.memory.gpu["activations"] == of_one < 0.55 * together.memory.gpu["activations"]
    assert sum(apart.step.flops.values()) == pytest.approx(
        sum(together.step.flops.values()) + together.step.flops["forward"]
    )


def test_gpus_that_share_tokens_share_activations_and_no_more_than_divides():
    alone, shared = (planned(BILLION_3, f"train.context_parallel={n}", gpus=8) for n in (1, 4))
    one, four = (whole.stages[0] for whole in (alone, shared))
    whole = one.memory.gpu["activations"]
    first = 2 * 2 * 32760 * 1536  # bytes, winner and loser, tokens, numbers of each
    assert four.memory.gpu["activations"] == first + (whole - first) / 4 < 0.3 * whole
    assert four.memory.gpu["weights"] == one.memory.gpu["weights"], "ZeRO shares them among all"
    assert four.run.accumulation == 4 * one.run.accumulation and four.step.flops == one.step.flops
    assert "shared by 4 GPUs" in report(shared) and "shared by" not in report(alone)
    for key in ("train.context_parallel", "pairs.context_parallel", "rollout.context_parallel"):
        words = f"{key}: 4 does not divide the 30 attention heads; what divides all of it is 2"
        with pytest.raises(ConfigError, match=words):
            planned("cogvideox-2b-localdpo.yaml", f"{key}=4", gpus=8)


def test_tokens_are_shared_where_a_video_of_one_is_too_much():
    keys = ["data.height=720", "data.width=1280"]
    whole = planned("wan2.1-14b-localdpo.yaml", *keys, gpus=16)
    assert not whole.fits and whole.switches[-1][0] == "train.context_parallel=2"
    assert planned("wan2.1-14b-localdpo.yaml", *keys, "train.context_parallel=2", gpus=16).fits


def test_a_pair_is_the_samplers_last_steps_with_both_branches():
    whole = planned(BILLION_3)
    assert work.pair_flops(whole.config, whole.forward) == pytest.approx(41.25 * 2 * whole.forward.flops)
    small = work.pair_bytes(whole.outline, whole.config)
    assert small == 2 * (2 * 16 * 21 * 60 * 104 + 512 * 4096) + 21 * 60 * 104


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("wan2.1-14b-localdpo.yaml", 8), ("cogvideox-5b-localdpo.yaml", 1), ("wan2.1-1.3b-localdpo.yaml", 1)],
)
def test_what_is_said_to_make_it_fit_does(name, gpus):
    keys = ["train.checkpointing=none", "train.micro_batch_size=2"]
    whole = planned(name, *keys, gpus=gpus)
    assert not whole.fits and "DOES NOT FIT" in report(whole)
    words = [word.partition(" ")[0] for word, _ in whole.switches]
    turned = planned(name, *keys, *words, gpus=gpus)
    assert turned.largest.memory.total == pytest.approx(whole.switches[-1][1])
    assert turned.fits
    for left_out in words[:-1]:
        fewer = planned(name, *keys, *(word for word in words if word != left_out), gpus=gpus)
        assert not fewer.fits, f"{left_out} was not needed"


def test_the_number_of_gpus_that_is_said_to_be_enough_is():
    whole = planned("wan2.1-14b-localdpo.yaml", gpu="H200", gpus=2)
    more = gpus_that_fit(whole)
    assert more and not planned("wan2.1-14b-localdpo.yaml", gpu="H200", gpus=more // 2).fits
    assert planned("wan2.1-14b-localdpo.yaml", gpu="H200", gpus=more).fits


def test_every_stage_of_a_chain_is_planned_and_later_ones_compare_with_a_copy():
    whole = planned("cogvideox-2b-apo.yaml", "train.lora={}")
    assert [stage.name for stage in whole.stages] == [stage.name for stage in whole.config.stages]
    references = {stage.name: stage.run.reference for stage in whole.stages}
    assert references["offline"] == "adapter" and references["online"] == "copy" and references["distill"] is None
    videos = {stage.name: stage.rollouts[0] for stage in whole.stages if stage.rollouts}
    assert videos == {"half_online": 1024, "online": 2048, "distill": 2048, "drift_correction": 4096}
    assert "stage" in report(whole).split("memory a GPU")[1].splitlines()[0]


def test_what_a_run_would_be_refused_for_is_refused():
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size"):
        planned(BILLION_3, gpus=3)
    with pytest.raises(ConfigError, match="'TPU' is not in the table; one of H100, H200, A100-80G"):
        gpu_named("TPU")
    assert FILLED < 1


FULL = [f"{name}-{kind}.yaml" for name in ("wan2.1-1.3b", "wan2.1-14b", "cogvideox-2b", "cogvideox-5b")
        for kind in ("localdpo", "apo")] + ["wan2.2-a14b-localdpo.yaml"]  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_a_configuration_says_what_it_needs_as_planned(name):
    text = (CONFIGS / name).read_text().partition("\nmodel:")[0]
    for gpu in ("H100", "H200"):
        assert head(planned(name, gpu=gpu)) in " ".join(text.replace("#", "").split()), head(planned(name, gpu=gpu))
