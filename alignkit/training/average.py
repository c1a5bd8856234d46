"""`train.ema`: an exponential moving average of the weights that are trained, exported beside them."""

from typing import Any

import torch
from torch import Tensor

from alignkit.training.shards import own_master, part_of, place, trained_parameters


class Average:
    """Of the fp32 masters, of which each process averages its own part; of adapters where those are trained.

    After update n it becomes d · itself + (1 − d) · the weights with d = min(decay, n / (n + 9)), 0 after the first, as
    diffusers' EMAModel.
    """

    def __init__(self, policy: Any, decay: float):
        self._policy, self._decay, self._steps = policy, decay, 0
        self._kept = {
            name: own_master(parameter).detach().float().clone() for name, parameter in trained_parameters(policy)
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Take in an update of the optimizer. Every process calls this."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9)) if self._steps > 1 else 0.0
        for name, parameter in trained_parameters(self._policy):
            self._kept[name].lerp_(own_master(parameter), 1 - decay)

    def state(self) -> dict[str, int]:
        return {"steps": self._steps}

    def load_state(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]

    def local_state(self) -> dict[str, Tensor]:
        return self._kept

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        for name, kept in self._kept.items():
            kept.copy_(state[name])

    def load_whole_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in trained_parameters(self._policy):
            self._kept[name].copy_(part_of(state[name], parameter))

    def weights(self) -> dict[str, Tensor]:
        """The average by name, fp32 on CPU, on the first process; every process must call this, a tensor is made whole
        at a time."""
        found = {}
        for name, parameter in trained_parameters(self._policy):
            start, kept = place(parameter).start, self._kept[name]
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.zeros(max(shape.numel(), start + kept.numel()), device=self._policy.device)
            whole[start : start + kept.numel()] = kept
            whole = whole[: shape.numel()]
            torch.distributed.reduce(whole, dst=0)
            if torch.distributed.get_rank() == 0:
                found[name] = whole.view(shape).cpu()
        return found
