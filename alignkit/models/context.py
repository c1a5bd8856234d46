"""Processes that share the tokens of the same videos: context parallelism (Ulysses, arXiv 2309.14509).

diffusers' hooks split what goes into the network's blocks, exchange tokens for heads around attention and gather the
prediction, so that each process of a group has the whole of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import ContextParallelConfig, ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

from alignkit.models.experts import Experts

LOAD = "load"
PATIENCE = timedelta(days=30)  # of those that are led: the first may wait for other groups, or decode for hours


def context_terms(model: Any) -> dict[str, int]:
    """Of the processes that share a model's tokens, on which the bits of its videos depend; empty of one alone."""
    return {"context_parallel": model.context_parallel} if model.context_parallel > 1 else {}


@dataclass(frozen=True)
class TokenGroup:
    """`degree` processes, of consecutive ranks, whose networks are shown the same videos at the same time.

    rank: this one's among them. parallel: diffusers' description of them. words: their own process group, over gloo,
    for what the first one has to say.
    """

    degree: int
    rank: int
    parallel: ParallelConfig
    words: Any

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, word: Any) -> Any:
        """The first one's `word`, for all of them; every one of them must call this."""
        box = [word]
        torch.distributed.broadcast_object_list(box, group=self.words, group_src=0)
        return box[0]


def token_group(degree: int, device: torch.device) -> TokenGroup:
    """This process's, of a process group whose size `degree` divides; all of its processes must call this."""
    rank = torch.distributed.get_rank() % degree
    return TokenGroup(degree, rank, parallel_config(degree, device), _word_group(degree))


@lru_cache(maxsize=8)
def parallel_config(degree: int, device: torch.device) -> ParallelConfig:
    """diffusers' description of the `degree` processes that this one shares tokens with. One for all networks: process
    groups are dear. Every process of the process group calls this."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (count // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree))
    config.setup(rank, count, device, mesh=mesh)
    return config


@lru_cache(maxsize=8)
def _word_group(degree: int) -> Any:
    count = torch.distributed.get_world_size()
    groups = [list(range(first, first + degree)) for first in range(0, count, degree)]
    return torch.distributed.new_subgroups_by_enumeration(groups, timeout=PATIENCE, backend="gloo")[0]


def split_tokens(network: Any, family: Any, parallel: ParallelConfig) -> None:
    """Put diffusers' hooks on `network`, or on both experts, which then take and give whole videos as before, where
    every process of `parallel` runs them.

    By hand what `enable_parallelism` does: it asks for an accelerator, which a CPU is not.
    """
    for one in (network.transformer, network.transformer_2) if isinstance(network, Experts) else (network,):
        for module in one.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = parallel
        apply_context_parallel(one, parallel.context_parallel_config, family.CONTEXT_PLAN)


def lead(network: nn.Module, group: TokenGroup) -> None:
    """From now on what this network is shown, which is called by keywords, is shown to those of the processes that
    `follow` it: files are read, and steps taken, by the first of a group alone."""

    def say(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        assert not args
        group.say(tree_map_only(Tensor, lambda value: value.cpu(), inputs))

    network.register_forward_pre_hook(say, prepend=True, with_kwargs=True)


def follow(load: Callable[[], Any], group: TokenGroup, device: torch.device) -> None:
    """Run the network that load() returns on what the first process of the group shows its own, once that one says
    LOAD and until it says that it is done (`group.say(None)`). Raises the error that it says."""
    network: Any = None
    while (word := group.say(None)) is not None:
        if isinstance(word, Exception):
            raise word
        if word == LOAD:
            network = load()
        else:
            with torch.no_grad():
                network(**tree_map_only(Tensor, lambda value: value.to(device), word))
