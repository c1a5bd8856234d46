"""Implicit accuracy and denoising errors on held-out pairs, at fixed points of the inference schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.models import family_module
from alignkit.objectives.diagnostics import accuracy
from alignkit.objectives.states import evaluation_states
from alignkit.progress import progress
from alignkit.stores.pairs import PairStore
from alignkit.training.run import load_rows
from alignkit_kernels import NoiseKey, PairRegionErrors, Stream, losses, pair_region_errors


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


@torch.no_grad()
def score_pairs(
    config: Config, model, store: PairStore, policy: nn.Module, reference: nn.Module, title: str, device: torch.device
) -> PairScores:
    """Compare `policy` with `reference` on every pair of `store`, with noise keyed by (seed, pair id, draw)."""
    evaluation, predict = config.evaluation, family_module(model.family).predict
    schedule = model.schedule(config.sample.num_inference_steps)
    rows = [int(position * len(schedule)) for position in evaluation.positions]
    chunks = [
        list(range(first, min(first + evaluation.batch_size, len(store))))
        for first in range(0, len(store), evaluation.batch_size)
    ]
    collected: list[dict[str, Tensor]] = []
    with progress(title, len(rows) * evaluation.draws * len(store)) as bar:
        for position, row in enumerate(rows):
            for draw in range(evaluation.draws):
                for chunk in chunks:
                    batch = load_rows(store, chunk, device)
                    count = len(batch)
                    key = NoiseKey(evaluation.seed, batch.ids, position * evaluation.draws + draw, Stream.EVALUATION)
                    states = evaluation_states(
                        model,
                        batch,
                        schedule.coefficients[row].expand(count, 4),
                        schedule.timesteps[row].expand(count),
                        key,
                        model.dtype,
                    )
                    inputs = (states.inputs, states.timesteps, states.text)
                    pred_w, pred_l = predict(policy, *inputs).chunk(2)
                    ref_w, ref_l = predict(reference, *inputs).chunk(2)
                    errors = pair_region_errors(
                        pred_w,
                        pred_l,
                        batch.winner,
                        batch.loser,
                        states.coefficients,
                        key,
                        reference_w=ref_w,
                        reference_l=ref_l,
                        regions=batch.mask,
                        num_regions=2,
                    )
                    collected.append(_per_pair(errors, config.objective.largest_beta))
                    bar.advance(count)
    shape = (len(rows), evaluation.draws, len(store))
    return PairScores(
        noise_levels=[schedule.coefficients[row, 1].item() for row in rows],
        **{name: torch.cat([part[name] for part in collected]).cpu().reshape(shape) for name in collected[0]},
    )


def _per_pair(errors: PairRegionErrors, beta: float) -> dict[str, Tensor]:
    assert errors.gap_w is not None and errors.gap_l is not None
    means = losses.pair_means(errors.error_w, errors.error_l, errors.gap_w, errors.gap_l, errors.count)
    return {
        "region_logit": losses.logits_of(means.region_gap_w, means.region_gap_l, beta),
        "global_logit": losses.logits_of(means.gap_w, means.gap_l, beta),
        "error_w": means.error_w,
        "error_l": means.error_l,
        "reference_error_w": means.error_w - means.gap_w,
        "reference_error_l": means.error_l - means.gap_l,
    }


def describe(scores: PairScores) -> dict:
    """Means over everything, and by noise level, ready for JSON."""

    def part(index) -> dict:
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
