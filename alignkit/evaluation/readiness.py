"""Whether an alignment on these videos can be judged at all: said before anything slow starts, and again at the end."""

import torch
from torch import Tensor

from alignkit.models import VideoModel, family_module
from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, keyed_randn

FEWEST_HELDOUT = 16
LEAST_EXPLAINED = 0.5
CLIPS = 8  # as many are looked at
POSITIONS = (0.3, 0.5, 0.7, 0.9)
STEPS = 50
SEED = 0


@torch.no_grad()
def explained_share(model: VideoModel, latents: Tensor, text: Tensor) -> float:
    """How much better than a blind guess `model` denoises these videos: 1 − error / error of the best linear guess.

    latents: normalised, in the family's layout, [B, ...]; text: as the network takes it, [B, tokens, D].

    Of white latents of variance v the best linear guess of y = c·ε + d·x0 from x_t = a·x0 + s·ε leaves
    v·(a·c − s·d)² / (a²·v + s²); a network that knows such videos leaves a small part of that, one that does not about
    all of it. Mean over clips and POSITIONS of the schedule.
    """
    schedule, device = model.schedule(STEPS), text.device
    latents = latents.to(device, torch.float32)
    variance = latents.double().flatten(1).square().mean(1).cpu()
    shares = []
    for number, position in enumerate(POSITIONS):
        row = int(position * STEPS)
        coefficients = schedule.coefficients[row].expand(len(latents), 4).to(device)
        key = NoiseKey(SEED, torch.arange(len(latents)), number, Stream.EVALUATION)
        state = add_keyed_noise(latents, coefficients, key).to(model.dtype)
        timesteps = schedule.timesteps[row].expand(len(latents)).to(device, torch.float32)
        clips = zip(state.split(1), timesteps.split(1), text.split(1), strict=True)  # one at a time, as pairs are made
        out = torch.cat([family_module(model.family).predict(model.transformer, *clip) for clip in clips]).float()
        a, s, c, d = schedule.coefficients[row].double().tolist()
        noise = keyed_randn(tuple(latents.shape), key, device=device)
        error = (out - (c * noise + d * latents)).double().flatten(1).square().mean(1).cpu()
        shares.append(1 - error * (a * a * variance + s * s) / (variance * (a * c - s * d) ** 2))
    return torch.stack(shares).mean().item()


def too_few(heldout: int) -> str | None:
    """Why so many held-out clips are too few for a verdict, and what to do; None if they are enough."""
    if heldout >= FEWEST_HELDOUT:
        return None
    clips = "one clip is" if heldout == 1 else f"{heldout} clips are"
    return (
        f"{clips} held out, and a verdict needs {FEWEST_HELDOUT}: bring more videos or raise data.heldout "
        f"(the share that is held out)"
    )


def cannot_draw(share: float, path: str) -> str | None:
    """Why this base is no base for these videos, and what to do; None if it is one."""
    if share >= LEAST_EXPLAINED:
        return None
    return (
        f"the base model ({path}) cannot draw these videos: it denoises them {max(share, 0):.0%} better than a blind "
        f"guess ({LEAST_EXPLAINED:.0%} wanted); set model.path (and model.family) to a model that can"
    )
