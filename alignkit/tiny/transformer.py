"""Training of the tiny transformers: predict y = c·ε + d·x0 from x_t = a·x0 + s·ε, whatever the family's path.

Rectified flow (arXiv 2209.03003, 2210.02747) for Wan2.1, v-prediction (arXiv 2202.00512) for CogVideoX: the
coefficients and the network's call are those of `alignkit.models`, which training and sampling use too.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from alignkit.models import family_module
from alignkit.tiny.muon import Muon
from alignkit.tiny.recipes import Recipe
from alignkit.tiny.stages import Ema, RunningLog, log, schedule, step_rng, torch_generator, train_steps
from alignkit.tiny.text import WORDINGS

STAGE = 3
EMPTY_SHARE = 0.1
WORDING_SHARES = (0.8, 0.05, 0.05, 0.05, 0.05)


def train_transformer(
    recipe: Recipe,
    latents: Tensor,
    combinations: Tensor,
    bank: dict[int, tuple[Tensor, Tensor]],
    folder: Path,
    *,
    steps: int,
    batch: int,
    peak_rate: float,
    hold: float,
    ema_decay: float,
    autocast: bool,
    contrast_weight: float,
    blind: float,
    held_out: int,
    seed: int,
    start: ModelMixin | None = None,
    stage: str = "transformer",
) -> ModelMixin:
    """Train on path points drawn by the recipe's law, with one caption in ten left empty.

    The tiny CogVideoX never read in 14000 steps of single clips whether its text said circle or square: the two
    differ in their corners alone, of which the noisy clip tells enough. Versions of a clip, the same but for the
    shape, mend that: first it sees their mean and only the text says which of them is asked for, then them.

    Args:
        latents: normalised, float32 [N, V, C, F', h, w]; the last ``held_out`` of N are not trained on.
        combinations: int64 [N, V], each version's row in ``bank``.
        batch: clips a step, all versions counted.
        contrast_weight: of the part of the error in which versions differ; without effect at V = 1.
        blind: share of the steps, the first ones, in which the network sees the mean of a clip's versions.
        bank: by text length, caption embeddings [wordings, combinations, length, D] and the empty prompt's
            [length, D].
        autocast: forward and backward in bfloat16 where torch's autocast holds it safe.
        start: what to train on, instead of an untrained network.
        stage: the name of the stage in the log and of its checkpoint.
    """
    torch.manual_seed(seed)
    model = start or recipe.new_transformer()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = Muon(matrices, others, matrix_rate=peak_rate, other_rate=0.1 * peak_rate)
    ema = Ema(model, ema_decay)
    running = RunningLog(stage, steps)
    trained, versions = len(latents) - held_out, latents.shape[1]
    latents = recipe.to_network(latents.flatten(0, 1)).unflatten(0, (-1, versions))
    batch //= versions
    for step in train_steps(stage, folder, model, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        generator = torch_generator(rng)
        rows = torch.from_numpy(rng.integers(trained, size=batch))
        wordings = torch.from_numpy(rng.choice(len(WORDINGS), size=batch, p=WORDING_SHARES))
        dropped = torch.from_numpy(rng.random(batch) < EMPTY_SHARE)
        captions, empty = bank[int(rng.choice(recipe.TEXT_LENGTHS, p=recipe.TEXT_LENGTH_SHARES))]
        text = torch.where(dropped[:, None, None, None], empty, captions[wordings[:, None], combinations[rows]])
        clean = latents[rows]
        seen = clean.mean(dim=1, keepdim=True).expand_as(clean) if step < blind * steps else clean
        noise = torch.randn(clean[:, :1].shape, generator=generator).expand_as(clean)
        optimizer.scale_rates(schedule(step, steps, hold=hold))
        points = _path_points(recipe, batch, generator).repeat_interleave(versions)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            flat = (part.flatten(0, 1) for part in (clean, noise, text, seen))
            error = prediction_error(recipe, model, points, *flat).unflatten(0, (-1, versions))
            loss = contrasted(error, contrast_weight)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.add(step, loss=loss.item(), gradient=norm.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            probe = recipe.new_transformer()
            probe.load_state_dict(ema.values)
            captions, _ = bank[recipe.TEXT_LENGTHS[0]]
            shown = torch.arange(trained, len(latents)), torch.arange(held_out) % versions
            errors = held_out_errors(recipe, probe, latents[shown], captions[0, combinations[shown]])
            listed = "  ".join(f"{u:.3f}: {e:.4f}" for u, e in zip(recipe.HELD_OUT_POINTS, errors, strict=True))
            log.info("%s: held-out error, averaged weights: %s  mean %.4f", stage, listed, np.mean(errors))
    model.load_state_dict(ema.values)
    return model.eval()


def _path_points(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """u in [0, 1] by the recipe's law, float32 [count]."""
    if recipe.PATH_POINTS == "root_uniform":
        return torch.rand(count, generator=generator).sqrt()
    return torch.sigmoid(torch.randn(count, generator=generator))


def contrasted(error: Tensor, weight: float) -> Tensor:
    """Mean square of errors [B, V, ...]: that of the mean over versions, plus ``weight`` times that of the rest."""
    common = error.mean(dim=1, keepdim=True)
    return common.square().mean() + weight * (error - common).square().mean()


def prediction_error(
    recipe: Recipe, model: nn.Module, u: Tensor, clean: Tensor, noise: Tensor, text: Tensor, seen: Tensor
) -> Tensor:
    """prediction − y at path points u [B], for latents and noise in the network's layout [B, ...]; of their shape.

    y is that of ``clean``; what the network is shown under the noise is ``seen``.
    """
    adapter = recipe.ADAPTER("", text.shape[1], recipe.new_scheduler())
    coefficients, timesteps = adapter.training_path(u.double())
    a, s, c, d = coefficients.float().T.reshape(4, -1, 1, 1, 1, 1)
    predict = family_module(adapter.family).predict
    out = predict(model, a * seen + s * noise, timesteps.float(), text)
    return out - (c * noise + d * clean)


@torch.no_grad()
def held_out_errors(recipe: Recipe, model: nn.Module, latents: Tensor, text: Tensor) -> list[float]:
    """Mean squared error at each of the recipe's HELD_OUT_POINTS, always with the same noise."""
    generator = torch.Generator().manual_seed(1234)
    errors = []
    for u in recipe.HELD_OUT_POINTS:
        noise = torch.randn(latents.shape, generator=generator)
        points = torch.full((len(latents),), u)
        errors.append(prediction_error(recipe, model, points, latents, noise, text, latents).square().mean().item())
    return errors
