"""What losses are made of: a pair batch's errors and gaps, summed by region and as means."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from alignkit.config import ObjectiveSection
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import PairRegionErrors, losses, pair_region_errors

NUM_REGIONS = 2  # outside and inside the mask

Logits = dict[str, Tensor]
"""z by what its gaps are means over, fp64 [B]: "global" (the whole latent) and "region" (inside the mask)."""


@dataclass(frozen=True)
class ReferenceErrors:
    """A reference's errors of B pairs where its predictions are not at hand: sums over each region, fp64 [B, R]."""

    error_w: Tensor
    error_l: Tensor


Answer = tuple[Tensor, Tensor] | ReferenceErrors
"""What a reference says of a batch: its predictions for winners and losers, [B, ...] each, or their errors."""


def score(
    predictions: tuple[Tensor, Tensor], references: Answer | None, batch: PairBatch, states: States
) -> PairRegionErrors:
    """Errors of the predictions for (winners, losers), [B, ...] each, and their gaps to `references` where there are
    any; differentiable in `predictions`.

    A gap to errors is a difference of two sums, rounded as they are: some 2⁻²⁴ of an error, where the gap to
    predictions is rounded relative to itself. Exactly 0 where both come of the same predictions, either way.
    """
    reference_w = reference_l = None
    if references is not None and not isinstance(references, ReferenceErrors):
        reference_w, reference_l = references
    sums = pair_region_errors(
        *predictions,
        batch.winner,
        batch.loser,
        states.coefficients,
        states.noise_w,
        states.noise_l,
        reference_w=reference_w,
        reference_l=reference_l,
        regions=batch.mask,
        num_regions=NUM_REGIONS,
    )
    if not isinstance(references, ReferenceErrors):
        return sums
    return sums._replace(gap_w=sums.error_w - references.error_w, gap_l=sums.error_l - references.error_l)


@dataclass(frozen=True)
class Scored:
    """B pairs, scored: `sums` fp64 [B, R], outside and inside the mask. beta is the one in force."""

    objective: ObjectiveSection
    beta: float
    batch: PairBatch
    states: States
    sums: PairRegionErrors

    @property
    def gaps(self) -> tuple[Tensor, Tensor]:
        """Of winner and loser to the reference, fp64 [B, R]."""
        assert self.sums.gap_w is not None and self.sums.gap_l is not None
        return self.sums.gap_w, self.sums.gap_l

    @cached_property
    def means(self) -> losses.PairMeans:
        sums = self.sums
        return losses.pair_means(sums.error_w, sums.error_l, *self.gaps, sums.count)

    @cached_property
    def logits(self) -> Logits:
        means = self.means
        return {
            "global": losses.logits_of(means.gap_w, means.gap_l, self.beta),
            "region": losses.logits_of(means.region_gap_w, means.region_gap_l, self.beta),
        }
