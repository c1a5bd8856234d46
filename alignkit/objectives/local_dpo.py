"""LocalDPO as a training objective: a pair batch in, the loss and its diagnostics out (arXiv 2601.04068)."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.data.pairs import PairBatch
from alignkit.models import family_module
from alignkit_kernels import LocalDPOLoss, NoiseKey, Stream, add_keyed_noise, keyed_rand, keyed_randn, local_dpo_loss

SATURATED = 6.0  # |logit| from which σ(−z) is below 0.25 % or above 99.75 %: the pair no longer teaches


@dataclass(frozen=True)
class States:
    """What the network is shown for a pair batch: both videos stacked, winners first.

    states: [2B, ...]; timesteps: fp32 [2B]; text: [2B, L, D]; coefficients: fp64 [B, 4]; position: fp64 [B],
    the noise level as a share (s of the path), for diagnostics.
    """

    states: Tensor
    timesteps: Tensor
    text: Tensor
    coefficients: Tensor
    noise: NoiseKey


def draw_path_points(config: Config, model, ids: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor]:
    """Where on the path each pair is compared: coefficients fp64 [B, 4] and network timesteps fp64 [B].

    A function of (seed, pair id, epoch) alone, by `noise.timesteps`: "logit_normal" (the sigmoid of a normal)
    and "uniform" are moved by the model's own path (for Wan its flow shift); "schedule" draws one of the
    sampler's steps.
    """
    key = NoiseKey(config.train.seed, ids, epochs, Stream.TIMESTEP)
    shape = (len(ids), 1)
    if config.noise.timesteps == "schedule":
        schedule = model.schedule(config.sample.num_inference_steps)
        u = keyed_rand(shape, key, device="cpu", dtype=torch.float64)[:, 0]
        rows = (u * len(schedule)).long().clamp(max=len(schedule) - 1)
        return schedule.coefficients[rows], schedule.timesteps[rows]
    if config.noise.timesteps == "uniform":
        return model.training_path(keyed_rand(shape, key, device="cpu", dtype=torch.float64)[:, 0])
    normal = keyed_randn(shape, key, device="cpu", dtype=torch.float64)[:, 0]
    return model.training_path(torch.sigmoid(normal))


def make_states(
    model, batch: PairBatch, coefficients: Tensor, timesteps: Tensor, noise: NoiseKey, dtype: torch.dtype
) -> States:
    """Noise both videos of each pair with the pair's own noise (by its id) at the pair's own point of the path."""
    device = batch.winner.device
    coefficients = coefficients.to(device)
    states = torch.cat([add_keyed_noise(clean, coefficients, noise) for clean in (batch.winner, batch.loser)])
    text = model.pad_text(batch.text).to(device, dtype)
    return States(
        states=states.to(dtype),
        timesteps=timesteps.to(device, torch.float32).repeat(2),
        text=text.repeat(2, 1, 1),
        coefficients=coefficients,
        noise=noise,
    )


def training_states(
    config: Config, model, batch: PairBatch, epochs: Tensor, empty_text: Tensor, dtype: torch.dtype
) -> States:
    """`make_states` at the points, with the noise and the captions that training visits in `epochs` (int64 [B]).

    A share `train.caption_dropout` of pairs is shown with `empty_text` [tokens, D], winner and loser together:
    a function of (seed, pair id, epoch).
    """
    key = NoiseKey(config.train.seed, batch.ids, epochs, Stream.CAPTION_DROPOUT)
    dropped = keyed_rand((len(batch), 1), key, device="cpu", dtype=torch.float64)[:, 0] < config.train.caption_dropout
    text = [empty_text if drop else own for own, drop in zip(batch.text, dropped.tolist(), strict=True)]
    batch = dataclasses.replace(batch, text=text)
    coefficients, timesteps = draw_path_points(config, model, batch.ids, epochs)
    noise = NoiseKey(config.train.seed, batch.ids, epochs, Stream.TRAINING)
    return make_states(model, batch, coefficients, timesteps, noise, dtype)


def local_dpo(
    config: Config, model, policy: nn.Module, reference: nn.Module, batch: PairBatch, states: States
) -> LocalDPOLoss:
    """One forward of each network over winners and losers together, then the fused loss."""
    predict = family_module(model.family).predict
    inputs = (states.states, states.timesteps, states.text)
    with torch.no_grad():
        ref_w, ref_l = predict(reference, *inputs).chunk(2)
    pred_w, pred_l = predict(policy, *inputs).chunk(2)
    objective = config.objective
    return local_dpo_loss(
        pred_w,
        pred_l,
        ref_w,
        ref_l,
        batch.winner,
        batch.loser,
        states.coefficients,
        states.noise,
        regions=batch.mask,
        strength=batch.strength.to(batch.winner.device),
        beta=objective.beta,
        strength_range=objective.strength_range,
        weight_region=objective.weight_region,
        weight_global=objective.weight_global,
        weight_sft=objective.weight_sft,
        weight_region_sft=objective.weight_region_sft,
    )


def diagnostics(config: Config, result: LocalDPOLoss, states: States) -> dict[str, Tensor]:
    """Per-pair numbers, fp64 [B], whose means over the global batch are logged.

    rewards/* carry TRL's names for the global term: chosen and rejected are −β/2 · gap of each side, margins
    their difference (the logit), accuracies counts a tie as half. gradient_factor is σ(−z), by which a pair's
    gradient is scaled: 0.5 at the start, towards 0 where the pair is learnt. Gaps are policy − reference.
    """
    region, whole = result.logits_region.detach(), result.logits_global.detach()
    gap_w, gap_l = result.gap_w.detach(), result.gap_l.detach()
    half_beta = config.objective.beta / 2
    return {
        "loss": result.loss_per_pair.detach(),
        "rewards/chosen": -half_beta * gap_w,
        "rewards/rejected": -half_beta * gap_l,
        "rewards/margins": whole,
        "rewards/accuracies": accuracy(whole),
        "global/gap_w": gap_w,
        "global/gap_l": gap_l,
        "global/gradient_factor": torch.sigmoid(-whole),
        "region/accuracy": accuracy(region),
        "region/logit": region,
        "region/gap_w": result.region_gap_w.detach(),
        "region/gap_l": result.region_gap_l.detach(),
        "region/gradient_factor": torch.sigmoid(-region),
        "region/saturated": (region.abs() > SATURATED).double(),
        "region_empty": result.region_empty.double(),
        "error_w": result.error_w.detach(),
        "error_l": result.error_l.detach(),
        "noise_level": states.coefficients[:, 1].double(),
    }


def accuracy(logits: Tensor) -> Tensor:
    """1 where the winner is preferred, 0 where the loser is, ½ for a tie; fp64 [B]."""
    return (logits > 0).double() + 0.5 * (logits == 0).double()
