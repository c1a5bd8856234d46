"""The preference objectives: each is the function that bears its `objective.name`, of `Scored` pairs.

It returns the loss, fp64 [B], and those logits that the loss puts through a sigmoid. Which keys of `objective` it reads
is declared in `alignkit.config.OBJECTIVES`; what is added to it is in `alignkit.objectives.terms`.
"""

from torch import Tensor

from alignkit.config import ObjectiveSection
from alignkit.objectives.scored import Logits, Scored
from alignkit.objectives.states import States
from alignkit_kernels import losses


def local_dpo(pairs: Scored) -> tuple[Tensor, Logits]:
    objective, sums = pairs.objective, pairs.sums
    gap_w, gap_l = pairs.gaps
    got = losses.local_dpo(
        sums.error_w,
        sums.error_l,
        gap_w,
        gap_l,
        sums.count,
        strength=pairs.batch.strength,
        beta=pairs.beta,
        strength_range=objective.strength_range,
        weight_region=objective.weight_region,
        weight_global=objective.weight_global,
        weight_sft=0.0,
        weight_region_sft=0.0,
    )
    return got.loss_per_pair, {"global": got.logits_global, "region": got.logits_region}


def dpo(pairs: Scored) -> tuple[Tensor, Logits]:
    z = pairs.logits["global"]
    return losses.dpo(z, pairs.objective.label_smoothing), {"global": z}


def robust_dpo(pairs: Scored) -> tuple[Tensor, Logits]:
    z = pairs.logits["global"]
    return losses.robust_dpo(z, pairs.objective.label_smoothing), {"global": z}


def poly_dpo(pairs: Scored) -> tuple[Tensor, Logits]:
    z = pairs.logits["global"]
    return losses.poly_dpo(z, pairs.objective.poly_alpha), {"global": z}


def winner_guarded(pairs: Scored) -> tuple[Tensor, Logits]:
    z, guard = pairs.logits["global"], guard_of(pairs.objective, pairs.states)
    return losses.winner_guarded(z, pairs.means.error_w, pairs.beta, guard), {"global": z}


def guard_of(objective: ObjectiveSection, states: States) -> Tensor:
    """The guard's weight, fp64 [B]: it falls with noise as a power of the path's a, 1 − t for flow matching."""
    return objective.guard_weight * states.coefficients[:, 0].double() ** objective.guard_exponent


def ipo(pairs: Scored) -> tuple[Tensor, Logits]:
    return losses.ipo(pairs.logits["global"]), {}


def hinge(pairs: Scored) -> tuple[Tensor, Logits]:
    return losses.hinge(pairs.logits["global"]), {}


def region_dpo(pairs: Scored) -> tuple[Tensor, Logits]:
    loss = losses.region_dpo(*pairs.gaps, pairs.sums.count, pairs.beta, pairs.objective.label_smoothing)
    return loss, {"region": pairs.logits["region"]}
