"""`reference.strategy: copy`: a second, frozen model, partitioned and rounded as the policy is."""

from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.models import VideoModel
from alignkit.objectives.states import States, predictions
from alignkit.stores.pairs import PairBatch
from alignkit.training.distributed import Process
from alignkit.training.engine import load_network, put_adapters, release
from alignkit.training.settings import deepspeed_config
from alignkit.training.weights import Start, open_start


class Copy:
    """Goes through the same wrapper as the policy: ZeRO-3 replaces `F.linear`, and a plain module differs from a
    wrapped one by up to 0.17 logits at β = 5000. Under ZeRO-2 the policy computes as a plain module, and so does this.
    """

    def __init__(self, config: Config, process: Process, policy: Any, model: VideoModel, start: Start):
        self._model = model
        self.network: Any = second_network(config, process, model, where_from(config, model, start))

    def release(self) -> None:
        release_network(self.network)

    @torch.no_grad()
    def answer(self, batch: PairBatch, states: States) -> tuple[Tensor, Tensor]:
        winner, loser = predictions(self._model, self.network, states).chunk(2)
        return winner, loser


def where_from(config: Config, model: VideoModel, start: Start) -> Start:
    """What a reference begins with that may be the model under all stages, `reference.from: base`."""
    return open_start(config, model) if start.later and config.reference.from_ == "base" else start


def second_network(config: Config, process: Process, model: VideoModel, start: Start) -> nn.Module:
    """`model`'s network as it is at `start`, `frozen`. Every process calls this."""
    network = load_network(config, process, model, start)[0]
    if start.adapters is not None:
        put_adapters(network, config, start)
    return frozen(network, config, process)


def release_network(network: nn.Module) -> None:
    """Free a partitioned one."""
    if hasattr(network, "destroy"):
        release(network)


def frozen(network: nn.Module, config: Config, process: Process) -> nn.Module:
    """`network`, as `load_network` gave it, without gradients; under ZeRO-3 in an engine like the policy's."""
    import deepspeed

    network.requires_grad_(False).eval()
    settings = deepspeed_config(config, process)
    if settings["zero_optimization"]["stage"] < 3:
        return network
    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    own = {
        "train_micro_batch_size_per_gpu": settings["train_micro_batch_size_per_gpu"],
        "zero_optimization": zero,
        "bf16": settings["bf16"],
        "steps_per_print": None,
    }
    engine = deepspeed.initialize(model=network, config=own, dist_init_required=False)[0]
    engine.eval()
    return engine
