"""The work that is timed: the same numbers and the same gradients from the same inputs, by every provider.

A piece of work is `Work`: what each provider computes of some inputs, the exact answer, and the bytes that must move.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.functional import softplus

from alignkit_kernels import (
    NoiseKey,
    NoiseSource,
    PathState,
    add_keyed_noise,
    keyed_randn,
    pair_region_errors,
    preference_loss,
    region_errors,
)

# latents [C, F, H, W] or [F, C, H, W], and the axis that the mask shares
SHAPES = {
    "Wan 480p 81 frames": ((16, 21, 60, 104), 0),
    "Wan 720p 81 frames": ((16, 21, 90, 160), 0),
    "CogVideoX 480p 49 frames": ((13, 16, 60, 90), 1),
    "small": ((8, 5, 12, 12), 0),
}
# gradients are taken many times from one forward pass, so its buffers must outlive the first
torch._functorch.config.donated_buffer = False
BETA, ETA, WEIGHT_SFT = 50.0, 0.5, 0.1
STRENGTH = 0.75 + 0.15 * ETA


@dataclass
class Inputs:
    """Both sides of `batch` pairs; a single op uses the winner's."""

    pred: tuple[Tensor, Tensor]
    stacked: Tensor  # the predictions again, winners first, as a network gives them
    reference: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    noise: Tensor
    key: NoiseKey  # words on the host: one copy
    device_key: NoiseKey  # words on the device: no copy
    other_key: NoiseKey
    states: tuple[PathState, PathState]
    rows: Tensor
    regions: Tensor


Outputs = tuple[list[Tensor], tuple[Tensor, ...]]  # numbers, and the tensors whose gradients are wanted
Provider = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Work:
    """providers: by name; numbers, and what to differentiate them by (nothing: there is no backward).
    exact: the numbers in fp64, the magnitudes that their errors are measured in, and what to differentiate by.
    traffic: bytes that must move forward, and backward."""

    providers: dict[str, Provider]
    exact: Callable[[Inputs], tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]]
    traffic: Callable[[Inputs], tuple[int, int]]


