"""`train.context_parallel`: the processes of a group share the tokens of the same videos (Ulysses, arXiv 2309.14509).

diffusers' hooks split what goes into the network's blocks, exchange tokens for heads around attention and gather the
prediction, so that each process of a group has the whole of it, and the loss. Going back, each follows its own tokens
alone: a group's gradient is the sum of its processes', where DeepSpeed takes the mean over all. So the loss is
multiplied by the degree before its backward pass (`Run`).

DeepSpeed is not told the groups (`mpu`): 0.19.8 then sums gradients within them under ZeRO-2, but under ZeRO-3, unless
`reduce_scatter` is off, it takes the mean over them too [measured], and the next run of the process inherits them.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import VideoModel, family_module, working_dtype
from alignkit.models.attention import set_attention
from alignkit.stores.folders import latent_grid
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import Process
from alignkit.training.weights import empty_network

KEY = "train.context_parallel"


def data_ranks(config: Config, world_size: int) -> int:
    """Groups of processes that work on different pairs; those of a group have consecutive ranks. Raises ConfigError for
    processes that cannot be divided among them."""
    degree = config.train.context_parallel
    if world_size % degree:
        raise ConfigError(f"{KEY}: {degree} does not divide the {world_size} process(es) of this run")
    return world_size // degree


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
    set_attention(network, config.model.attention, process.device, dtype, shared=True)


def check_lengths(config: Config, network: Any, grid: tuple[int, ...]) -> None:
    """The part of it that needs no more than the network's config, and the latents' (F, H, W)."""
    degree, family = config.train.context_parallel, family_module(config.model.family)
    if degree == 1:
        return
    if family.CONTEXT_PLAN is None:
        raise ConfigError(f"{KEY}: how a network of {config.model.family} is to be split is not known; leave it at 1")
    lengths = {"attention heads": network.num_attention_heads}
    lengths |= family.split_lengths(network, grid, config.model.max_sequence_length)
    shared = math.gcd(*lengths.values())
    for name, length in lengths.items():
        if length % degree:
            possible = ", ".join(str(n) for n in range(2, shared + 1) if shared % n == 0)
            raise ConfigError(
                f"{KEY}: {degree} does not divide the {length} {name}; "
                + (f"what divides all of it is {possible}" if possible else "nothing divides all of it")
            )
    for target in config.train.lora.targets if config.train.lora else ():
        for name in family.CONTEXT_PLAN:
            if f".{name}".endswith(f".{target}"):
                raise ConfigError(f"train.lora.targets: {target!r} is {name}, which {KEY} cannot split with an adapter")


def split_tokens(network: Any, config: Config, process: Process, model: VideoModel) -> None:
    """Put diffusers' hooks on `network`, which then takes and gives whole videos as before. Every process calls this.

    By hand what `enable_parallelism` does: it asks for an accelerator, which a CPU is not.
    """
    if config.train.context_parallel == 1:
        return
    parallel = _parallel_config(config.train.context_parallel, process.device)
    for module in network.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = parallel
    family: Any = family_module(model.family)
    apply_context_parallel(network, parallel.context_parallel_config, family.CONTEXT_PLAN)


@lru_cache(maxsize=8)
def _parallel_config(degree: int, device: torch.device) -> ParallelConfig:
    """With the group of this process. One for all networks: process groups are dear."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (count // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree))
    config.setup(rank, count, device, mesh=mesh)
    return config
