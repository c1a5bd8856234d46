"""What losses are made of: a pair batch's errors and gaps, summed by region and as means."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from alignkit.config import ObjectiveSection
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import PairRegionErrors, losses

Logits = dict[str, Tensor]
"""z by what its gaps are means over, fp64 [B]: "global" (the whole latent) and "region" (inside the mask)."""


@dataclass(frozen=True)
class Scored:
    """B pairs, scored: `sums` fp64 [B, R], outside and inside the mask. beta is the one in force."""

    objective: ObjectiveSection
    beta: float
    batch: PairBatch
    states: States
    sums: PairRegionErrors

    @cached_property
    def means(self) -> losses.PairMeans:
        sums = self.sums
        return losses.pair_means(sums.error_w, sums.error_l, sums.gap_w, sums.gap_l, sums.count)

    @cached_property
    def logits(self) -> Logits:
        means = self.means
        return {
            "global": losses.logits_of(means.gap_w, means.gap_l, self.beta),
            "region": losses.logits_of(means.region_gap_w, means.region_gap_l, self.beta),
        }
