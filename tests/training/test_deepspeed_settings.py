"""Keys of DeepSpeed's own: taken, or refused by name before a weight is read."""

import pytest
import torch
from starting import one_line

from alignkit.errors import ConfigError
from alignkit.training import settings
from alignkit.training.distributed import Process
from alignkit.training.settings import check_deepspeed, deepspeed_config

ALONE, ONE_OF_TWO = (Process(0, count, 0, torch.device("cpu")) for count in (1, 2))

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
    ("{bf16: {enabled: true}}", "bf16.enabled: this is model.dtype, here fp32"),
    ("{bf16: {check_grad_overflow: maybe}}", "bf16.check_grad_overflow: input should be a valid boolean"),
    ("{comms_logger: {enabled: maybe}}", "config: comms_logger.enabled: input should be a valid boolean"),
    ("{bf16: true}", "bf16: should be a section of keys, got True"),
    ("{data_types: {grad_accum_dtype: fp99}}", "DeepSpeed does not take it: 'fp99'"),
    ("{communication_data_type: fp99}", "DeepSpeed does not take it: Invalid communication_data_type"),
    ("{activation_checkpointing: 5}", "DeepSpeed does not take it"),
    ("{train_batch_size: 7}", "train_batch_size: this is train.global_batch_size"),
    ("{optimizer: {type: Adam}}", "optimizer: this is train.optimizer"),
    ("{fp16: {enabled: true}}", "fp16: this is model.dtype, bf16 or fp32"),
    # its models take these for what they look like, and what reads them then does not
    ('{zero_optimization: {stage: "3"}}', "config: zero_optimization.stage: should be a number, got '3'"),
    ("{zero_optimization: {stage: true}}", "config: zero_optimization.stage: should be a number, got True"),
    ('{bf16: {immediate_grad_update: "no"}}', "config: bf16.immediate_grad_update: should be true or false, got 'no'"),
    ("{zero_optimization: {offload_optimizer: {pin_memory: 1}}}", "optimizer.pin_memory: should be true or false, got"),
    ('{gradient_predivide_factor: "two"}', "config: gradient_predivide_factor: should be a number, got 'two'"),
    ("{prescale_gradients: 3}", "config: prescale_gradients: should be true or false, got 3"),
    ("{aio: {block_size: a}}", "config: aio.block_size: should be a number, got 'a'"),
    ("{aio: {block_size: 1.5}}", "config: aio.block_size: should be a whole number, got 1.5"),
    ('{data_efficiency: {data_sampling: {enabled: "x"}}}', "data_efficiency.data_sampling.enabled: should be true or"),
    ("{steps_per_print: often}", "config: steps_per_print: should be a whole number from 1 on, got 'often'"),
    ("{steps_per_print: 0}", "config: steps_per_print: should be a whole number from 1 on, got 0"),
    ("{data_types: {grad_accum_dtype: int8}}", "data_types.grad_accum_dtype: int8 holds no gradient; use fp32 or bf16"),
    ("{flops_profiler: {enabled: true}}", "config: flops_profiler.enabled: not for alignkit's runs"),
    ("{checkpoint: {load_universal: true}}", "checkpoint.load_universal: not for alignkit's runs, a run's checkpoints"),
    ("{datastates_ckpt: {}}", "config: datastates_ckpt: not for alignkit's runs"),
    ("{tensor_parallel: {autotp_size: 2}}", "config: tensor_parallel.autotp_size: not for alignkit's runs"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED)
def test_what_deepspeed_does_not_take_is_named(small_config, given, line):
    with pytest.raises(ConfigError) as refused:
        check_deepspeed(small_config(f"deepspeed.config={given}"), ONE_OF_TWO)
    said = str(refused.value)
    assert line in said and "deepspeed" in said and "\n" not in said


def within(given, made):
    if not isinstance(given, dict):
        return made == given
    return all(key in made and within(value, made[key]) for key, value in given.items())


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
        "{zero_optimization: {reduce_bucket_size: auto, sub_group_size: 1.0e+9}, checkpoint: {load_universal: false}}",
        "{data_efficiency: {data_sampling: {curriculum_learning: {enabled: false, data_cluster_path: here}}}}",
        "{comms_logger: {enabled: true}, flops_profiler: {enabled: false}, tensorboard: {enabled: false}}",
    ],
)
def test_keys_that_deepspeed_knows_are_passed_on(small_config, given):
    config, process = small_config(f"deepspeed.config={given}"), ONE_OF_TWO
    check_deepspeed(config, process)
    assert within(config.deepspeed.config, deepspeed_config(config, process))


def test_a_monitor_whose_package_is_not_there_is_refused(small_config, monkeypatch):
    config, process = small_config("deepspeed.config={wandb: {enabled: true}}"), ONE_OF_TWO
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb\.enabled: needs wandb, which is not installed"):
        check_deepspeed(config, process)
    monkeypatch.setattr(settings, "find_spec", lambda name: name)
    check_deepspeed(config, process)


def test_a_monitors_folder_at_home_is_there(small_config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = "{tensorboard: {output_path: ~/tb}, csv_monitor: {output_path: ~/csv, job_name: a~b}}"
    made = deepspeed_config(small_config(f"deepspeed.config={given}"), ALONE)
    assert made["tensorboard"] == {"output_path": "/home/someone/tb"}
    assert made["csv_monitor"] == {"output_path": "/home/someone/csv", "job_name": "a~b"}


def test_an_offload_of_null_is_none(small_config):
    """As DeepSpeed's own default is."""
    given = "deepspeed.config.zero_optimization.offload_optimizer=null"
    config = small_config("train.optimizer=adamw_8bit", given)
    assert "offload_optimizer" not in deepspeed_config(config, ALONE)["zero_optimization"]


@pytest.mark.parametrize(
    "words", [("train",), ("train", "--nproc", "2"), ("cache-reference",), ("plan", "--gpus", "1")], ids=" ".join
)
def test_the_command_says_so_before_it_loads_anything(run_with_pairs, command, config_file, words):
    config, overrides = run_with_pairs("run", "deepspeed.config={zero_optimization: {overlap_comm: perhaps}}")
    before = sorted(config.output.dir.rglob("*"))
    result = command(words[0], config_file, *overrides, *words[1:])
    assert "zero_optimization.overlap_comm: input should be a valid boolean" in one_line(result)
    assert "training on" not in result.stderr and sorted(config.output.dir.rglob("*")) == before


def test_a_later_stage_of_a_chain_is_looked_at_too(run_with_pairs, command, config_file):
    stages = "[{name: sft}, {name: localdpo, deepspeed: {config: {zero_optimization: {stage: 9}}}}]"
    _, overrides = run_with_pairs("run", f"stages={stages}")
    assert "zero_optimization.stage: input should be" in one_line(command("train", config_file, *overrides))


def test_numbers_are_taken_as_deepspeeds_json_has_them(small_config):
    """YAML 1.1 takes 5e8, without a point, for a text."""
    config = small_config(
        "deepspeed.config={zero_optimization: {reduce_bucket_size: 5e8, round_robin_gradients: true}}"
    )
    process = ALONE
    check_deepspeed(config, process)
    zero = deepspeed_config(config, process)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 500_000_000 and isinstance(zero["reduce_bucket_size"], int)
