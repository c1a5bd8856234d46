"""`reference.strategy: adapter`: the policy itself with its adapters off, a reference that costs no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.models import VideoModel
from alignkit.objectives.states import States, predictions
from alignkit.stores.pairs import PairBatch
from alignkit.training.distributed import Process
from alignkit.training.weights import Start


class AdapterOff:
    def __init__(self, config: Config, process: Process, policy: Any, model: VideoModel, start: Start):
        self._model, self._engine = model, policy

    @torch.no_grad()
    def answer(self, batch: PairBatch, states: States) -> tuple[Tensor, Tensor]:
        with _adapters_off(self._engine.module):
            winner, loser = predictions(self._model, self._engine, states).chunk(2)
        return winner, loser


@contextmanager
def _adapters_off(network: Any) -> Iterator[None]:
    layers = [layer for layer in network.modules() if hasattr(layer, "_disable_adapters")]
    # peft's own switch also turns requires_grad off and on, which ZeRO-3 must not see in the middle of a step
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
