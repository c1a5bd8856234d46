"""A group-relative policy gradient on the same rollouts and ranker, to compare preferences with.

GRPO (arXiv 2402.03300) with the denoising error in the likelihood's place, as Flow Policy Optimization has it
(arXiv 2507.21053): a video's ratio is exp(β/2 · (error of the model that sampled it − error of the policy)) at one
keyed point and noise, clipped as in PPO; its advantage is its score minus its prompt's mean, over their deviation. β
scales errors as it does in DPO. Each step has as many videos, and as many forwards, as the other arms' steps.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import VideoModel, family_module, load_model
from alignkit.objectives.laws import Law, start_law
from alignkit.rankers.measures import small_world_score
from alignkit.stores.rollouts import Rollout, RolloutStore
from alignkit.training.export import export, export_folder
from alignkit.training.order import global_batch
from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, region_errors

CLIP = 0.2  # PPO's
SCORED_AT_ONCE = 64


def train_group_relative(config: Config, store: Path) -> None:
    """Train the base on the rollouts beside `store`, all of a prompt's together, and export it; on one process."""
    if export_folder(config).is_dir():
        return
    rollouts = RolloutStore(store.parent / "rollouts" / "rollouts")
    model = load_model(config.model)
    groups, advantages = _groups(model, rollouts)
    base, policy = model.transformer, copy.deepcopy(model.transformer).requires_grad_(True).train()
    train, law = config.train, start_law(config, model)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    size, beta = len(groups[0]), config.objective.beta
    if isinstance(beta, str):
        raise ConfigError("objective.beta: 'auto' is for preferences; give the group-relative arm a number")
    for step in range(train.steps):
        visits = global_batch(len(groups), train.seed, step, 2 * train.global_batch_size // size)
        optimizer.zero_grad()
        for row, epoch in visits:
            with torch.no_grad():
                before = _errors(config, model, base, law, groups[row], row, epoch)
            after = _errors(config, model, policy, law, groups[row], row, epoch)
            loss = group_relative_loss(after, before, advantages[row], beta)
            (loss / len(visits)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train.max_grad_norm)
        optimizer.step()
    weights = {name: value.detach().float().cpu() for name, value in policy.named_parameters()}
    export(model, weights, export_folder(config))


def group_relative_loss(after: Tensor, before: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """The clipped surrogate of one group: mean errors of its videos by the policy and by the model that sampled them,
    fp64 [K] each, and their advantages, [K]."""
    ratio = torch.exp(beta / 2 * (before - after))
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def _groups(model: VideoModel, rollouts: RolloutStore) -> tuple[list[list[Rollout]], list[Tensor]]:
    """The rollouts of each prompt whose scores differ, and their advantages."""
    by_prompt: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    flat = [rollout for group in by_prompt.values() for rollout in group]
    scores = []
    for first in range(0, len(flat), SCORED_AT_ONCE):
        some = flat[first : first + SCORED_AT_ONCE]
        frames = model.decode_video(torch.stack([rollout.latents for rollout in some]))
        scores.append(small_world_score([rollout.prompt for rollout in some], frames))
    by_group = torch.from_numpy(np.concatenate(scores)).view(len(by_prompt), -1)
    spread = by_group.std(dim=1, correction=0)
    advantages = (by_group - by_group.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6)[:, None]
    kept = [i for i in range(len(by_prompt)) if spread[i] > 1e-6]
    groups = list(by_prompt.values())
    return [groups[i] for i in kept], [advantages[i] for i in kept]


def _errors(
    config: Config, model: VideoModel, network: torch.nn.Module, law: Law, group: list[Rollout], row: int, epoch: int
) -> Tensor:
    """Mean errors of a group's videos, fp64 [K], at one point and with one noise, the group's in this epoch."""
    numbers, epochs = torch.full((len(group),), row), torch.full((len(group),), epoch)
    points = law.draw(numbers, epochs)
    key = NoiseKey(config.train.seed, numbers, epochs, Stream.TRAINING)
    clean = torch.stack([rollout.latents for rollout in group])
    text = model.pad_text(model.encode_text([rollout.prompt for rollout in group]))
    state = add_keyed_noise(clean, points.coefficients, key)
    predicted = family_module(model.family).predict(network, state, points.timesteps.float(), text)
    sums = region_errors(predicted, clean, points.coefficients, key)
    return (sums.error / sums.count).sum(dim=1)
