"""Bytes and FLOPs of a network at its real sizes, counted on the meta device: every tensor that autograd and the
operations make, with its size and the time it lives, and no numbers.

Blocks are all alike, so networks of one, two and three blocks say what the whole takes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from alignkit.config import Config
from alignkit.models import family_module
from alignkit.models.folder import STRIDE, TILE
from alignkit.planning.outline import Outline

MODES = ("none", "selective", "full")
"""What is kept of a forward for its backward: all; each block's input and the outputs of its attention; the input."""


@dataclass(frozen=True)
class Linear:
    """What grows by `block` with every block above one."""

    one: float
    block: float

    def of(self, layers: int) -> float:
        return self.one + (layers - 1) * self.block


class Forward:
    """FLOPs of one forward over one video: of matrix products, and of attention's own two."""

    def __init__(self, products: Linear, attention: Linear, layers: int):
        self.products, self.attention = products.of(layers), attention.of(layers)

    @property
    def flops(self) -> float:
        return self.products + self.attention


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made inside and that are still there, and the most there were at once."""

    def __init__(self, known: list[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """What every fused attention keeps: queries, keys, values, the result and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Partitioned(torch.autograd.Function):
    """A linear layer as ZeRO-3 has it: it keeps its input also where its weight is frozen."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        result = inputs.matmul(weight.t())
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        trained = weight.requires_grad
        flat = gradient.flatten(0, -2)
        by_weight = flat.t().matmul(inputs.flatten(0, -2)) if trained else None
        return gradient.matmul(weight), by_weight, flat.sum(0) if trained and ctx.needs_input_grad[2] else None


@dataclass
class Attended:
    """Of all attention inside: FLOPs of its forward, and bytes of what it gives and would have to be kept of it."""

    flops: int = 0
    kept: int = 0


@contextmanager
def fused_attention() -> Iterator[Attended]:
    """On the meta device torch's own attention would be the unfused one, with a score for every pair of tokens."""
    seen = Attended()

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = query[..., 0].numel()
        seen.flops += 4 * rows * key.shape[-2] * query.shape[-1]
        seen.kept += query.numel() * query.element_size() + 4 * rows
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield seen


def forward_of(outline: Outline, config: Config, dtype: torch.dtype) -> Forward:
    """FLOPs of the network for one video."""
    key = "flops", dtype, config.data, config.model.max_sequence_length
    if key not in outline.counted:
        outline.counted[key] = _forward_of(outline, config, dtype)
    found: Forward = outline.counted[key]
    return found


def _forward_of(outline: Outline, config: Config, dtype: torch.dtype) -> Forward:
    products, attention = [], []
    for layers in (1, 2):
        network = outline.network(layers, dtype).requires_grad_(False)
        with fused_attention() as seen, FlopCounterMode(display=False) as counter, torch.no_grad():
            _predict(outline, config, network, dtype, videos=1)
        products.append(counter.get_total_flops())
        attention.append(seen.flops)
    parts = [Linear(one, two - one) for one, two in (products, attention)]
    return Forward(parts[0], parts[1], outline.layers)


def activation_bytes(outline: Outline, config: Config, dtype: torch.dtype, mode: str, videos: int, stage: int) -> float:
    """Most bytes that forward and backward over `videos` at once hold beside weights and gradients, by what is kept.

    mode: one of MODES. stage: of ZeRO.
    """
    if mode == "selective":
        base = activation_bytes(outline, config, dtype, "full", videos, stage)
        return base + _kept_of_attention(outline, config, dtype, videos)
    key = (dtype, mode, videos, stage, config.train.lora, config.data, config.model.max_sequence_length)
    if key not in outline.counted:
        # from two on: what the first block alone makes is there in both
        two, three = (_peak(outline, config, dtype, mode == "full", videos, stage, layers) for layers in (2, 3))
        outline.counted[key] = Linear(two, three - two).of(outline.layers - 1)
    return outline.counted[key]


