"""The training objectives: a pair batch in, the loss and its diagnostics out.

Each is the same three steps: forwards, squared errors by region, and a head of `alignkit_kernels.losses`. What an
objective is, which keys it reads and when to use it: `docs/losses.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alignkit.config import Config, ObjectiveSection
from alignkit.models import family_module
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import PairRegionErrors, losses, pair_region_errors, region_errors

SATURATED = 6.0  # |logit| from which σ(−z) is below 0.25 % or above 99.75 %: the pair no longer teaches

Logits = dict[str, Tensor]
"""z by what its gaps are means over, fp64 [B]: "global" (the whole latent) and "region" (inside the mask)."""
Head = Callable[[ObjectiveSection, PairRegionErrors, Logits, Tensor | None], tuple[Tensor, Logits]]
"""From sums by region, their logits and the pairs' strength (or None) to the loss, fp64 [B], and to those logits
that it puts through a sigmoid."""


@dataclass(frozen=True)
class TrainingLoss:
    """What an objective makes of a batch of B pairs: `loss` is the mean to call backward on, the rest fp64 [B].

    error_w: the winner's mean error.
    means: every error and gap of the pair; None without a reference.
    logits: exactly 0 where policy and reference agree; empty without a reference.
    sigmoids: those of `logits` that the loss puts through a sigmoid.
    safeguard: how much of the loser's gradient was kept; None with the safeguard off.
    """

    loss: Tensor
    loss_per_pair: Tensor
    error_w: Tensor
    means: losses.PairMeans | None = None
    logits: Logits = field(default_factory=dict)
    sigmoids: Logits = field(default_factory=dict)
    safeguard: Tensor | None = None


def _local_dpo(objective: ObjectiveSection, sums: PairRegionErrors, _: Logits, strength: Tensor | None):
    got = losses.local_dpo(
        sums.error_w,
        sums.error_l,
        sums.gap_w,
        sums.gap_l,
        sums.count,
        strength=strength,
        beta=objective.beta,
        strength_range=objective.strength_range,
        weight_region=objective.weight_region,
        weight_global=objective.weight_global,
        weight_sft=objective.weight_sft,
        weight_region_sft=objective.weight_region_sft,
    )
    return got.loss_per_pair, {"global": got.logits_global, "region": got.logits_region}


def _dpo(objective: ObjectiveSection, _sums: PairRegionErrors, logits: Logits, _: Tensor | None):
    return losses.dpo(logits["global"], objective.label_smoothing), {"global": logits["global"]}


def _robust_dpo(objective: ObjectiveSection, _sums: PairRegionErrors, logits: Logits, _: Tensor | None):
    return losses.robust_dpo(logits["global"], objective.label_smoothing), {"global": logits["global"]}


def _ipo(_objective: ObjectiveSection, _sums: PairRegionErrors, logits: Logits, _: Tensor | None):
    return losses.ipo(logits["global"]), {}


def _hinge(_objective: ObjectiveSection, _sums: PairRegionErrors, logits: Logits, _: Tensor | None):
    return losses.hinge(logits["global"]), {}


def _region_dpo(objective: ObjectiveSection, sums: PairRegionErrors, logits: Logits, _: Tensor | None):
    loss = losses.region_dpo(sums.gap_w, sums.gap_l, sums.count, objective.beta, objective.label_smoothing)
    return loss, {"region": logits["region"]}


HEADS: dict[str, Head] = {
    "local_dpo": _local_dpo,
    "dpo": _dpo,
    "robust_dpo": _robust_dpo,
    "ipo": _ipo,
    "hinge": _hinge,
    "region_dpo": _region_dpo,
}
"""The objectives that compare winner and loser with a reference, by `objective.name`; the one other is `sft`."""


def needs_reference(objective: ObjectiveSection) -> bool:
    return objective.name in HEADS


def training_loss(
    config: Config, model, policy: nn.Module, reference: nn.Module | None, batch: PairBatch, states: States
) -> TrainingLoss:
    """The loss of `config.objective`: one forward of each network over winners and losers together.

    Without need of a reference, `reference` may be None, and the policy sees winners only.
    """
    predict = family_module(model.family).predict
    inputs = (states.states, states.timesteps, states.text)
    if not needs_reference(config.objective):
        return supervised_loss(predict(policy, *(x[: len(batch)] for x in inputs)), batch, states)
    with torch.no_grad():
        references = predict(reference, *inputs).chunk(2)
    return preference_loss(config.objective, predict(policy, *inputs).chunk(2), references, batch, states)


def preference_loss(
    objective: ObjectiveSection,
    predictions: tuple[Tensor, Tensor],
    references: tuple[Tensor, Tensor],
    batch: PairBatch,
    states: States,
) -> TrainingLoss:
    """The loss from both networks' predictions for (winners, losers), each [B, ...] like the latents, any float dtype.

    Differentiable in `predictions`. Raises `alignkit_kernels.InputError` for a strength outside
    `objective.strength_range` (local_dpo) and for shapes that do not fit.
    """
    sums = pair_region_errors(
        *predictions,
        batch.winner,
        batch.loser,
        states.coefficients,
        states.noise,
        reference_w=references[0],
        reference_l=references[1],
        regions=batch.mask,
        num_regions=2,
    )
    kept = None
    if objective.loser_safeguard is not None:
        kept = losses.loser_safeguard(sums.error_w, sums.cross, objective.loser_safeguard)
        # no loss reads error_l: the gap is the only way to the loser's prediction
        sums = sums._replace(gap_l=losses.scale_gradient(sums.gap_l, kept[:, None]))
    means = losses.pair_means(sums.error_w, sums.error_l, sums.gap_w, sums.gap_l, sums.count)
    logits = {
        "global": losses.logits_of(means.gap_w, means.gap_l, objective.beta),
        "region": losses.logits_of(means.region_gap_w, means.region_gap_l, objective.beta),
    }
    per_pair, sigmoids = HEADS[objective.name](objective, sums, logits, batch.strength)
    return TrainingLoss(per_pair.mean(), per_pair, means.error_w, means, logits | sigmoids, sigmoids, kept)


def supervised_loss(prediction: Tensor, batch: PairBatch, states: States) -> TrainingLoss:
    """The winners' own error, from the policy's predictions for them, [B, ...]: nothing of the losers is read."""
    sums = region_errors(prediction, batch.winner, states.coefficients, states.noise)
    error = sums.error.sum(dim=1) / sums.count.sum(dim=1)
    per_pair = losses.sft(error)
    return TrainingLoss(per_pair.mean(), per_pair, error)


def diagnostics(config: Config, result: TrainingLoss, states: States) -> dict[str, Tensor]:
    """Per-pair numbers, fp64 [B], whose means over the global batch are logged: those that the objective defines.

    rewards/* carry TRL's names for the whole latent: chosen and rejected are −β/2 · gap of each side, margins
    their difference (the logit), accuracies counts a tie as half. Gaps are policy − reference.
    gradient_factor is σ(−z), by which a pair's gradient is scaled: 0.5 at the start, towards 0 where the pair is
    learnt. safeguard/factor is the share of the loser's gradient that was kept.
    """
    numbers = {"loss": result.loss_per_pair}
    if result.means is not None:
        means, whole, region = result.means, result.logits["global"], result.logits["region"]
        half_beta = config.objective.beta / 2
        numbers |= {
            "rewards/chosen": -half_beta * means.gap_w,
            "rewards/rejected": -half_beta * means.gap_l,
            "rewards/margins": whole,
            "rewards/accuracies": accuracy(whole),
            "global/gap_w": means.gap_w,
            "global/gap_l": means.gap_l,
            "region/accuracy": accuracy(region),
            "region/logit": region,
            "region/gap_w": means.region_gap_w,
            "region/gap_l": means.region_gap_l,
            "region_empty": means.region_empty.double(),
            "error_l": means.error_l,
        }
    for name, logit in result.sigmoids.items():
        numbers[f"{name}/gradient_factor"] = torch.sigmoid(-logit)
        numbers[f"{name}/saturated"] = (logit.abs() > SATURATED).double()
    if result.safeguard is not None:
        numbers["safeguard/factor"] = result.safeguard
    numbers |= {"error_w": result.error_w, "noise_level": states.coefficients[:, 1].double()}
    return {name: number.detach() for name, number in numbers.items()}


def accuracy(logits: Tensor) -> Tensor:
    """1 where the winner is preferred, 0 where the loser is, ½ for a tie; fp64 [B]."""
    return (logits > 0).double() + 0.5 * (logits == 0).double()
