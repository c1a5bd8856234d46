"""What is logged of a step: a loss of 0.693 alone says nothing."""

import torch
from torch import Tensor

from alignkit.config import ObjectiveSection
from alignkit.objectives.beta import OBSERVED
from alignkit.objectives.preference import TrainingLoss
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch

SATURATED = 6.0  # |logit| from which σ(−z) is below 0.25 % or above 99.75 %: the pair no longer teaches


def diagnostics(objective: ObjectiveSection, result: TrainingLoss, states: States) -> dict[str, Tensor]:
    """Per-pair numbers, fp64 [B], whose means over the global batch are logged: those that the objective defines.

    rewards/* carry TRL's names for the whole latent: chosen and rejected are −β/2 · gap of each side, margins
    their difference (the logit), accuracies counts a tie as half. Gaps are policy − reference.
    gradient_factor is σ(−z), by which a pair's gradient is scaled: 0.5 at the start, towards 0 where the pair is
    learnt. safeguard/factor is the share of the loser's gradient that was kept.
    """
    numbers = {"loss": result.loss_per_pair}
    if result.means is not None and result.beta is not None:
        means, whole, region = result.means, result.logits["global"], result.logits["region"]
        half_beta = result.beta / 2
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
        if objective.beta == "auto":
            numbers |= {OBSERVED: (means.gap_w - means.gap_l).abs(), "beta": torch.full_like(whole, result.beta)}
    for name, logit in result.sigmoids.items():
        numbers[f"{name}/gradient_factor"] = torch.sigmoid(-logit)
        numbers[f"{name}/saturated"] = (logit.abs() > SATURATED).double()
    if result.safeguard is not None:
        numbers["safeguard/factor"] = result.safeguard
    if result.teacher_distance is not None:
        numbers["teacher/distance"] = result.teacher_distance
    numbers |= {"error_w": result.error_w, "noise_level": states.coefficients[:, 1].double()}
    return {name: number.detach() for name, number in numbers.items()}


def signal(result: TrainingLoss) -> Tensor:
    """What the adaptive timestep law follows, fp64 [B]: σ(−z)·√(E_w + E_l), the size of a pair's gradient up to the
    network's own part of it."""
    assert result.means is not None
    z = result.logits["global"].detach()
    return torch.sigmoid(-z) * (result.means.error_w + result.means.error_l).detach().sqrt()


def inversion_numbers(batch: PairBatch, flagged_from: float | None) -> dict[str, Tensor]:
    """The larger round-trip error of each pair's inversions, 0 without one, fp64 [B]; and which are flagged for it."""
    assert batch.side_w is not None and batch.side_l is not None
    paths = zip(batch.side_w.paths, batch.side_l.paths, strict=True)
    errors = [max((path.error for path in pair if path and path.error is not None), default=0.0) for pair in paths]
    error = torch.tensor(errors, dtype=torch.float64, device=batch.winner.device)
    numbers = {"inversion/error": error}
    return numbers if flagged_from is None else numbers | {"inversion/flagged": (error > flagged_from).double()}


def accuracy(logits: Tensor) -> Tensor:
    """1 where the winner is preferred, 0 where the loser is, ½ for a tie; fp64 [B]."""
    return (logits > 0).double() + 0.5 * (logits == 0).double()
