"""Bytes on each GPU and in the main memory, by part."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from alignkit.config import Config
from alignkit.models import family_module
from alignkit.planning.constants import FILLED, GPUS_A_NODE, PROCESS, RESERVED, Gpu
from alignkit.planning.counting import activation_bytes, forward_bytes, video_bytes
from alignkit.planning.outline import Outline
from alignkit.planning.regime import Regime

MASTER = 4  # fp32
MOMENTS = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}
"""Both of Adam's; of 8 bits with bitsandbytes' fp32 scale of each block of 256."""
SECOND = ("copy", "ema", "sync")
"""References that are a second network."""


def said(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


@dataclass(frozen=True)
class Memory:
    """gpu: bytes on each of them. host: bytes of the fullest machine. Both by part."""

    gpu: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.gpu.values())

    def fits(self, gpu: Gpu) -> bool:
        return self.total <= FILLED * gpu.memory


@dataclass(frozen=True)
class Parameters:
    """all: of the network, adapters included. trained: those that an optimizer has. blocks: of one repeated block.
    largest: of the one tensor that has most."""

    all: int
    trained: int
    block: int
    largest: int


def parameters(outline: Outline, config: Config, dtype: torch.dtype) -> Parameters:
    key = "parameters", dtype, config.train.lora
    if key not in outline.counted:
        outline.counted[key] = _parameters(outline, config, dtype)
    found: Parameters = outline.counted[key]
    return found


def _parameters(outline: Outline, config: Config, dtype: torch.dtype) -> Parameters:
    one, two = (outline.network(layers, dtype, config.train.lora) for layers in (1, 2))
    sizes = [[(p.numel(), p.requires_grad) for p in network.parameters()] for network in (one, two)]
    whole, trained = (
        [sum(size for size, learns in part if learns or not only) for part in sizes] for only in (False, True)
    )
    more = outline.layers - 1
    return Parameters(
        all=whole[0] + more * (whole[1] - whole[0]),
        trained=trained[0] + more * (trained[1] - trained[0]),
        block=whole[1] - whole[0],
        largest=max(size for size, _ in sizes[0]),
    )


def memory(outline: Outline, config: Config, run: Regime, count: Parameters) -> Memory:
    """Of training."""
    states = _states(config, run, count)
    gpu: dict[str, float] = {}
    host: dict[str, float] = {}
    for part, (size, offloaded) in states.items():
        (host if offloaded else gpu)[part] = size
    whole = activation_bytes(outline, config, run.dtype, run.checkpointing, run.kept_videos, run.stage)
    if run.context > 1:
        first = _first_input(outline, config, run, run.kept_videos)
        whole = first + (whole - first) / run.context
    gpu["activations"] = whole
    gpu["buffers"] = _buffers(run, count)
    gpu["latents, predictions, loss"] = _of_the_loss(outline, config, run)
    gpu["CUDA, NCCL"] = RESERVED
    processes = min(run.gpus, GPUS_A_NODE)
    machine = {part: size * processes for part, size in host.items()}
    machine["processes"] = PROCESS * processes
    # on the first machine: fp32 weights gathered for the export; a run begins with one tensor at a time
    machine["export"] = MASTER * max(count.trained, count.largest)
    return Memory({part: size for part, size in gpu.items() if size}, machine)


def _states(config: Config, run: Regime, count: Parameters) -> dict[str, tuple[float, bool]]:
    """What a process keeps from step to step, and whether in the main memory."""
    weights = run.width * count.all / run.shared(3)
    mixed = run.width < MASTER
    states = {
        "weights": (weights, run.offload_weights),
        "gradients": (run.gradient * count.trained / run.shared(2), run.offload_optimizer),
        # in fp32 ZeRO keeps a flat copy of what each process updates
        "fp32 masters" if mixed else "flat copy": (MASTER * count.trained / run.shared(1), run.offload_optimizer),
        "Adam's moments": (MOMENTS[config.train.optimizer] * count.trained / run.shared(1), run.offload_optimizer),
    }
    if run.offload_optimizer:  # once where they are added up and once where the optimizer reads them
        size = (run.gradient + MASTER) * count.trained / run.shared(2)
        states["gradients"] = (size, True)
    if config.train.ema:
        states["average (train.ema)"] = (MASTER * count.trained / run.shared(1), run.offload_optimizer)
    if run.reference in SECOND:
        moved = MASTER * count.trained / run.gpus if run.reference == "ema" and mixed else 0
        states[f"reference ({run.reference})"] = (weights + moved, run.offload_weights)
    if run.teacher:
        states["teacher"] = (weights, run.offload_weights)
    return states


def _first_input(outline: Outline, config: Config, run: Regime, videos: int) -> float:
    """What goes into the first block, which each GPU has the whole of before it takes its tokens. Of a text that is not
    split there is more, of hundreds of tokens beside tens of thousands: not counted."""
    data = config.data
    network: Any = outline.network(1, run.dtype).config
    grid = outline.model.latent_grid(data.num_frames, data.height, data.width)
    lengths = family_module(config.model.family).split_lengths(network, grid, config.model.max_sequence_length)
    width = network.num_attention_heads * network.attention_head_dim
    return run.width * videos * sum(lengths.values()) * width


def _buffers(run: Regime, count: Parameters) -> float:
    """What DeepSpeed reduces at once, a buffer made whole however small the network is; and under ZeRO-3 the parameters
    of each network that are gathered at once, for use and ahead of it."""
    bucket = run.width * run.buckets["reduce_bucket_size"] if run.stage in (2, 3) else 0.0
    if run.stage < 3 or (run.gpus == 1 and not run.offload_weights):  # a partition that is the whole is used as it is
        return bucket
    networks = 1 + (run.reference in SECOND) + run.teacher
    live = run.buckets["stage3_max_live_parameters"] + run.buckets["stage3_prefetch_bucket_size"]
    return bucket + networks * run.width * min(count.all, max(live, count.block))


def _of_the_loss(outline: Outline, config: Config, run: Regime) -> float:
    """Latents in fp32; states, predictions of both networks and the gradient of the policy's in the network's dtype.
    Noise is drawn inside the kernels, numbers by region are a few."""
    data = config.data
    elements = run.videos * prod(outline.model.latent_shape(data.num_frames, data.height, data.width))
    return elements * (4 + run.width * (4 if run.reference else 3))


def pairs_memory(outline: Outline, config: Config, count: Parameters, run: Regime) -> dict[str, float]:
    """On a GPU that builds pairs: the network, or both experts, VAE and text encoder in fp32, and the most that one of
    them holds at work, the network of `pairs.batch_size` videos, the VAE of one; without operations' own workspaces."""
    pairs, video = config.pairs, video_bytes(outline, config)
    branches = family_module(config.model.family).GUIDED_AT_ONCE if pairs.guidance_scale > 1 else 1
    first = _first_input(outline, config, run, pairs.batch_size * branches)
    forward = forward_bytes(outline, config, run.dtype, pairs.batch_size * branches)
    forward = first + (forward - first) / pairs.context_parallel
    working = "a forward" if forward > video else "a video in the VAE" + ", in tiles" * config.model.vae_tiling
    return {
        "network" if outline.networks == 1 else "both experts": run.width * count.all * outline.networks,
        "text encoder, fp32": 4.0 * outline.text,
        "VAE, fp32": 4.0 * outline.vae,
        working: max(forward, video),
        "CUDA": RESERVED,
    }
