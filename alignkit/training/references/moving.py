"""`reference.strategy: ema` and `sync`: a second model that follows the policy."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.models import VideoModel, working_dtype
from alignkit.training.distributed import Process
from alignkit.training.engine import load_network, put_adapters
from alignkit.training.references.copy import Copy, frozen, where_from
from alignkit.training.shards import own_master, part_of, place, trained_parameters
from alignkit.training.weights import Start


class Moving(Copy):
    """A copy, with adapters of its own where adapters are trained, that after every `reference.every` optimizer steps
    becomes decay · itself + (1 − decay) · the policy. `sync` is decay 0: both then compute the same bits.

    It follows the policy's fp32 masters, each process that part of them which it holds. In bf16 `ema` keeps fp32 values
    of its own beside the network: most moves are smaller than a rounded weight can show.
    """

    def __init__(self, config: Config, process: Process, policy: Any, model: VideoModel, start: Start):
        self._model, self._policy, self._steps = model, policy, 0
        self._every = config.reference.every
        self._decay = config.reference.decay if config.reference.strategy == "ema" else 0.0
        start = where_from(config, model, start)
        network = load_network(config, process, model, start)[0]
        adapters = put_adapters(network, config, start) if config.train.lora else None
        self.network = frozen(network, config, process)
        self._kept: dict[str, Tensor] = {}
        if self._decay and working_dtype(config.model, process.device) != torch.float32:
            for name, trained, followed in self._both():
                shape = getattr(followed, "ds_shape", followed.shape)
                whole = adapters[name] if adapters else start.base.share(name, shape, process.device)
                self._kept[name] = part_of(whole, trained).to(_own(trained, followed).device, copy=True)

    @torch.no_grad()
    def after_step(self, policy: Any) -> None:
        """Count an optimizer step of the policy, and move if it is time. Every process calls this."""
        self._steps += 1
        if self._steps % self._every:
            return
        for name, trained, followed in self._both():
            value = self._value(name, trained, followed)
            master = own_master(trained).to(value.device)
            if self._decay:
                value.mul_(self._decay).add_(master, alpha=1 - self._decay)
            else:
                value.copy_(master)
        self._show()

    def state(self) -> dict[str, int]:
        return {"steps": self._steps}

    def load_state(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]

    def local_state(self) -> dict[str, Tensor]:
        return {name: self._value(name, trained, followed) for name, trained, followed in self._both()}

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Tensor]) -> None:
        for name, trained, followed in self._both():
            self._value(name, trained, followed).copy_(state[name])
        self._show()

    @torch.no_grad()
    def load_whole_state(self, state: dict[str, Tensor]) -> None:
        for name, trained, followed in self._both():
            self._value(name, trained, followed).copy_(part_of(state[name].to(trained.device), trained))
        self._show()

    def _both(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Every trained parameter's name, the policy's and the reference's."""
        own = dict(getattr(self.network, "module", self.network).named_parameters())
        for name, parameter in trained_parameters(self._policy):
            yield name, parameter, own[name]

    def _value(self, name: str, trained: nn.Parameter, followed: nn.Parameter) -> Tensor:
        """What this process keeps of a parameter: fp32 values, or its part of the network's where those are exact."""
        return self._kept.get(name, _own(trained, followed))

    def _show(self) -> None:
        """Give the network what the processes keep."""
        for name, trained, followed in self._both():
            own = _own(trained, followed)
            if name in self._kept:
                own.copy_(self._kept[name])
            if not hasattr(followed, "ds_tensor") and torch.distributed.get_world_size() > 1:
                whole = torch.zeros_like(followed.data)
                whole.view(-1)[place(trained)] = own
                torch.distributed.all_reduce(whole)
                followed.copy_(whole)
        if hasattr(self.network, "optimizer"):
            # small ones stay gathered from one forward to the next, as they were
            self.network.optimizer.partition_all_parameters()


def _own(trained: nn.Parameter, followed: nn.Parameter) -> Tensor:
    """This process's part of the reference's parameter, flat: what it is changed by."""
    return followed.ds_tensor if hasattr(followed, "ds_tensor") else followed.data.view(-1)[place(trained)]
