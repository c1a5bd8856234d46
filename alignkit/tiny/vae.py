"""Training of the tiny video autoencoders, and the latents they make of the clips."""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn

from alignkit.tiny.clips import SHAPES, render_clip
from alignkit.tiny.muon import Muon
from alignkit.tiny.recipes import Recipe
from alignkit.tiny.stages import Ema, RunningLog, schedule, step_rng, torch_generator, train_steps

STAGE = 1


def to_unit(frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """float [B, 3, F, H, W] in [-1, 1] to uint8 [B, F, H, W, 3]."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().numpy()


def train_vae(
    recipe: Recipe,
    clips: np.ndarray,
    folder: Path,
    *,
    steps: int,
    peak_rate: float,
    kl_weight: float,
    late_kl_weight: float,
    autocast: bool,
    seed: int,
) -> ModelMixin:
    """Train on uint8 clips [N, F, H, W, 3]; returns the autoencoder with its averaged weights.

    ``late_kl_weight`` holds in the second half: the first half's weight empties a channel or two. ``autocast``: in
    bfloat16, three times as fast on a processor that has it and some twenty times as slow on one that has not.
    """
    torch.manual_seed(seed)
    vae = recipe.new_vae()
    if autocast:
        channels_last(vae)
    optimizer = _optimizer(vae, peak_rate)
    ema = Ema(vae, 0.998)
    running = RunningLog("vae", steps)
    for step in train_steps("vae", folder, vae, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        generator = torch_generator(rng)
        video = _batch(clips, rng, generator, recipe.VAE_BATCHES[step % len(recipe.VAE_BATCHES)])
        optimizer.scale_rates(schedule(step, steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            posterior = vae.encode(video).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            out = recipe.decode_unclamped(vae, mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = _picture_loss(out, video) + (kl_weight if 2 * step < steps else late_kl_weight) * kl
        _descend(vae, optimizer, loss)
        running.add(step, loss=loss.item(), psnr=_psnr(out, video), kl=kl.item())
    vae.load_state_dict(ema.values)
    return vae.eval()


def polish_decoder(
    recipe: Recipe,
    vae: ModelMixin,
    clips: np.ndarray,
    latents: torch.Tensor,
    folder: Path,
    *,
    steps: int,
    peak_rate: float,
    autocast: bool,
    seed: int,
) -> ModelMixin:
    """Train the decoder alone on whole clips, from their normalised latents with a little noise added.

    The encoder, and with it everything that is trained on latents, stays as it is. Whole clips remove the
    traces that a moving shape leaves in the later chunks; the noise makes up for generated latents.
    """
    vae.requires_grad_(False)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder.requires_grad_(True)
    optimizer = _optimizer(decoder, peak_rate)
    ema = Ema(decoder, 0.995)
    running = RunningLog("decoder", steps)
    for step in train_steps("decoder", folder, decoder, optimizer, ema, steps):
        rng = step_rng(seed, STAGE + 10, step)
        generator = torch_generator(rng)
        rows = np.sort(rng.choice(len(clips), size=4, replace=False))
        clean = latents[torch.from_numpy(rows)]
        amount = 0.15 * torch.rand(len(rows), 1, 1, 1, 1, generator=generator)
        noisy = clean + amount * torch.randn(clean.shape, generator=generator)
        video = to_unit(clips[rows])
        optimizer.scale_rates(schedule(step, steps, warmup=30))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = recipe.decode_unclamped(vae, recipe.denormalise(vae, noisy)).float()
        loss = _picture_loss(out, video)
        _descend(decoder, optimizer, loss)
        running.add(step, loss=loss.item(), psnr=_psnr(out, video))
    decoder.load_state_dict(ema.values)
    return vae.eval()


def _optimizer(model: nn.Module, peak_rate: float) -> Muon:
    ends = ("encoder.conv_in.", "decoder.conv_out.")
    named = list(model.named_parameters())
    matrices = [p for name, p in named if name.endswith("weight") and p.ndim > 1 and not name.startswith(ends)]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return Muon(matrices, others, matrix_rate=peak_rate, other_rate=0.1 * peak_rate)


def _picture_loss(out: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    error = out - video
    # Most pixels are grey: without weight on the coloured ones, colour is learned last.
    weight = 1 + 3 * (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)) / 2
    tint = error - error.mean(1, keepdim=True)
    pixel = (weight * (error.abs() + 2 * error.square() + 2 * tint.abs())).mean()
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return pixel + 0.5 * edge


def _psnr(out: torch.Tensor, video: torch.Tensor) -> float:
    # 4 is the square of the range [-1, 1].
    return (10 * torch.log10(4 / (out.detach() - video).square().mean())).item()


def _descend(model: nn.Module, optimizer: Muon, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def channels_last(vae: ModelMixin) -> None:
    """Convolutions in channels-last order: three times faster in bfloat16 on a processor."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def encode_clips(vae: ModelMixin, clips: np.ndarray, batch: int = 16) -> torch.Tensor:
    """uint8 [N, F, H, W, 3] to the latents' means, float32 [N, 8, F', H/4, W/4], not normalised."""
    return torch.cat([vae.encode(to_unit(clips[i : i + batch])).latent_dist.mean for i in range(0, len(clips), batch)])


@torch.no_grad()
def decode_latents(vae: ModelMixin, latents: torch.Tensor, batch: int = 16) -> np.ndarray:
    """Latents that are not normalised, [N, 8, F', h, w], to uint8 clips [N, F, H, W, 3]."""
    return np.concatenate([to_uint8(vae.decode(latents[i : i + batch]).sample) for i in range(0, len(latents), batch)])


@torch.no_grad()
def posterior_variance(vae: ModelMixin, clips: np.ndarray) -> torch.Tensor:
    """Mean variance of the encoder's posterior by channel, [8], over uint8 clips [N, F, H, W, 3]."""
    return vae.encode(to_unit(clips)).latent_dist.var.mean(dim=(0, 2, 3, 4))


@torch.no_grad()
def shape_contrast(vae: ModelMixin, seed: int, count: int = 64) -> torch.Tensor:
    """Second moments [C, C] of how latents change when a clip's shape is another and all else stays; float64."""
    latents = [
        encode_clips(vae, np.stack([render_clip(seed, index, shape).frames for index in range(count)]))
        for shape in SHAPES
    ]
    changes = torch.cat([one - other for one, other in combinations(latents, 2)])
    flat = changes.double().movedim(1, 0).flatten(1)
    return flat @ flat.T / flat.shape[1]


def _batch(
    clips: np.ndarray, rng: np.random.Generator, generator: torch.Generator, shape: tuple[int, int, int]
) -> torch.Tensor:
    """Random clips, cut, flipped and reversed; one in ten gets other colours and a second clip mixed in.

    The last keeps the VAE useful for pictures that are no moving shapes.
    """
    count, frames, size = shape
    total, height, width = clips.shape[1:4]
    cut = []
    for index in rng.integers(len(clips), size=count):
        first = rng.integers(total - frames + 1)
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        clip = clips[index, first : first + frames, top : top + size, left : left + size]
        flips = rng.integers(2, size=3)
        for axis in range(3):
            if flips[axis]:
                clip = np.flip(clip, axis)
        cut.append(clip)
    video = to_unit(np.stack(cut))
    odd = torch.from_numpy(rng.random(count) < 0.1).view(-1, 1, 1, 1, 1)
    blend = torch.rand(count, 1, 1, 1, 1, generator=generator) * 0.6
    turn = torch.randn(count, 3, 3, generator=generator) * 0.4
    mixed = torch.einsum("bij,bjfhw->bifhw", turn, (1 - blend) * video + blend * video.flip(0))
    return torch.where(odd, mixed.clamp(-1, 1), video)
