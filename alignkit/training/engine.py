"""DeepSpeed engines for the policy and its frozen reference, so built that they agree bit for bit at step 0."""

import copy
from typing import Any

import torch
from torch import nn

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import working_dtype
from alignkit.models.attention import set_attention
from alignkit.models.blocks import compile_blocks
from alignkit.objectives.preference import needs_reference
from alignkit.training.distributed import Process
from alignkit.training.lora import AdapterOff, add_lora
from alignkit.training.weights import StartingWeights, load_partitioned, load_whole, set_masters

PRESETS: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-offload": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
}


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forwards per step and process. Raises ConfigError when the batch sizes do not divide."""
    train = config.train
    together = train.micro_batch_size * world_size
    if train.global_batch_size % together:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size "
            f"({train.micro_batch_size}) times {world_size} processes"
        )
    return train.global_batch_size // together


def deepspeed_config(config: Config, process: Process) -> dict[str, Any]:
    """DeepSpeed's own JSON: the preset, what the other sections imply, then the user's keys on top."""
    train = config.train
    base = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, process.world_size),
        "train_batch_size": train.global_batch_size,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": copy.deepcopy(PRESETS[config.deepspeed.preset]),
        "zero_force_ds_cpu_optimizer": False,  # else offload refuses any optimizer but DeepSpeed's own
        "bf16": {"enabled": working_dtype(config.model, process.device) == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},  # 16 micro-batches added up in bf16 are off by half a percent
        "steps_per_print": None,
    }
    return _merged(base, config.deepspeed.config)


def load_network(config: Config, process: Process, model, weights: StartingWeights) -> tuple[nn.Module, str]:
    """`model`'s transformer, frozen, and the attention backend it will run on; under ZeRO-3 already partitioned.

    Policy and reference copy are both loaded by this, so that they run in the same regime.
    """
    dtype = working_dtype(config.model, process.device)
    settings = deepspeed_config(config, process)
    if settings["zero_optimization"]["stage"] == 3:
        network = load_partitioned(model, weights, settings, dtype, process.device)
    else:
        network = load_whole(model, weights, dtype, process.device)
    if config.train.compile:
        compile_blocks(network)
    return network, set_attention(network, config.model.attention, process.device, dtype)


def start_policy(config: Config, process: Process, transformer: nn.Module, weights: StartingWeights):
    """The trained network in its engine, with AdamW on every parameter, or on its adapters alone (`train.lora`).

    Its fp32 masters are `weights` themselves, and the adapters' fp32 initial values, whatever the network's dtype.
    """
    import deepspeed

    train = config.train
    transformer.requires_grad_(True).train()
    adapters = add_lora(transformer, train.lora, train.seed) if train.lora else None
    if train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay)
    engine = deepspeed.initialize(
        model=transformer, optimizer=optimizer, config=deepspeed_config(config, process), dist_init_required=False
    )[0]
    if working_dtype(config.model, process.device) != torch.float32:
        set_masters(engine, weights.share if adapters is None else lambda name, _, device: adapters[name].to(device))
    return engine


def start_reference(config: Config, process: Process, policy, model, weights: StartingWeights):
    """The frozen network: the policy with its adapters off, or a copy, partitioned and rounded as the policy is;
    None where the objective compares with nothing.

    It must go through the same wrapper: ZeRO-3 replaces `F.linear`, and a plain module differs from a wrapped
    one by up to 0.17 logits at β = 5000. Under ZeRO-2 the policy computes as a plain module, and so does this.
    """
    import deepspeed

    if not needs_reference(config.objective):
        return None
    strategy = config.reference.strategy
    if strategy == "adapter" or (strategy == "auto" and config.train.lora):
        return AdapterOff(policy)
    transformer = load_network(config, process, model, weights)[0]
    settings = deepspeed_config(config, process)
    if settings["zero_optimization"]["stage"] < 3:
        return transformer
    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    frozen = {
        "train_micro_batch_size_per_gpu": settings["train_micro_batch_size_per_gpu"],
        "zero_optimization": zero,
        "bf16": settings["bf16"],
        "steps_per_print": None,
    }
    engine = deepspeed.initialize(model=transformer, config=frozen, dist_init_required=False)[0]
    engine.eval()
    return engine


def full_precision_weights(engine) -> dict[str, torch.Tensor]:
    """fp32 master weights of what was trained, by name, on CPU, on the first process; every process must call this.

    Parameters are gathered one at a time, so that no process ever holds the model twice.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        full = safe_get_full_fp32_param(parameter)
        if torch.distributed.get_rank() == 0:
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
    return weights


def _merged(base: dict, extra: dict) -> dict:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
