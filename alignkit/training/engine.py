"""DeepSpeed: its settings, the network that policy and reference copy are both built from, and the policy's engine."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from alignkit.config import Config, changed
from alignkit.config.sections import OURS
from alignkit.errors import ConfigError
from alignkit.models import VideoModel, working_dtype
from alignkit.models.attention import set_attention
from alignkit.models.blocks import compile_blocks
from alignkit.models.checkpointing import check_selective, set_checkpointing
from alignkit.training.context import data_ranks, split_for_training, token_key
from alignkit.training.distributed import Process
from alignkit.training.lora import add_lora
from alignkit.training.optimizers import make_optimizer
from alignkit.training.weights import Start, empty_network, load_partitioned, load_whole, set_masters

# the fastest first
PRESETS: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-offload": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
}


@contextmanager
def process_put_back() -> Iterator[None]:
    """What a run changes for its whole process, later stages do not inherit: ZeRO-3 replaces `F.linear`, with other
    rounding, and cached errors go with one thread."""
    linear, threads = torch.nn.functional.linear, torch.get_num_threads()
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        torch.set_num_threads(threads)


NOT_TAKEN = ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError
"""What DeepSpeed raises for a setting that it cannot work with, as likely as not without its name."""


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forwards per step and process. Raises ConfigError when batch sizes or processes do not divide."""
    train = config.train
    ranks = data_ranks(config, world_size)
    together = train.micro_batch_size * ranks
    if train.global_batch_size % together:
        groups = "processes" if ranks == world_size else f"groups of {train.context_parallel} processes"
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size "
            f"({train.micro_batch_size}) times {ranks} {groups}"
        )
    return train.global_batch_size // together


def deepspeed_config(config: Config, process: Process) -> dict[str, Any]:
    """DeepSpeed's own JSON: the preset, what the other sections imply, then the user's keys on top."""
    train = config.train
    if config.deepspeed.preset not in PRESETS:
        raise ConfigError(
            "deepspeed.preset: 'auto' is resolved by alignkit.planning.preset.resolved(config, process), as the "
            "command does; call it before train()"
        )
    base = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, process.world_size),
        # of as many pairs as processes think they have: DeepSpeed knows of no context groups
        "train_batch_size": train.global_batch_size * train.context_parallel,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": copy.deepcopy(PRESETS[config.deepspeed.preset]),
        "zero_force_ds_cpu_optimizer": False,  # else offload refuses any optimizer but DeepSpeed's own
        "zero_allow_untested_optimizer": train.optimizer != "adamw",
        # whose default differs between DeepSpeed's versions; without it a gradient that is not finite is applied
        "bf16": {"enabled": working_dtype(config.model, process.device) == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},  # 16 micro-batches added up in bf16 are off by half a percent
        "steps_per_print": None,
    }
    settings = _merged(base, config.deepspeed.config)
    zero = settings["zero_optimization"]
    if settings["bf16"].get("bf16_master_weights_and_grads"):
        raise ConfigError(
            "deepspeed.config: bf16.bf16_master_weights_and_grads keeps no fp32 weights, and small updates are rounded "
            "away; for less memory use train.optimizer: adamw_bf16 or adamw_8bit"
        )
    if train.optimizer == "adamw_8bit" and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ConfigError(
            "train.optimizer: 'adamw_8bit' is not for moments in main memory; leave out offload_optimizer"
        )
    if zero["stage"] == 0 and settings["bf16"]["enabled"]:
        raise ConfigError(
            "deepspeed.config: zero_optimization.stage 0 keeps no fp32 weights beside bf16 ones; use 1, 2 or 3"
        )
    return settings


def check_deepspeed(config: Config, process: Process) -> None:
    """Raises ConfigError, before any weight is read, for keys of `deepspeed.config` that DeepSpeed does not take."""
    if not config.deepspeed.config:
        return
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    if config.deepspeed.preset not in PRESETS:  # auto: not resolved yet
        config = changed(config, {"deepspeed": {"preset": "zero3"}}, "deepspeed.preset")
    settings = deepspeed_config(config, process)
    del settings["train_batch_size"]  # of more processes than there may be yet
    read = _Noting(copy.deepcopy(settings))
    try:
        DeepSpeedConfig(read)
        DtypeEnum(settings["data_types"]["grad_accum_dtype"])  # which it reads when all is loaded
    except ValidationError as error:
        found = error.errors()[0]
        names = [str(name) for name in found["loc"]]
        key = ".".join([*_section_of(settings, names, found["input"]), *names])
        said = found["msg"][:1].lower() + found["msg"][1:]
        raise ConfigError(f"deepspeed.config: {key}: {said}, got {found['input']!r}") from None
    except NOT_TAKEN as error:
        raise ConfigError(_refused(error)) from error
    for key in config.deepspeed.config:
        if key not in read.asked_for:
            alike = get_close_matches(key, sorted(read.asked_for), 1)
            meant = f"; is {OURS.get(alike[0], alike[0])} meant?" if alike else "; leave it out"
            raise ConfigError(f"deepspeed.config: {key}: DeepSpeed knows no such key{meant}")
    for part in ("offload_param", "offload_optimizer"):
        given = settings["zero_optimization"].get(part) or {}
        if given.get("device") == "nvme" and not given.get("nvme_path"):
            raise ConfigError(
                f"deepspeed.config: zero_optimization.{part}.nvme_path: missing; name a folder of a local disk"
            )


