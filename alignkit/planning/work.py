"""FLOPs, seconds and bytes on disk: of a step, of a pair that is built, of a run."""

from dataclasses import dataclass
from math import prod

from alignkit.config import Config
from alignkit.planning.constants import (
    ADAM_TRAFFIC,
    ATTENTION_BACKWARD,
    EFFICIENCY,
    GPUS_A_NODE,
    HOST_MEMORY,
    Gpu,
)
from alignkit.planning.counting import Forward
from alignkit.planning.memory import MASTER, MOMENTS, Parameters
from alignkit.planning.outline import Outline
from alignkit.planning.regime import Regime

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "auto": 2}
COMPUTED = ("copy", "adapter", "ema", "sync")
"""References whose forward is part of a step."""


@dataclass(frozen=True)
class Step:
    """flops: of all GPUs, by part. seconds: computing. moving: seconds more that offloading takes at least."""

    flops: dict[str, float]
    seconds: float
    moving: float

    @property
    def time(self) -> float:
        return self.seconds + self.moving


def step_work(config: Config, run: Regime, count: Parameters, forward: Forward, gpu: Gpu) -> Step:
    videos = config.train.global_batch_size * (run.videos // config.train.micro_batch_size)
    trained = count.trained == count.all
    # through frozen weights a gradient goes on to what is before them, and nothing is computed for them
    backward = (2 if trained else 1) * forward.products + ATTENTION_BACKWARD * forward.attention
    again = {"none": 0.0, "selective": forward.products, "full": forward.flops}[run.checkpointing]
    flops = {"forward": videos * forward.flops, "backward": videos * backward, "recomputing": videos * again}
    if run.apart:
        flops["forward of both sides"] = videos * forward.flops
    if run.reference in COMPUTED:
        flops["reference"] = videos * forward.flops
    if run.teacher:
        flops["teacher"] = videos / 2 * forward.flops
    flops = {part: size for part, size in flops.items() if size}
    return Step(flops, seconds(sum(flops.values()), gpu, run, run.gpus), _moving(run, count, gpu))


def seconds(flops: float, gpu: Gpu, run: Regime, gpus: int = 1) -> float:
    return flops / (gpus * EFFICIENCY * (gpu.fp32 if run.width == 4 else gpu.peak))


def _moving(run: Regime, count: Parameters, gpu: Gpu) -> float:
    """Weights come to the GPUs twice for each micro-batch of each network, each process its part; gradients go back
    once; then the machine's processor updates its share of the weights."""
    passes = 2 + (1 if run.reference in COMPUTED else 0)
    each = run.width * count.all / run.gpus / gpu.host
    moved = run.accumulation * passes * each if run.offload_weights else 0.0
    if run.offload_optimizer:
        nodes = max(1, run.gpus // GPUS_A_NODE)
        moved += run.accumulation * run.width * count.trained / run.gpus / gpu.host
        moved += ADAM_TRAFFIC * count.trained / nodes / HOST_MEMORY
    return moved


def pair_flops(config: Config, forward: Forward) -> float:
    """Of a pair whose loser is the winner with regions regenerated: the last steps of the sampler, mean of the
    strengths."""
    pairs = config.pairs
    branches = 2 if pairs.guidance_scale > 1 else 1
    return sum(pairs.strengths) / len(pairs.strengths) * branches * forward.flops


def rollout_flops(config: Config, forward: Forward) -> float:
    sampler = config.sampler
    return sampler.num_steps * (2 if sampler.guidance > 1 else 1) * forward.flops


def cache_flops(config: Config, forward: Forward) -> float:
    """Of the reference's errors at every visit of a run."""
    return 2 * config.train.steps * config.train.global_batch_size * forward.flops


def latents(outline: Outline, config: Config) -> int:
    """Numbers of one video."""
    data = config.data
    return prod(outline.model.latent_shape(data.num_frames, data.height, data.width))


def pair_bytes(outline: Outline, config: Config) -> float:
    """On disk, at most: a winner, a loser that is another everywhere, a text of full length, a mask."""
    data = config.data
    wide = DTYPE_BYTES[config.pairs.dtype]
    if config.pairs.dtype == "auto" and (config.model.dtype == "fp32" or config.noise.source != "shared"):
        wide = 4
    grid = prod(outline.model.latent_grid(data.num_frames, data.height, data.width))
    text = config.model.max_sequence_length * outline.text_width
    return wide * (2 * latents(outline, config) + text) + grid


def checkpoint_bytes(config: Config, run: Regime, count: Parameters) -> float:
    """Masters, moments and the average; below ZeRO-3 the weights that are trained too."""
    average = 4 * count.trained if config.train.ema else 0
    moving = 4 * count.trained if run.reference == "ema" and run.width < 4 else 0
    moving += run.width * count.trained if run.reference in ("ema", "sync") else 0
    kept = (MASTER + MOMENTS[config.train.optimizer]) * count.trained + average
    return kept + (run.width * count.trained if run.stage < 3 else 0) + moving


def export_bytes(outline: Outline, config: Config, count: Parameters) -> float:
    """A diffusers folder in fp32, its VAE, text encoder and other expert as they are (counted in fp32); or the
    adapters. Twice with an average beside it."""
    whole = outline.networks * count.all + outline.vae + outline.text
    one = 4 * (count.trained if config.train.lora else whole)
    return 2 * one if config.train.ema else one