def make_inputs(shape_name: str, batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    shape, axis = SHAPES[shape_name]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn((batch, *shape), generator=generator, device=device)

    sigma = 0.1 + 0.8 * torch.rand(batch, generator=generator, device=device)
    key = NoiseKey(7, torch.arange(batch) + 1000 * seed, 0)
    device_key = replace(key, sample_ids=key.sample_ids.to(device), seed=torch.tensor([7], device=device))
    noise = keyed_randn((batch, *shape), key, device=device)
    clean = tuple(normal().to(dtype) for _ in range(2))
    reference = tuple((noise - x + normal(0.3)).to(dtype) for x in clean)
    pred = tuple((x + normal(0.03)).to(dtype) for x in reference)
    label_shape = [1 if i == axis else size for i, size in enumerate(shape)]
    regions = (torch.rand((batch, *label_shape), generator=generator, device=device) < 0.1).to(torch.uint8)
    columns = [x.view(-1, 1, 1, 1, 1) for x in (1 - sigma, sigma)]
    states = tuple(PathState(columns[0] * x.float() + columns[1] * noise) for x in clean)
    return Inputs(
        tuple(x.clone().requires_grad_() for x in pred), torch.cat(pred).requires_grad_(), reference, clean,
        noise.to(dtype), key, device_key, replace(key, sample_ids=key.sample_ids + 500), states,
        torch.stack((1 - sigma, sigma, torch.ones_like(sigma), -torch.ones_like(sigma)), 1), regions,
    )  # fmt: skip


# Noise, as each kind of source has it: what our ops take for each side, and the tensors that others must have.
SOURCES: dict[str, Callable[[Inputs], tuple[NoiseSource, NoiseSource | None]]] = {
    "given": lambda x: (x.noise, None),
    "keyed": lambda x: (x.key, None),
    "keyed on the device": lambda x: (x.device_key, None),
    "two keys": lambda x: (x.key, x.other_key),
    "path": lambda x: x.states,
}


def stored(x: Inputs, source: NoiseSource | None, side: int, dtype: torch.dtype) -> Tensor:
    """The noise of a side as a tensor: generated and stored where it is keyed, for providers that cannot regenerate."""
    if isinstance(source, Tensor):
        return source
    if isinstance(source, PathState):
        a, s = (x.rows[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
        return (source.state.to(dtype) - a * x.clean[side].to(dtype)) / s
    key = x.device_key if torch.compiler.is_compiling() and source is x.key else source
    return keyed_randn(x.noise.shape, key, device=x.noise.device, dtype=torch.promote_types(x.noise.dtype, dtype))


def noises(x: Inputs, source: str, sides: int, dtype: torch.dtype) -> list[Tensor]:
    first, second = SOURCES[source](x)
    found = [stored(x, first, 0, dtype)]
    if sides == 2:
        found.append(found[0] if second is None else stored(x, second, 1, dtype))
    return found


def terms(x: Inputs, source: str, sides: int, dtype: torch.dtype) -> list[Tensor]:
    """What is summed over each region, as one would write it: error and gap of each side, and their cross term."""
    c, d = (x.rows[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (2, 3))
    found, residuals = [], []
    for i, noise in enumerate(noises(x, source, sides, dtype)):
        p, r = x.pred[i].to(dtype), x.reference[i].to(dtype)
        target = c * noise.to(dtype) + d * x.clean[i].to(dtype)
        residuals.append(p - target)
        found += [residuals[i] ** 2, (p - r) * (p + r - 2 * target)]
    return [*found, residuals[0] * residuals[1]] if sides == 2 else found


def by_region(term: Tensor, regions: Tensor) -> Tensor:
    """Sums outside and inside the mask, [B, 2]."""
    inside = regions.to(term.dtype)
    return torch.stack([(term * mask).flatten(1).sum(1) for mask in (1 - inside, inside)], 1)


def eager_errors(x: Inputs, source: str, sides: int, dtype: torch.dtype) -> list[Tensor]:
    return [by_region(term, x.regions) for term in terms(x, source, sides, dtype)]


def fused_errors(x: Inputs, source: str, sides: int) -> list[Tensor]:
    first, second = SOURCES[source](x)
    if sides == 1:
        got = region_errors(
            x.pred[0], x.clean[0], x.rows, first, reference=x.reference[0], regions=x.regions, num_regions=2
        )
        return [got.error, got.gap]
    got = pair_region_errors(
        *x.pred, *x.clean, x.rows, first, second,
        reference_w=x.reference[0], reference_l=x.reference[1], regions=x.regions, num_regions=2,
    )  # fmt: skip
    return [got.error_w, got.gap_w, got.error_l, got.gap_l, got.cross]


def eager_loss(x: Inputs, source: str, dtype: torch.dtype) -> list[Tensor]:
    """LocalDPO's loss as one would write it, from the network's stacked predictions."""
    c, d = (x.rows[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (2, 3))
    mask = x.regions.to(dtype)
    gaps, inside, axes = [], [], (1, 2, 3, 4)
    elements = mask.sum(axes) * (x.noise[0].numel() // mask[0].numel())
    for i, (pred, noise) in enumerate(zip(x.stacked.chunk(2), noises(x, source, 2, dtype), strict=True)):
        target = c * noise.to(dtype) + d * x.clean[i].to(dtype)
        squared = (pred.to(dtype) - target) ** 2
        difference = squared - (x.reference[i].to(dtype) - target) ** 2
        gaps.append(difference.mean(axes))
        inside.append((difference * mask).sum(axes) / elements)
        if i == 0:
            error_w = squared.mean(axes)
    z, z_region = (-0.5 * BETA * (w - l) for w, l in (gaps, inside))
    return [(softplus(-(1 + ETA) * z_region) + softplus(-z) + WEIGHT_SFT * error_w).mean()]


def fused_loss(x: Inputs, source: str) -> list[Tensor]:
    first, second = SOURCES[source](x)
    strength = torch.full((len(x.rows),), STRENGTH, dtype=torch.float64)
    got = preference_loss(
        x.stacked, clean_w=x.clean[0], clean_l=x.clean[1], coefficients=x.rows, noise_w=first, noise_l=second,
        reference_w=x.reference[0], reference_l=x.reference[1], regions=x.regions, strength=strength, beta=BETA,
        weight_sft=WEIGHT_SFT,
    )  # fmt: skip
    return [got.loss]


def compiled(function: Callable) -> Callable:
    torch.compiler.reset()  # one compile a case, as in a training run; otherwise dynamo gives up after eight
    return torch.compile(function, fullgraph=True, dynamic=False)


def errors_work(source: str, sides: int) -> Work:
    def given(function: Callable, *args) -> Provider:
        return lambda x: (function(x, source, sides, *args), x.pred[:sides])

    def exact(x: Inputs):
        summands = terms(x, source, sides, torch.float64)
        numbers = [by_region(term, x.regions) for term in summands]
        magnitudes = [by_region(term.detach().abs(), x.regions) for term in summands]
        return numbers, magnitudes, x.pred[:sides]

    found = {
        "alignkit": given(fused_errors), "eager fp32": given(eager_errors, torch.float32),
        "eager bf16": given(eager_errors, torch.bfloat16),
        "torch.compile": given(compiled(eager_errors), torch.float32),
    }  # fmt: skip
    return Work(found, exact, partial(traffic, source=source, sides=sides))


def loss_work(source: str) -> Work:
    def given(function: Callable, *args) -> Provider:
        return lambda x: (function(x, source, *args), (x.stacked,))

    def exact(x: Inputs):
        numbers = eager_loss(x, source, torch.float64)
        return numbers, [x.detach().abs() for x in numbers], (x.stacked,)

    found = {
        "alignkit": given(fused_loss), "eager fp32": given(eager_loss, torch.float32),
        "eager bf16": given(eager_loss, torch.bfloat16), "torch.compile": given(compiled(eager_loss), torch.float32),
    }  # fmt: skip
    return Work(found, exact, partial(traffic, source=source, sides=2))


def noise_work(op: str) -> Work:
    """What has no gradient: writing noise, and latents with noise added. torch.randn draws other numbers, and is timed
    as what one would call instead."""

    def ours(x: Inputs) -> Outputs:
        if op == "keyed_randn":
            return [keyed_randn(x.noise.shape, x.device_key, dtype=x.noise.dtype)], ()
        return [add_keyed_noise(x.clean[0], x.rows, x.device_key)], ()

    def torchs(x: Inputs) -> Outputs:
        noise = torch.randn(x.noise.shape, device=x.noise.device, dtype=x.noise.dtype)
        if op == "keyed_randn":
            return [noise], ()
        a, s = (x.rows[:, i].to(noise.dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
        return [a * x.clean[0] + s * noise], ()

    def exact(x: Inputs):
        noise = keyed_randn(x.noise.shape, x.key, device=x.noise.device).double()
        if op != "keyed_randn":
            a, s = (x.rows[:, i].double().view(-1, 1, 1, 1, 1) for i in (0, 1))
            noise = a * x.clean[0].double() + s * noise
        return [noise], [noise.abs().max().expand_as(noise)], ()

    written = 1 if op == "keyed_randn" else 2
    return Work({"alignkit": ours, "torch.randn": torchs}, exact,
                lambda x: (written * x.noise.numel() * x.noise.element_size(), 0))  # fmt: skip


def traffic(x: Inputs, source: str, sides: int) -> tuple[int, int]:
    """Bytes that must move: forward every input once; backward prediction, clean latent and gradient, noise again."""
    latent = x.noise.numel() * x.noise.element_size()
    noise = {"given": latent, "path": 2 * x.noise.numel() * 4 if sides == 2 else x.noise.numel() * 4}.get(source, 0)
    return (3 * sides * latent + noise + x.regions.numel(),) * 2


WORK: dict[str, Callable[[], Work]] = {
    **{f"{name}, {source}": partial(errors_work, source, sides)
       for name, sides, sources in (("region_errors", 1, ("given", "keyed", "path")),
                                    ("pair_region_errors", 2, ("given", "keyed", "two keys", "path")))
       for source in sources},
    **{f"local_dpo_loss, {source}": partial(loss_work, source)
       for source in ("given", "keyed", "keyed on the device", "path")},
    "keyed_randn": partial(noise_work, "keyed_randn"),
    "add_keyed_noise": partial(noise_work, "add_keyed_noise"),
}  # fmt: skip
