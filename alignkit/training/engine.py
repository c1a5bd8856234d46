"""The network that policy and reference copy are both built from, and the policy's engine, which is DeepSpeed's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import VideoModel, working_dtype
from alignkit.models.attention import set_attention
from alignkit.models.blocks import compile_blocks
from alignkit.models.checkpointing import check_selective, set_checkpointing
from alignkit.training.context import split_for_training, token_key
from alignkit.training.distributed import Process
from alignkit.training.lora import add_lora
from alignkit.training.optimizers import make_optimizer
from alignkit.training.settings import NOT_TAKEN, deepspeed_config, refused
from alignkit.training.weights import Start, empty_network, load_partitioned, load_whole, set_masters


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
        raise ConfigError(refused(error)) from error
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
