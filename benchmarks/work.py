"""The work that is timed: the same numbers and the same gradients from the same inputs, by every provider."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch._functorch.config
from torch import Tensor

from alignkit_kernels import NoiseKey, keyed_randn, pair_region_errors, region_errors

# latents [C, F, H, W] or [F, C, H, W], and the axis that the mask shares
SHAPES = {
    "Wan 480p 81 frames": ((16, 21, 60, 104), 0),
    "Wan 720p 81 frames": ((16, 21, 90, 160), 0),
    "CogVideoX 480p 49 frames": ((13, 16, 60, 90), 1),
    "small": ((8, 5, 12, 12), 0),
}
# gradients are taken many times from one forward pass, so its buffers must outlive the first
torch._functorch.config.donated_buffer = False
SIDES = {"region_errors": 1, "pair_region_errors": 2}


@dataclass
class Inputs:
    """Both sides of `batch` pairs; a single op uses the winner's."""

    pred: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    noise: Tensor
    key: NoiseKey  # words on the host: one copy
    device_key: NoiseKey  # words on the device, which torch.compile fuses
    rows: Tensor
    regions: Tensor


def make_inputs(shape_name: str, batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    shape, axis = SHAPES[shape_name]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn((batch, *shape), generator=generator, device=device)

    sigma = 0.1 + 0.8 * torch.rand(batch, generator=generator, device=device)
    key = NoiseKey(7, torch.arange(batch) + 1000 * seed, 0)
    noise = keyed_randn((batch, *shape), key, device=device)
    clean = normal(), normal()
    reference = tuple(noise - x + normal(0.3) for x in clean)
    label_shape = [1 if i == axis else size for i, size in enumerate(shape)]
    regions = (torch.rand((batch, *label_shape), generator=generator, device=device) < 0.1).to(torch.uint8)
    return Inputs(
        tuple((x + normal(0.03)).to(dtype).requires_grad_() for x in reference),
        tuple(x.to(dtype) for x in reference), tuple(x.to(dtype) for x in clean), noise.to(dtype), key,
        replace(key, sample_ids=key.sample_ids.to(device)),
        torch.stack((1 - sigma, sigma, torch.ones_like(sigma), -torch.ones_like(sigma)), 1), regions,
    )  # fmt: skip


def stored_noise(x: Inputs, regenerated: bool) -> Tensor:
    """For providers that cannot regenerate: generate, store, read."""
    if not regenerated:
        return x.noise
    key = x.device_key if torch.compiler.is_compiling() else x.key
    return keyed_randn(x.noise.shape, key, device=x.noise.device, dtype=x.noise.dtype)


def terms(x: Inputs, sides: int, noise: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What is summed over each region, as one would write it: error and gap of each side, and their cross term."""
    c, d = (x.rows[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (2, 3))
    found, residuals = [], []
    for i in range(sides):
        p, r = x.pred[i].to(dtype), x.reference[i].to(dtype)
        target = c * noise.to(dtype) + d * x.clean[i].to(dtype)
        residuals.append(p - target)
        found += [residuals[i] ** 2, (p - r) * (p + r - 2 * target)]
    return [*found, residuals[0] * residuals[1]] if sides == 2 else found


def by_region(term: Tensor, regions: Tensor) -> Tensor:
    """Sums outside and inside the mask, [B, 2]."""
    inside = regions.to(term.dtype)
    return torch.stack([(term * mask).flatten(1).sum(1) for mask in (1 - inside, inside)], 1)


def eager(x: Inputs, sides: int, regenerated: bool, dtype: torch.dtype) -> list[Tensor]:
    noise = stored_noise(x, regenerated)
    return [by_region(term, x.regions) for term in terms(x, sides, noise, dtype)]


def fused(x: Inputs, sides: int, noise: Tensor | NoiseKey) -> list[Tensor]:
    if sides == 1:
        got = region_errors(
            x.pred[0], x.clean[0], x.rows, noise, reference=x.reference[0], regions=x.regions, num_regions=2
        )
        return [got.error, got.gap]
    got = pair_region_errors(
        *x.pred, *x.clean, x.rows, noise,
        reference_w=x.reference[0], reference_l=x.reference[1], regions=x.regions, num_regions=2,
    )  # fmt: skip
    return [got.error_w, got.gap_w, got.error_l, got.gap_l, got.cross]


def providers(op: str, regenerated: bool) -> dict[str, Callable[[Inputs], list[Tensor]]]:
    sides = SIDES[op]
    torch.compiler.reset()  # one compile a case, as in a training run; otherwise dynamo gives up after eight
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    found = {
        "alignkit": lambda x: fused(x, sides, x.key if regenerated else x.noise),
        "eager fp32": lambda x: eager(x, sides, regenerated, torch.float32),
        "eager bf16": lambda x: eager(x, sides, regenerated, torch.bfloat16),
        "torch.compile": lambda x: compiled(x, sides, regenerated, torch.float32),
    }
    if regenerated:
        found["alignkit, noise stored"] = lambda x: fused(x, sides, stored_noise(x, True))
    return found


def backward_of(numbers: list[Tensor], x: Inputs, op: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call that finds the gradients of all numbers by the predictions."""
    ones = [torch.ones_like(number) for number in numbers]
    return lambda: torch.autograd.grad(numbers, x.pred[: SIDES[op]], ones, retain_graph=True)


def exact(x: Inputs, op: str, regenerated: bool) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """fp64, on the same inputs: the numbers, the sums of their terms' magnitudes, and the gradients."""
    noise = keyed_randn(x.noise.shape, x.key, device=x.noise.device) if regenerated else x.noise
    summands = terms(x, SIDES[op], noise, torch.float64)
    numbers = [by_region(term, x.regions) for term in summands]
    magnitudes = [by_region(term.detach().abs(), x.regions) for term in summands]
    return [number.detach() for number in numbers], magnitudes, backward_of(numbers, x, op)()


def traffic(x: Inputs, op: str, regenerated: bool) -> int:
    """Bytes that must move: every input once, the gradients once. Forward and backward happen to be equal."""
    latents = 3 * SIDES[op] + (not regenerated)  # prediction, reference and clean; or prediction, clean and gradient
    return latents * x.noise.numel() * x.noise.element_size() + x.regions.numel()
