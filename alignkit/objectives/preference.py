"""The training objectives: predictions for a pair batch in, the loss out.

Each is the same three steps: squared errors by region, a head, and the terms added to it. All of it is one fused call
of the kernels; with a term of somebody's own (`alignkit.objectives.terms`) the steps are taken one by one, by the
functions of `alignkit.objectives.heads`. What an objective is, which keys it reads and when to use it:
`docs/losses.md`.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from alignkit.config import OBJECTIVES, ObjectiveSection
from alignkit.objectives import heads
from alignkit.objectives.scored import Answer, Logits, ReferenceErrors, Scored, score
from alignkit.objectives.states import States
from alignkit.objectives.terms import FUSED, TERMS
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import losses, region_errors
from alignkit_kernels import preference_loss as fused_loss


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
    in_force = objective.beta if beta is None else beta
    assert not isinstance(in_force, str), "an automatic β is given as the number that it is"
    loss = _fused if TERMS == FUSED else _composed
    return loss(objective, predictions, references, batch, states, in_force)


# objective: the head's own keys, by what the fused loss calls them
HEAD_KEYS = {
    "local_dpo": {key: key for key in ("strength_range", "weight_region", "weight_global")},
    **{name: {"label_smoothing": "label_smoothing"} for name in ("dpo", "robust_dpo", "region_dpo")},
    "poly_dpo": {"alpha": "poly_alpha"},
}
# the heads whose sigmoid is of the logit over the whole latent, and of that inside the mask
SIGMOIDS = {
    "local_dpo": ("global", "region"),
    "region_dpo": ("region",),
    **dict.fromkeys(("dpo", "robust_dpo", "poly_dpo", "winner_guarded"), ("global",)),
}


def _fused(
    objective: ObjectiveSection,
    predictions: tuple[Tensor, Tensor],
    references: Answer,
    batch: PairBatch,
    states: States,
    beta: float,
) -> TrainingLoss:
    options = {name: getattr(objective, key) for name, key in HEAD_KEYS.get(objective.name, {}).items()}
    options |= {key: getattr(objective, key) for key in FUSED if key in OBJECTIVES[objective.name]}
    if objective.name == "local_dpo":
        options["strength"] = batch.strength
    if objective.name == "winner_guarded":
        options["guard_weight"] = heads.guard_of(objective, states)
    if isinstance(references, ReferenceErrors):
        options |= {"reference_error_w": references.error_w, "reference_error_l": references.error_l}
    else:
        options |= {"reference_w": references[0], "reference_l": references[1]}
    got = fused_loss(
        *predictions, head=objective.name, clean_w=batch.winner, clean_l=batch.loser, coefficients=states.coefficients,
        noise_w=states.noise_w, noise_l=states.noise_l, regions=batch.mask, weight=states.weight, beta=beta,
        loser_safeguard=objective.loser_safeguard, **options,
    )  # fmt: skip
    means = losses.PairMeans(*(getattr(got, name) for name in losses.PairMeans._fields))
    logits = {"global": got.logits_global, "region": got.logits_region}
    return TrainingLoss(
        got.loss, got.loss_per_pair, got.error_w, means, logits,
        {name: logits[name] for name in SIGMOIDS.get(objective.name, ())},
        None if objective.loser_safeguard is None else got.kept, beta,
    )  # fmt: skip


def _composed(
    objective: ObjectiveSection,
    predictions: tuple[Tensor, Tensor],
    references: Answer,
    batch: PairBatch,
    states: States,
    beta: float,
) -> TrainingLoss:
    sums = score(predictions, references, batch, states)
    pairs, kept = Scored(objective, beta, batch, states, sums), None
    if objective.loser_safeguard is not None:
        kept = _share_of_loser(pairs)
        # no head reads error_l: the gap is the only way to the loser's prediction
        pairs = replace(pairs, sums=sums._replace(gap_l=losses.scale_gradient(pairs.gaps[1], kept[:, None])))
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
    safeguard = pairs.objective.loser_safeguard
    assert safeguard is not None
    names = "error_w", "gap_w", "gap_l"
    apart = {name: getattr(pairs.sums, name).detach().requires_grad_() for name in names}
    with torch.enable_grad():
        loss = _loss(replace(pairs, sums=pairs.sums._replace(**apart)))[0].sum()
    slopes = torch.autograd.grad(loss, list(apart.values()), allow_unused=True, materialize_grads=True)
    error_w, gap_w, gap_l = slopes
    # where a loss pulls z back its slopes have the other sign, and there is nothing to hold back
    weights = {"weight_w": (error_w + gap_w).clamp(min=0), "weight_l": (-gap_l).clamp(min=0)}
    return losses.loser_safeguard(pairs.sums.error_w, pairs.sums.cross, safeguard, **weights)