def forward_bytes(outline: Outline, config: Config, dtype: torch.dtype, videos: int) -> float:
    """Most bytes that a forward over `videos` at once holds beside weights, without a backward pass."""
    key = "forward", dtype, videos, config.data, config.model.max_sequence_length
    if key not in outline.counted:
        network: Any = outline.network(2, dtype)  # the second block's are as the first's, and are gone by the third
        known = [*network.parameters(), *network.buffers()]
        with torch.no_grad(), fused_attention(), Live(known) as live:
            _predict(outline, config, network, dtype, videos)
        outline.counted[key] = live.peak
    return outline.counted[key]


def video_bytes(outline: Outline, config: Config) -> float:
    """Most bytes that the VAE, in fp32, holds beside its weights to encode one video or decode its latents."""
    data = config.data
    key = "video", data.num_frames, data.height, data.width, config.model.vae_tiling
    if key not in outline.counted:
        sizes = data.height, data.width
        if config.model.vae_tiling and max(sizes) > TILE:
            piece = _coded(outline, data.num_frames, min(data.height, TILE), min(data.width, TILE))
            pixel = 3 * 4 * data.num_frames
            rows, columns = (sum(min(TILE, size - start) for start in range(0, size, STRIDE)) for size in sizes)
            # the last tile beside the others; then all of them, the rows they are put into, their sum and a copy of it
            outline.counted[key] = pixel * rows * columns + max(piece, 3 * pixel * data.height * data.width)
        else:
            outline.counted[key] = _coded(outline, data.num_frames, *sizes)
    return outline.counted[key]


def _coded(outline: Outline, num_frames: int, height: int, width: int) -> int:
    with torch.device("meta"):
        video = torch.empty(1, 3, num_frames, height, width)
    vae = outline.autoencoder
    known = [*vae.parameters(), *vae.buffers(), video]
    with torch.no_grad(), fused_attention(), Live(known) as encoding:
        latents = vae.encode(video).latent_dist.mode()
    with torch.no_grad(), fused_attention(), Live([*known, latents]) as decoding:
        vae.decode(latents)
    return max(encoding.peak, decoding.peak)


def _kept_of_attention(outline: Outline, config: Config, dtype: torch.dtype, videos: int) -> float:
    key = "attention", dtype, videos, config.data, config.model.max_sequence_length
    if key not in outline.counted:
        kept = []
        for layers in (1, 2):
            with fused_attention() as seen, torch.no_grad():
                _predict(outline, config, outline.network(layers, dtype), dtype, videos)
            kept.append(seen.kept)
        outline.counted[key] = Linear(kept[0], kept[1] - kept[0]).of(outline.layers)
    return outline.counted[key]


def _peak(
    outline: Outline, config: Config, dtype: torch.dtype, checkpointing: bool, videos: int, stage: int, layers: int
) -> int:
    network: Any = outline.network(layers, dtype, config.train.lora)
    if checkpointing:
        network.enable_gradient_checkpointing()
    for parameter in network.parameters():
        if parameter.requires_grad:  # DeepSpeed takes each gradient away as soon as it is there
            parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    linear = _Partitioned.apply if stage == 3 else functional.linear

    def apply_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(inputs, weight, bias)

    known = [*network.parameters(), *network.buffers()]
    with mock.patch.object(functional, "linear", apply_linear), fused_attention(), Live(known) as live:
        _predict(outline, config, network, dtype, videos).float().sum().backward()
    return live.peak


def _predict(outline: Outline, config: Config, network: nn.Module, dtype: torch.dtype, videos: int) -> Tensor:
    data, length = config.data, config.model.max_sequence_length
    shape = outline.model.latent_shape(data.num_frames, data.height, data.width)
    with torch.device("meta"):
        state = torch.empty(videos, *shape, dtype=dtype)
        text = torch.empty(videos, length, outline.text_width, dtype=dtype)
        timesteps = torch.empty(videos)
    return family_module(config.model.family).predict(network, state, timesteps, text)
