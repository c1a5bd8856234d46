"""Processes that share the tokens of the same videos (`alignkit.models.context`): what can be, in training, and where
`alignkit pairs` and `rollout` make them.

`train.context_parallel`: going back, each process follows its own tokens alone: a group's gradient is the sum of its
processes', where DeepSpeed takes the mean over all. So the loss is multiplied by the degree before its backward pass
(`Run`).

DeepSpeed is not told the groups (`mpu`): 0.19.8 then sums gradients within them under ZeRO-2, but under ZeRO-3, unless
`reduce_scatter` is off, it takes the mean over them too [measured], and the next run of the process inherits them.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from alignkit.config import Config, ModelSection
from alignkit.config.batches import KEY, data_ranks
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.launch import array_task, groups_of
from alignkit.models import VideoModel, family_module, load_model, working_dtype
from alignkit.models.attention import set_attention
from alignkit.models.context import TokenGroup, follow, parallel_config, split_tokens, token_group
from alignkit.stores.blocks import one_thread
from alignkit.stores.folders import latent_grid
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import Process, lone_worker, start_process
from alignkit.training.weights import empty_network

Result = TypeVar("Result")
PAIRS_KEY, ROLLOUT_KEY = "pairs.context_parallel", "rollout.context_parallel"


def token_key(config: Config) -> str | None:
    """What has tokens shared in training, as `set_attention` wants to know it."""
    return KEY if config.train.context_parallel > 1 else None


def own_group(config: Config, process: Process) -> tuple[int, int]:
    """Which of the groups of `data_ranks` this process is in, and how many there are: all processes of a group must
    show the network the same videos."""
    return process.rank // config.train.context_parallel, data_ranks(config, process.world_size)


def check_context(config: Config, process: Process, model: VideoModel, store: PairStore | None) -> None:
    """Raises ConfigError, before any weight is read, for a network whose heads or tokens cannot be divided, whose
    attention cannot share them, or that diffusers' hooks cannot split as it is.

    store: the pairs that will be trained on; None where they are made along the way, in the sizes of `config.data`.
    """
    if config.train.context_parallel == 1:
        return
    network: Any = empty_network(model)
    grid = latent_grid(config) if store is None else tuple(model.frames_of_mask(store[0].mask).shape)
    check_lengths(config, network.config, grid)
    dtype = working_dtype(config.model, process.device)
    set_attention(network, config.model.attention, process.device, dtype, shared=KEY)


def check_lengths(config: Config, network: Any, grid: tuple[int, ...]) -> None:
    """The part of it that needs no more than the network's config, and the latents' (F, H, W)."""
    check_split(KEY, config.train.context_parallel, config.model, network, grid)
    if config.train.context_parallel == 1:
        return
    for target in config.train.lora.targets if config.train.lora else ():
        for name in family_module(config.model.family).CONTEXT_PLAN or ():
            if f".{name}".endswith(f".{target}"):
                raise ConfigError(f"train.lora.targets: {target!r} is {name}, which {KEY} cannot split with an adapter")


def check_split(key: str, degree: int, section: ModelSection, network: Any, grid: tuple[int, ...]) -> None:
    """Raises ConfigError, naming `key`, for a network, by its config, and latents (F, H, W) whose heads or tokens
    `degree` processes, if more than one, cannot share."""
    family = family_module(section.family)
    if degree == 1:
        return
    if family.CONTEXT_PLAN is None:
        raise ConfigError(f"{key}: how a network of {section.family} is to be split is not known; leave it at 1")
    lengths = {"attention heads": network.num_attention_heads}
    lengths |= family.split_lengths(network, grid, section.max_sequence_length)
    shared = math.gcd(*lengths.values())
    for name, length in lengths.items():
        if length % degree:
            possible = ", ".join(str(n) for n in range(2, shared + 1) if shared % n == 0)
            raise ConfigError(
                f"{key}: {degree} does not divide the {length} {name}; "
                + (f"what divides all of it is {possible}" if possible else "nothing divides all of it")
            )


def split_for_training(network: Any, config: Config, process: Process, model: VideoModel) -> None:
    """`split_tokens` among the processes of a group of `own_group`. Every process calls this."""
    if config.train.context_parallel > 1:
        parallel = parallel_config(config.train.context_parallel, process.device)
        split_tokens(network, family_module(model.family), parallel)


def token_worker(config: Config, key: str, degree: int) -> tuple[Process, TokenGroup | None]:
    """Who this process is among those that share out a command's videos; where groups of `degree` of them share the
    tokens of each video too, its group, in a process group that is formed for it.

    Raises ConfigError, naming `key`, for what cannot be shared so, before any weight is read.
    """
    if degree == 1:
        return lone_worker(), None
    process = start_process()
    check_tokens(config, key, degree, process)
    job = array_task(os.environ)  # each of an array has a group of its own, and the first one's first speaks for all
    return replace(process, rank=process.rank + job * process.world_size), token_group(degree, process.device)


def check_tokens(config: Config, key: str, degree: int, process: Process) -> None:
    """Raises ConfigError, naming `key`, where groups of `degree` cannot be made of the processes, or cannot share the
    tokens of one of `config`'s videos. No weight is read."""
    groups_of(key, degree, process.world_size)
    if degree == 1:
        return
    section, device = config.model, process.device
    network: Any = empty_network(load_model(section, with_transformer=False, with_encoders=False))
    check_split(key, degree, section, network.config, latent_grid(config))
    set_attention(network, section.attention, device, working_dtype(section, device), shared=key)


def make_by_first(
    config: Config, device: torch.device, group: TokenGroup | None, make: Callable[[], Result]
) -> Result | None:
    """What make() returns on the first process of a group, which is to load its network with that group; the others
    run theirs on what that one is shown, and get None. Without a group: what make() returns. What make() raises of
    settings and files is raised on all."""
    if group is None:
        return make()
    dtype = working_dtype(config.model, device)
    if not group.first:
        load = partial(load_model, config.model, with_encoders=False, device=device, dtype=dtype, group=group)
        with one_thread(device):
            follow(lambda: load().transformer, group, device)
        return None
    try:
        made = make()
    except (AlignkitError, OSError) as error:  # of a forward's own errors the others hear by what ends them
        with suppress(RuntimeError):  # of others that have failed by themselves
            group.say(DataError(str(error)))
        raise
    group.say(None)
    return made
