"""Training of the tiny transformers: predict y = c·ε + d·x0 from x_t = a·x0 + s·ε, whatever the family's path.

Rectified flow (arXiv 2209.03003, 2210.02747) for Wan2.1, v-prediction (arXiv 2202.00512) for CogVideoX: the
coefficients and the network's call are those of `alignkit.models`, which training and sampling use too.
"""

from pathlib import Path

import numpy as np
import torch
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
    held_out: int,
    seed: int,
) -> nn.Module:
    """Train on path points drawn by the recipe's law, with one caption in ten left empty.

    Args:
        latents: normalised, float32 [N, C, F', h, w]; the last ``held_out`` are not trained on.
        combinations: int64 [N], each clip's row in ``bank``.
        bank: by text length, caption embeddings [wordings, combinations, length, D] and the empty prompt's
            [length, D].
        autocast: forward and backward in bfloat16 where torch's autocast holds it safe.
    """
    torch.manual_seed(seed)
    model = recipe.new_transformer()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = Muon(matrices, others, matrix_rate=peak_rate, other_rate=0.1 * peak_rate)
    ema = Ema(model, ema_decay)
    running = RunningLog("transformer", steps)
    latents = recipe.to_network(latents)
    trained = len(latents) - held_out
    for step in train_steps("transformer", folder, model, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        generator = torch_generator(rng)
        rows = torch.from_numpy(rng.integers(trained, size=batch))
        wordings = torch.from_numpy(rng.choice(len(WORDINGS), size=batch, p=WORDING_SHARES))
        dropped = torch.from_numpy(rng.random(batch) < EMPTY_SHARE)
        captions, empty = bank[int(rng.choice(recipe.TEXT_LENGTHS, p=recipe.TEXT_LENGTH_SHARES))]
        text = torch.where(dropped[:, None, None], empty, captions[wordings, combinations[rows]])
        noise = torch.randn(latents[rows].shape, generator=generator)
        optimizer.scale_rates(schedule(step, steps, hold=hold))
        points = _path_points(recipe, batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = squared_error(recipe, model, latents[rows], noise, points, text)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.add(step, loss=loss.item(), gradient=norm.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            probe = recipe.new_transformer()
            probe.load_state_dict(ema.values)
            captions, _ = bank[recipe.TEXT_LENGTHS[0]]
            errors = held_out_errors(recipe, probe, latents[trained:], captions[0, combinations[trained:]])
            listed = "  ".join(f"{u:.3f}: {e:.4f}" for u, e in zip(recipe.HELD_OUT_POINTS, errors, strict=True))
            log.info("transformer: held-out error, averaged weights: %s  mean %.4f", listed, np.mean(errors))
    model.load_state_dict(ema.values)
    return model.eval()


def _path_points(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """u in [0, 1] by the recipe's law, float32 [count]."""
    if recipe.PATH_POINTS == "root_uniform":
        return torch.rand(count, generator=generator).sqrt()
    return torch.sigmoid(torch.randn(count, generator=generator))


def squared_error(recipe: Recipe, model: nn.Module, clean: Tensor, noise: Tensor, u: Tensor, text: Tensor) -> Tensor:
    """Mean of (prediction − y)² at path points u [B], for latents and noise in the network's layout [B, ...]."""
    adapter = recipe.ADAPTER("", text.shape[1], recipe.new_scheduler(), None, None)
    coefficients, timesteps = adapter.training_path(u.double())
    a, s, c, d = coefficients.float().T.reshape(4, -1, 1, 1, 1, 1)
    predict = family_module(adapter.family).predict
    out = predict(model, a * clean + s * noise, timesteps.float(), text)
    return (out - (c * noise + d * clean)).square().mean()


@torch.no_grad()
def held_out_errors(recipe: Recipe, model: nn.Module, latents: Tensor, text: Tensor) -> list[float]:
    """Mean squared error at each of the recipe's HELD_OUT_POINTS, always with the same noise."""
    generator = torch.Generator().manual_seed(1234)
    errors = []
    for u in recipe.HELD_OUT_POINTS:
        noise = torch.randn(latents.shape, generator=generator)
        errors.append(squared_error(recipe, model, latents, noise, torch.full((len(latents),), u), text).item())
    return errors
