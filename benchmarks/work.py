"""The work that is timed: the same numbers from the same inputs, by every provider."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit_kernels import NoiseKey, keyed_randn, pair_region_errors, region_errors

# latents [C, F, H, W] or [F, C, H, W], and the axis that the mask shares
SHAPES = {
    "Wan 480p 81 frames": ((16, 21, 60, 104), 0),
    "Wan 720p 81 frames": ((16, 21, 90, 160), 0),
    "CogVideoX 480p 49 frames": ((13, 16, 60, 90), 1),
    "small": ((8, 5, 12, 12), 0),
}


@dataclass
class Inputs:
    """Both sides of `batch` pairs; a single op uses the winner's."""

    pred: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    noise: Tensor
    key: NoiseKey
    rows: Tensor
    regions: Tensor


def make_inputs(shape_name: str, batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    shape, axis = SHAPES[shape_name]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn((batch, *shape), generator=generator, device=device)

    sigma = 0.1 + 0.8 * torch.rand(batch, generator=generator, device=device)
    key = NoiseKey(
        torch.full((1,), seed, device=device), torch.arange(batch, device=device), torch.zeros(1, device=device).long()
    )
    noise = keyed_randn((batch, *shape), key, device=device)
    clean = normal(), normal()
    reference = tuple(noise - x + normal(0.3) for x in clean)
    label_shape = [1 if i == axis else size for i, size in enumerate(shape)]
    regions = (torch.rand((batch, *label_shape), generator=generator, device=device) < 0.1).to(torch.uint8)
    return Inputs(
        tuple((x + normal(0.03)).to(dtype).requires_grad_() for x in reference),
        tuple(x.to(dtype) for x in reference), tuple(x.to(dtype) for x in clean), noise.to(dtype), key,
        torch.stack((1 - sigma, sigma, torch.ones_like(sigma), -torch.ones_like(sigma)), 1), regions,
    )  # fmt: skip


def noise_of(x: Inputs, regenerated: bool) -> Tensor:
    """For providers that cannot regenerate: generate, store, read."""
    return keyed_randn(x.noise.shape, x.key, dtype=x.noise.dtype) if regenerated else x.noise


def eager_side(pred: Tensor, reference: Tensor, clean: Tensor, noise: Tensor, x: Inputs, dtype: torch.dtype) -> Tensor:
    """error and gap by region [4, B], as one would write it."""
    c, d = (x.rows[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (2, 3))
    p, r = pred.to(dtype), reference.to(dtype)
    target = c * noise.to(dtype) + d * clean.to(dtype)
    error, gap = (p - target) ** 2, (p - r) * (p + r - 2 * target)
    inside = x.regions.to(dtype)
    return torch.stack([(t * m).flatten(1).sum(1) for t in (error, gap) for m in (1 - inside, inside)])


def eager(x: Inputs, op: str, regenerated: bool, dtype: torch.dtype) -> Tensor:
    noise, sides = noise_of(x, regenerated), range(2 if op == "pair_region_errors" else 1)
    numbers = [eager_side(x.pred[i], x.reference[i], x.clean[i], noise, x, dtype) for i in sides]
    return torch.cat(numbers)


def fused(x: Inputs, op: str, noise: Tensor | NoiseKey) -> Tensor:
    if op == "region_errors":
        got = region_errors(
            x.pred[0], x.clean[0], x.rows, noise, reference=x.reference[0], regions=x.regions, num_regions=2
        )
        return torch.cat((got.error.T, got.gap.T))
    got = pair_region_errors(
        *x.pred, *x.clean, x.rows, noise,
        reference_w=x.reference[0], reference_l=x.reference[1], regions=x.regions, num_regions=2,
    )  # fmt: skip
    return torch.cat((got.error_w.T, got.gap_w.T, got.error_l.T, got.gap_l.T))


def providers(op: str, regenerated: bool, gpu: bool) -> dict[str, Callable[[Inputs], Tensor]]:
    found = {
        "alignkit": lambda x: fused(x, op, x.key if regenerated else x.noise),
        "eager fp32": lambda x: eager(x, op, regenerated, torch.float32),
        "eager bf16": lambda x: eager(x, op, regenerated, torch.bfloat16),
    }
    if regenerated:
        found["alignkit, noise stored"] = lambda x: fused(x, op, noise_of(x, True))
    if gpu:
        compiled = torch.compile(eager)
        found["torch.compile"] = lambda x: compiled(x, op, regenerated, torch.float32)
    return found


def traffic(x: Inputs, op: str, regenerated: bool, direction: str) -> int:
    """Bytes that must move: every input once, the gradients once."""
    sides = 2 if op == "pair_region_errors" else 1
    latent = x.noise.numel() * x.noise.element_size()
    latents = sides * (3 if direction == "forward" else 2) + (0 if regenerated else 1)
    if direction == "backward":
        latents += sides
    return latents * latent + x.regions.numel()


def exact(x: Inputs, op: str, regenerated: bool) -> Tensor:
    """The fp64 answer on the same inputs; keyed noise is fp32, stored noise has the inputs' dtype."""
    noise = keyed_randn(x.noise.shape, x.key) if regenerated else x.noise
    sides = range(2 if op == "pair_region_errors" else 1)
    return torch.cat([eager_side(x.pred[i], x.reference[i], x.clean[i], noise, x, torch.float64) for i in sides])
