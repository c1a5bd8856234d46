"""Implicit accuracy and denoising errors on held-out pairs, at fixed points of the inference schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.models import VideoModel
from alignkit.objectives.diagnostics import accuracy
from alignkit.objectives.scored import score
from alignkit.objectives.states import predictions
from alignkit.progress import progress
from alignkit.stores.pairs import PairStore
from alignkit.training.heldout import Point, points, rows_of, shape_of, shown_at
from alignkit_kernels import PairRegionErrors, losses


@dataclass(frozen=True)
class PairScores:
    """fp64 [positions, draws, pairs] each. Errors are means over all elements of a latent; gaps are policy − reference.

    region_logit, global_logit: −(β/2)·(gap_w − gap_l) with the run's β, means over the region and the whole.
    """

    noise_levels: list[float]
    region_logit: Tensor
    global_logit: Tensor
    error_w: Tensor
    error_l: Tensor
    reference_error_w: Tensor
    reference_error_l: Tensor


def score_pairs(
    config: Config,
    model: VideoModel,
    store: PairStore,
    policy: nn.Module,
    reference: nn.Module,
    title: str,
    device: torch.device,
) -> PairScores:
    """Compare `policy` with `reference` on every pair of `store`, with noise keyed by (seed, pair id, draw)."""
    wanted, collected = points(config, model, store), []
    with progress(title, sum(len(point.pairs) for point in wanted)) as bar:
        for point in wanted:
            collected.append(score_point(config, model, store, policy, reference, point, device))
            bar.advance(len(point.pairs))
    return joined(config, model, store, collected)


@torch.no_grad()
def score_point(
    config: Config,
    model: VideoModel,
    store: PairStore,
    policy: nn.Module,
    reference: nn.Module,
    point: Point,
    device: torch.device,
) -> dict[str, Tensor]:
    """The numbers of `PairScores` at one point, fp64 [pairs] each, on CPU."""
    batch, states = shown_at(config, model, store, point, device, model.dtype)
    winner, loser = predictions(model, policy, states).chunk(2)
    reference_w, reference_l = predictions(model, reference, states).chunk(2)
    sums = score((winner, loser), (reference_w, reference_l), batch, states)
    return _per_pair(sums, config.objective.largest_beta)


def joined(config: Config, model: VideoModel, store: PairStore, parts: list[dict[str, Tensor]]) -> PairScores:
    """What was scored at all `points`, in their order."""
    schedule, shape = model.schedule(config.sample.num_inference_steps), shape_of(config, model, store)
    return PairScores(
        noise_levels=[schedule.coefficients[row, 1].item() for row in rows_of(config, model)],
        **{name: torch.cat([part[name] for part in parts]).reshape(shape) for name in parts[0]},
    )


def _per_pair(errors: PairRegionErrors, beta: float) -> dict[str, Tensor]:
    assert errors.gap_w is not None and errors.gap_l is not None
    means = losses.pair_means(errors.error_w, errors.error_l, errors.gap_w, errors.gap_l, errors.count)
    numbers = {
        "region_logit": losses.logits_of(means.region_gap_w, means.region_gap_l, beta),
        "global_logit": losses.logits_of(means.gap_w, means.gap_l, beta),
        "error_w": means.error_w,
        "error_l": means.error_l,
        "reference_error_w": means.error_w - means.gap_w,
        "reference_error_l": means.error_l - means.gap_l,
    }
    return {name: number.cpu() for name, number in numbers.items()}


def describe(scores: PairScores) -> dict[str, Any]:
    """Means over everything, and by noise level, ready for JSON."""

    def part(index: int | slice) -> dict[str, float]:
        return {
            "region_accuracy": accuracy(scores.region_logit[index]).mean().item(),
            "global_accuracy": accuracy(scores.global_logit[index]).mean().item(),
            "error_w_before": scores.reference_error_w[index].mean().item(),
            "error_w_after": scores.error_w[index].mean().item(),
            "error_l_before": scores.reference_error_l[index].mean().item(),
            "error_l_after": scores.error_l[index].mean().item(),
        }

    by_level = [{"sigma": level, **part(i)} for i, level in enumerate(scores.noise_levels)]
    return {**part(slice(None)), "comparisons": scores.region_logit.numel(), "by_timestep": by_level}
