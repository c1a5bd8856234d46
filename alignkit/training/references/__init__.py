"""The model that the policy is compared with.

Each strategy is a file of this package; a new one is its file, a line in STRATEGIES and a name in
`reference.strategy`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from alignkit.config import Config
from alignkit.models import VideoModel
from alignkit.objectives.preference import needs_reference
from alignkit.objectives.scored import Answer
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch
from alignkit.stores.store import read_info
from alignkit.training.distributed import Process
from alignkit.training.references.adapter import AdapterOff
from alignkit.training.references.cached import HOLDS, Cached, cache_folder
from alignkit.training.references.copy import Copy
from alignkit.training.references.moving import Moving
from alignkit.training.weights import Start


class Reference(Protocol):
    """One that changes has `after_step(policy)` too, called after each optimizer step, and `state` and `load_state`."""

    def answer(self, batch: PairBatch, states: States) -> Answer:
        """Its predictions for winners and losers of `batch` as shown in `states`, [B, ...] each, without gradients; or
        its errors."""


STRATEGIES: dict[str, Callable[..., Any]] = {
    "copy": Copy,
    "adapter": AdapterOff,
    "cached": Cached,
    "ema": Moving,
    "sync": Moving,
}
"""By `reference.strategy`: from the run's configuration, process, policy engine, model and start."""


def start_reference(config: Config, process: Process, policy: Any, model: VideoModel, start: Start) -> Reference | None:
    """The reference of `config.reference`; None where the objective compares with nothing. Every process calls this.

    auto: "adapter" where the policy's adapters can be switched off and what is left is where the run started.
    """
    if not needs_reference(config.objective):
        return None
    strategy = config.reference.strategy
    if strategy == "auto":
        strategy = "adapter" if config.train.lora and start.adapters is None else "copy"
    return STRATEGIES[strategy](config, process, policy, model, start)


def reads_cache(config: Config) -> bool:
    """Whether a run of `config` compares with errors that were computed beforehand."""
    return config.reference.strategy == "cached" and needs_reference(config.objective)


def check_reference(config: Config) -> None:
    """Raises DataError where a run's reference is a cache that nobody has begun to make."""
    if reads_cache(config):
        read_info(cache_folder(config), HOLDS)
