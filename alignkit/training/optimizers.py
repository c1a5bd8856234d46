"""`train.optimizer`: AdamW with its two moments in fp32, in bf16 or in 8 bits; the masters are fp32 beside each.

DeepSpeed's own bf16 moments (`bf16.bf16_optimizer_states`, 0.19.8) come with bf16 masters only, in which steps of these
learning rates are rounded away, so they are refused (`alignkit.training.settings`) and these are ours.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.errors import ConfigError

CHUNK = 2**24
"""Elements updated at once: in fp32 four numbers of each are there beside what is kept."""
MOMENTS = "exp_avg", "exp_avg_sq"


def check_optimizer(config: Config) -> None:
    """Raises ConfigError where what the optimizer needs is not installed."""
    if config.train.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.optimizer: 'adamw_8bit' needs bitsandbytes: pip install 'alignkit[8bit]'")


def make_optimizer(config: Config, trained: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    train = config.train
    settings: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=device.type == "cuda", **settings)
    if train.optimizer == "adamw_bf16":
        return AdamWBf16(trained, settings)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trained, **settings)


class AdamWBf16(torch.optim.Optimizer):
    """AdamW as torch's (arXiv 1711.05101), each moment rounded to bf16 once a step, after its use.

    A moment moves by 1 - beta of the way to the gradient; rounded to 8 bits it stays where it is if that is too little,
    which `train.betas` are checked for.
    """

    def __init__(self, params: Iterable[nn.Parameter], settings: dict[str, Any]):
        super().__init__(params, {"eps": 1e-8} | settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes them of the parameter's dtype
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in MOMENTS})

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state.update({name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS})
        state["step"] += 1
        tensors = (parameter.data, parameter.grad, *(state[name] for name in MOMENTS))
        for weight, gradient, first, second in zip(*(each.view(-1).split(CHUNK) for each in tensors), strict=True):
            _step(weight, gradient, first, second, state["step"], group)


def _step(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, number: int, group: dict[str, Any]) -> None:
    rate, (beta1, beta2) = group["lr"], group["betas"]
    gradient = gradient.float()
    mean = first.float().lerp_(gradient, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(mean)
    second.copy_(square)
    divisor = square.sqrt_().div_((1 - beta2**number) ** 0.5).add_(group["eps"])
    weight.mul_(1 - rate * group["weight_decay"]).addcdiv_(mean, divisor, value=-rate / (1 - beta1**number))
