"""The training objectives: predictions for a pair batch in, the loss out.

Each is the same three steps: squared errors by region, a head of `alignkit.objectives.heads`, and the terms added to
it. What an objective is, which keys it reads and when to use it: `docs/losses.md`.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from alignkit.config import OBJECTIVES, ObjectiveSection
from alignkit.objectives import heads
from alignkit.objectives.scored import Answer, Logits, Scored, score
from alignkit.objectives.states import States
from alignkit.objectives.terms import TERMS
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import losses, region_errors


@dataclass(frozen=True)
class TrainingLoss:
    """What an objective makes of a batch of B pairs: `loss` is the mean to call backward on, the rest fp64 [B].

    error_w: the winner's mean error.
    means: every error and gap of the pair; None without a reference.
    logits: exactly 0 where policy and reference agree; empty without a reference.
    sigmoids: those of `logits` that the loss puts through a sigmoid.
    safeguard: how much of the loser's gradient was kept; None with the safeguard off.
    beta: the one in force, a number; None without a reference.
    teacher_distance: `Teacher.distance`; None without a teacher.
    """

    loss: Tensor
    loss_per_pair: Tensor
    error_w: Tensor
    means: losses.PairMeans | None = None
    logits: Logits = field(default_factory=dict)
    sigmoids: Logits = field(default_factory=dict)
    safeguard: Tensor | None = None
    beta: float | None = None
    teacher_distance: Tensor | None = None

    def beside(self, distance: Tensor, weight: float) -> "TrainingLoss":
        """The same with `weight` times a distance to the teacher, fp64 [B], in every pair's loss."""
        loss, per_pair = self.loss + weight * distance.mean(), self.loss_per_pair + weight * distance
        return replace(self, loss=loss, loss_per_pair=per_pair, teacher_distance=distance)


def needs_reference(objective: ObjectiveSection) -> bool:
    """Whether it compares winner and loser with a reference; `sft` does not."""
    return "beta" in OBJECTIVES[objective.name]


def preference_loss(
    objective: ObjectiveSection,
    predictions: tuple[Tensor, Tensor],
    references: Answer,
    batch: PairBatch,
    states: States,
    beta: float | None = None,
) -> TrainingLoss:
    """The loss from predictions for (winners, losers), each [B, ...] like the latents, any float dtype: the policy's,
    and the reference's or its errors.

    beta: the one in force; None for `objective.beta`. Differentiable in `predictions`. Raises
    `alignkit_kernels.InputError` for a strength outside `objective.strength_range` (local_dpo) and for shapes that do
    not fit.
    """
    sums = score(predictions, references, batch, states)
    pairs, kept = Scored(objective, objective.beta if beta is None else beta, batch, states, sums), None
    if objective.loser_safeguard is not None:
        kept = _share_of_loser(pairs)
        # no head reads error_l: the gap is the only way to the loser's prediction
        pairs = replace(pairs, sums=sums._replace(gap_l=losses.scale_gradient(sums.gap_l, kept[:, None])))
    per_pair, sigmoids = _loss(pairs)
    loss = per_pair.mean() if states.weight is None else (states.weight.to(per_pair.device) * per_pair).mean()
    return TrainingLoss(
        loss, per_pair, pairs.means.error_w, pairs.means, pairs.logits | sigmoids, sigmoids, kept, pairs.beta
    )


def supervised_loss(prediction: Tensor, batch: PairBatch, states: States) -> TrainingLoss:
    """The winners' own error, from the policy's predictions for them, [B, ...]: nothing of the losers is read."""
    sums = region_errors(prediction, batch.winner, states.coefficients, states.noise_w)
    error = sums.error.sum(dim=1) / sums.count.sum(dim=1)
    per_pair = losses.sft(error)
    loss = per_pair.mean() if states.weight is None else (states.weight.to(per_pair.device) * per_pair).mean()
    return TrainingLoss(loss, per_pair, error)


def _loss(pairs: Scored) -> tuple[Tensor, Logits]:
    """The head's loss and every term that has a weight, fp64 [B], and the head's sigmoids."""
    objective = pairs.objective
    per_pair, sigmoids = getattr(heads, objective.name)(pairs)
    for key, term in TERMS.items():
        if key in OBJECTIVES[objective.name] and getattr(objective, key):
            per_pair = per_pair + getattr(objective, key) * term(pairs)
    return per_pair, sigmoids


def _share_of_loser(pairs: Scored) -> Tensor:
    """λ of `losses.loser_safeguard`, fp64 [B], with the weights that this very loss gives to each region."""
    names = "error_w", "gap_w", "gap_l"
    apart = {name: getattr(pairs.sums, name).detach().requires_grad_() for name in names}
    with torch.enable_grad():
        loss = _loss(replace(pairs, sums=pairs.sums._replace(**apart)))[0].sum()
    slopes = torch.autograd.grad(loss, list(apart.values()), allow_unused=True, materialize_grads=True)
    error_w, gap_w, gap_l = slopes
    # where a loss pulls z back its slopes have the other sign, and there is nothing to hold back
    weights = {"weight_w": (error_w + gap_w).clamp(min=0), "weight_l": (-gap_l).clamp(min=0)}
    return losses.loser_safeguard(pairs.sums.error_w, pairs.sums.cross, pairs.objective.loser_safeguard, **weights)
