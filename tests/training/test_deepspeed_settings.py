"""Keys of DeepSpeed's own: taken, or refused by name before a weight is read."""

import pytest
import torch
from starting import one_line

from alignkit.errors import ConfigError
from alignkit.training.distributed import Process
from alignkit.training.settings import check_deepspeed, deepspeed_config

REFUSED = [
    ("{zero_optimization: {stage: 5}}", "zero_optimization.stage: input should be 0, 1, 2, 3 or 3, got 5"),
    (
        "{zero_optimization: {reduce_bucket_size: much}}",
        "zero_optimization.reduce_bucket_size: input should be a valid",
    ),
    ("{zero_optimization: {reduce_bukket_size: 5}}", "zero_optimization.reduce_bukket_size: extra inputs"),
    ("{zero_optimization: {offload_param: {device: moon}}}", "zero_optimization.offload_param.device: input should"),
    ("{zero_optimization: {offload_param: {device: nvme}}}", "zero_optimization.offload_param.nvme_path: missing"),
    ("{zero_optimization: {offload_optimizer: {device: nvme}}}", "offload_optimizer.nvme_path: missing"),
    ("{zero_optimisation: {stage: 2}}", "zero_optimisation: DeepSpeed knows no such key; is zero_optimization meant?"),
    ("{optimiser: {type: Adam}}", "optimiser: DeepSpeed knows no such key; is train.optimizer meant?"),
    (
        "{data_types: {grad_acum_dtype: fp32}}",
        "data_types.grad_acum_dtype: DeepSpeed knows no such key; is data_types.grad_",
    ),
    (
        "{activation_checkpointing: {cpu_check: true}}",
        "activation_checkpointing.cpu_check: DeepSpeed knows no such key",
    ),
    (
        "{checkpoint: {load_universall: true}}",
        "checkpoint.load_universall: DeepSpeed knows no such key; is checkpoint.load",
    ),
    (
        "{torch_autocast: {enabled: false, dtpye: bfloat16}}",
        "torch_autocast.dtpye: DeepSpeed knows no such key; is torch_",
    ),
    ("{aio: {qeue_depth: 8}}", "aio.qeue_depth: DeepSpeed knows no such key; is aio.queue_depth meant?"),
    (
        "{data_efficiency: {sead: 3}}",
        "data_efficiency.sead: DeepSpeed knows no such key; is data_efficiency.seed",
    ),
    ("{aio: {1: 2}}", "deepspeed.config: aio.1: DeepSpeed knows no such key; leave it out"),
    ("{7: 2}", "deepspeed.config.7.[key]: input should be a valid string"),
    ("{pipeline: null}", "deepspeed.config: pipeline: DeepSpeed does not take it"),
    ("{timers: {}, checkpoint: null}", "deepspeed.config: checkpoint: DeepSpeed does not take it"),
    ("{timers: {}, data_types: {grad_accum_dtype: fp9}}", "deepspeed.config: data_types: DeepSpeed does not take it"),
    ("{amp: {enabled: false}}", "deepspeed.config: amp: DeepSpeed does not take it: NVIDIA Apex AMP"),
    ("{sparse_attention: {mode: dense}}", "deepspeed.config: sparse_attention: DeepSpeed does not take it"),
    ("{qqq: 1}", "deepspeed.config: qqq: DeepSpeed knows no such key; leave it out"),
    ("{zero_optimization: 3}", "zero_optimization: should be a section of keys, got 3"),
    ("{bf16: {enabled: maybe}}", "bf16.enabled: input should be a valid boolean"),
    ("{comms_logger: {enabled: maybe}}", "config: comms_logger.enabled: input should be a valid boolean"),
    ("{bf16: true}", "bf16: should be a section of keys, got True"),
    ("{data_types: {grad_accum_dtype: fp99}}", "DeepSpeed does not take it: 'fp99'"),
    ("{communication_data_type: fp99}", "DeepSpeed does not take it: Invalid communication_data_type"),
    ("{activation_checkpointing: 5}", "DeepSpeed does not take it"),
    ("{train_batch_size: 7}", "train_batch_size: this is train.global_batch_size"),
    ("{optimizer: {type: Adam}}", "optimizer: this is train.optimizer"),
    ("{fp16: {enabled: true}}", "fp16: this is model.dtype, bf16 or fp32"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED)
def test_what_deepspeed_does_not_take_is_named(small_config, given, line):
    with pytest.raises(ConfigError) as refused:
        check_deepspeed(small_config(f"deepspeed.config={given}"), Process(0, 2, 0, torch.device("cpu")))
    said = str(refused.value)
    assert line in said and "deepspeed" in said and "\n" not in said


def within(given, settings):
    if not isinstance(given, dict):
        return settings == given
    return all(key in settings and within(value, settings[key]) for key, value in given.items())


@pytest.mark.parametrize(
    "given",
    [
        "{wall_clock_breakdown: true, steps_per_print: 5, communication_data_type: fp32, memory_breakdown: false}",
        "{activation_checkpointing: {partition_activations: true}, aio: {block_size: 4096}, dump_state: true}",
        "{zero_optimization: {reduce_scatter: true, offload_optimizer: {device: cpu, pin_memory: true}}}",
        "{bf16: {immediate_grad_update: true}, checkpoint: {parallel_write: {pipeline_stage: false}}}",
        "{data_types: {grad_accum_dtype: fp32}, torch_autocast: {enabled: false, dtype: bfloat16}}",
        "{data_efficiency: {enabled: false, data_sampling: {enabled: false, num_workers: 0}}, timers: {}}",
        "{pipeline: {stages: auto, activation_checkpoint_interval: 1}, autotuning: {arg_mappings: {a: --a}}}",
        "{data_efficiency: {data_sampling: {curriculum_learning: {enabled: false, data_cluster_path: here}}}}",
        "{comms_logger: {enabled: true}, flops_profiler: {enabled: true}, tensorboard: {enabled: false}}",
    ],
)
def test_keys_that_deepspeed_knows_are_passed_on(small_config, given):
    config, process = small_config(f"deepspeed.config={given}"), Process(0, 2, 0, torch.device("cpu"))
    check_deepspeed(config, process)
    settings = deepspeed_config(config, process)
    assert within(config.deepspeed.config, settings)


@pytest.mark.parametrize(
    "words", [("train",), ("train", "--nproc", "2"), ("cache-reference",), ("plan", "--gpus", "1")], ids=" ".join
)
def test_the_command_says_so_before_it_loads_anything(run_with_pairs, command, config_file, words):
    config, settings = run_with_pairs("run", "deepspeed.config={zero_optimization: {overlap_comm: perhaps}}")
    before = sorted(config.output.dir.rglob("*"))
    result = command(words[0], config_file, *settings, *words[1:])
    assert "zero_optimization.overlap_comm: input should be a valid boolean" in one_line(result)
    assert "training on" not in result.stderr and sorted(config.output.dir.rglob("*")) == before


def test_a_later_stage_of_a_chain_is_looked_at_too(run_with_pairs, command, config_file):
    stages = "[{name: sft}, {name: localdpo, deepspeed: {config: {zero_optimization: {stage: 9}}}}]"
    _, settings = run_with_pairs("run", f"stages={stages}")
    assert "zero_optimization.stage: input should be" in one_line(command("train", config_file, *settings))


def test_numbers_are_taken_as_deepspeeds_json_has_them(small_config):
    """YAML 1.1 takes 5e8, without a point, for a text."""
    config = small_config(
        "deepspeed.config={zero_optimization: {reduce_bucket_size: 5e8, round_robin_gradients: true}}"
    )
    process = Process(0, 1, 0, torch.device("cpu"))
    check_deepspeed(config, process)
    zero = deepspeed_config(config, process)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 500_000_000 and isinstance(zero["reduce_bucket_size"], int)