class _Noting(dict[str, Any]):
    """Settings that note which of their keys are asked for: DeepSpeed passes over those that it does not know."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.asked_for: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.asked_for.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked_for.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked_for.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # in which it looks by `key in settings.keys()`


def _section_of(settings: dict[str, Any], names: list[str], given: Any) -> list[str]:
    """The names of the sections in which `names`, one in the other, lead to what was given."""
    for key, value in settings.items():
        if isinstance(value, dict):
            found: Any = value
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            if found == given:
                return [key]
            if deeper := _section_of(value, names, given):
                return [key, *deeper]
    return []


def _refused(error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"deepspeed.config: DeepSpeed does not take it: {said}"


def check_checkpointing(config: Config, process: Process, model: VideoModel) -> None:
    """Raises ConfigError, before any weight is read, where `train.checkpointing` cannot keep what it is to."""
    if config.train.checkpointing == "selective":
        network: Any = empty_network(model)
        dtype = working_dtype(config.model, process.device)
        shared = token_key(config)
        backend = set_attention(network, config.model.attention, process.device, dtype, shared=shared)
        check_selective(backend, network.config.attention_head_dim, process.device, dtype)


def load_network(config: Config, process: Process, model: VideoModel, start: Start) -> tuple[nn.Module, str]:
    """`model`'s transformer, frozen, and the attention backend it will run on; under ZeRO-3 already partitioned.

    Policy and reference copy are both loaded by this, so that they run in the same regime.
    """
    dtype = working_dtype(config.model, process.device)
    settings = deepspeed_config(config, process)
    if settings["zero_optimization"]["stage"] == 3:
        network = load_partitioned(model, start.base, settings, dtype, process.device)
    else:
        network = load_whole(model, start.base, dtype, process.device)
    split_for_training(network, config, process, model)
    if config.train.compile:
        compile_blocks(network)
    shared = token_key(config)
    return network, set_attention(network, config.model.attention, process.device, dtype, shared=shared)


def put_adapters(network: Any, config: Config, start: Start) -> dict[str, torch.Tensor]:
    """Freeze `network`, put the adapters of `train.lora` on it and return their values, fp32 on CPU by name: those that
    an earlier stage handed on, or new ones."""
    assert config.train.lora is not None
    values = add_lora(network, config.train.lora, config.train.seed)
    if start.adapters is None:
        return values
    if start.adapters.keys() != values.keys():
        raise ConfigError("train.lora: other adapters than the stage before trained; use one train.lora for all stages")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in values:
                parameter.copy_(start.adapters[name])
    return start.adapters


def start_policy(config: Config, process: Process, transformer: Any, start: Start) -> Any:
    """The trained network in its engine, with AdamW on every parameter, or on its adapters alone (`train.lora`).

    Its fp32 masters are the values of `start` themselves, whatever the network's dtype.
    """
    import deepspeed

    train = config.train
    transformer.requires_grad_(True).train()
    adapters = put_adapters(transformer, config, start) if train.lora else None
    set_checkpointing(transformer, train.checkpointing)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, trained, process.device)
    settings = deepspeed_config(config, process)
    try:
        engine = deepspeed.initialize(
            model=transformer, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
    except NOT_TAKEN as error:
        if not config.deepspeed.config:
            raise
        raise ConfigError(_refused(error)) from error
    if working_dtype(config.model, process.device) != torch.float32:
        set_masters(engine, start.base.share if adapters is None else lambda name, _, device: adapters[name].to(device))
    return engine


def release(engine: Any) -> None:
    """Free what an engine holds, its network included, for the next one in this process: DeepSpeed's hooks keep all of
    it alive otherwise, weights, gradients and moments."""
    engine.destroy()
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.new_empty(0)
    if engine.optimizer is not None:
        engine.optimizer.__dict__.clear()
    engine.__dict__.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def full_precision_weights(engine: Any) -> dict[str, torch.Tensor]:
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


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
