"""`objective.beta: auto`: β by how far winners and losers have moved apart so far."""

from typing import Any

from alignkit.config import ObjectiveSection
from alignkit_kernels import losses

DECAY = 0.99
OBSERVED = "global/gap_distance"
"""The metric it follows: the mean of |gap_w − gap_l| over a step's pairs, of all processes."""


class AutoBeta:
    """β_t = 2 / m_t in [beta_min, beta_max], m_t the running mean of |gap_w − gap_l| over the steps before t; beta_max
    while there is none. One logit is then what a typical pair makes (`losses.auto_beta`).

    m is a decayed sum over a decayed count, so that the first steps count like later ones.
    """

    def __init__(self, objective: ObjectiveSection):
        self.objective, self._sum, self._count = objective, 0.0, 0.0

    @property
    def value(self) -> float:
        mean = self._sum / self._count if self._count else None
        return losses.auto_beta(mean, self.objective.beta_min, self.objective.beta_max)

    def observe(self, metrics: dict[str, Any]) -> None:
        """After an optimizer step, with its metrics."""
        self._sum = DECAY * self._sum + metrics[OBSERVED]
        self._count = DECAY * self._count + 1

    def state(self) -> dict[str, float]:
        return {"sum": self._sum, "count": self._count}

    def load_state(self, state: dict[str, float]) -> None:
        self._sum, self._count = state["sum"], state["count"]
