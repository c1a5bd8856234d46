"""Two networks that take turns along the path, as Wan2.2's A14B has them: which of them is at work where."""

from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError

PARTS = {"high": "transformer", "low": "transformer_2"}
"""By `model.expert`: the folder of its weights, and its name in diffusers' pipeline."""


class Experts(nn.Module):
    """Both, for whatever walks the whole path: `transformer` at timesteps from `boundary` on, `transformer_2` below,
    as in `WanPipeline`. low_guidance: the pipeline's `guidance_scale_2`; None for its `guidance_scale`.

    Nothing is trained through it: processes that are at other noise would gather other weights.
    """

    def __init__(self, transformer: Any, transformer_2: Any, *, boundary: float):
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary = boundary
        self.low_guidance: float | None = None

    def forward(self, *, timestep: Tensor, **inputs: Any) -> Any:
        """As either has it; all of a batch on one side of the boundary."""
        network = self.transformer if self._high(timestep) else self.transformer_2
        return network(timestep=timestep, **inputs)

    def guidance(self, usual: float, timesteps: Tensor) -> float:
        """Where the others have a scale `usual`."""
        return usual if self.low_guidance is None or self._high(timesteps) else self.low_guidance

    def _high(self, timesteps: Tensor) -> bool:
        high = timesteps >= self.boundary
        assert (high == high[0]).all(), "a batch on both sides of the boundary"
        return bool(high[0])

    @property
    def config(self) -> Any:
        return self.transformer.config

    def set_attention_backend(self, name: str) -> None:
        for network in (self.transformer, self.transformer_2):
            network.set_attention_backend(name)


def boundary_of(path: str, index: dict[str, Any], expert: str | None) -> float | None:
    """Of a model_index.json: the share of the timesteps from which on the first of two experts is at work; None of a
    model with one network.

    Raises ConfigError unless `expert` names one of two, ModelError for a boundary without a network on each side.
    """
    share = index.get("boundary_ratio")
    if share is None:
        if expert:
            raise ConfigError(f"model.expert: {path} has one network, not two experts; leave it out")
        return None
    missing = [part for part in PARTS.values() if not (index.get(part) or [None])[0]]
    if missing:
        raise ModelError(f"model.path: {path}: has a boundary_ratio and no {missing[0]}, so one of two experts only")
    if not expert:
        raise ConfigError(
            f"model.expert: {path} has two experts, of which a run trains one: high, at noise from {share:g} of the "
            "timesteps on, or low, below"
        )
    return share


def boundary_timestep(share: float, num_train_timesteps: int) -> float:
    """In fp32, as torch compares a whole timestep with it in `WanPipeline`."""
    return torch.tensor(share * num_train_timesteps, dtype=torch.float32).item()
