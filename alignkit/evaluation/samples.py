"""`alignkit sample`: videos from the base and from the aligned model, with the same prompts and the same noise."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from alignkit.config import Config, Sampler
from alignkit.errors import DataError
from alignkit.files import write_lines
from alignkit.media.videos import PLAYBACK_FPS, VideoSpec, decode_clip, write_video
from alignkit.models import load_model, working_dtype
from alignkit.progress import progress, say
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.export import aligned_section
from alignkit_kernels import NoiseKey, Stream, keyed_randn

MODELS = ("base", "aligned")
MAPS = "maps.npz"
"""In the samples' folder: where the judge sees faults, uint8 [count, 5, 12, 12] of each model, 255: certain."""


def samples_folder(config: Config) -> Path:
    return config.output.dir / "samples"


def heldout_prompts(config: Config) -> list[str]:
    """`sample.count` prompts from the held-out pairs, in order and repeated as often as needed."""
    store = PairStore(pairs_folder(config, "heldout"))
    prompts = list(dict.fromkeys(store.rows["prompt"]))
    return [prompts[i % len(prompts)] for i in range(config.sample.count)]


def sample(config: Config, device: torch.device) -> Path:
    """Sample every prompt with every seed from both models; returns the list of what was written.

    Video number i of seed number j starts from keyed noise (seed, sample id i, stream "rollout"), the same for
    both models, so that what differs between two videos is the training alone; or that and the sampler, where the
    aligned one is a few-step student.
    """
    prompts = heldout_prompts(config)
    folder = samples_folder(config)
    sections = {"base": config.model, "aligned": aligned_section(config)}
    samplers = {"base": config.usual_sampler, "aligned": config.few_step_sampler or config.usual_sampler}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in MODELS:
        few = " in a few steps" if samplers[name].solver != "model" else ""
        say(f"sampling from the {name} model{few}")
        model = load_model(sections[name], device=device, dtype=working_dtype(config.model, device))
        shape = model.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        with progress(f"sampling {name}", len(prompts) * len(config.sample.seeds)) as bar:
            for seed in config.sample.seeds:
                for first in range(0, len(prompts), config.sample.batch_size):
                    numbers = range(first, min(first + config.sample.batch_size, len(prompts)))
                    chosen = [prompts[i] for i in numbers]
                    latents = sample_latents(config, model, chosen, list(numbers), seed, shape, samplers[name])
                    frames = model.decode_video(latents)
                    for i, video in zip(numbers, frames, strict=True):
                        write_video(folder / _file(name, seed, i), video, config.data.fps or PLAYBACK_FPS)
                    bar.advance(len(numbers))
    rows = [
        {"prompt": prompt, "seed": seed, "of": config.sample.weights, **{name: _file(name, seed, i) for name in MODELS}}
        for seed in config.sample.seeds
        for i, prompt in enumerate(prompts)
    ]
    write_lines(folder / "samples.jsonl", rows)
    return folder / "samples.jsonl"


def sample_latents(
    config: Config, model, prompts: list[str], ids: list[int], seed: int, shape, sampler: Sampler | None = None
) -> Tensor:
    """Latents [B, *shape] of `prompts`, from the keyed noise of their ids: (seed, id, draw 0, stream "rollout").

    sampler: None for `sample`'s.
    """
    sampler = sampler or config.usual_sampler
    device = model.vae.device
    key = NoiseKey(seed, torch.tensor(ids), 0, Stream.ROLLOUT)
    noise = keyed_randn((len(prompts), *shape), key, device=device)
    text = model.pad_text(model.encode_text(prompts)).to(device, model.dtype)
    negative = model.pad_text(model.encode_text([sampler.negative_prompt] * len(prompts))).to(device, model.dtype)
    return model.sample(
        noise,
        text,
        negative,
        num_steps=sampler.num_steps,
        guidance=sampler.guidance,
        dynamic=sampler.dynamic,
        solver=sampler.solver,
    )


def read_samples(config: Config) -> tuple[list[dict], dict[tuple[str, int], Tensor]]:
    """What `sample` wrote: its rows, and frames uint8 [count, F, H, W, 3] by (model, seed)."""
    folder = samples_folder(config)
    try:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    except OSError:
        raise DataError(f"{folder}: no samples; run 'alignkit sample' with this configuration first") from None
    of = {row.get("of", "trained") for row in rows}
    if of != {config.sample.weights}:
        raise DataError(
            f"{folder}: samples of {' and '.join(sorted(of))}, not of sample.weights; run 'alignkit sample'"
        )
    spec = VideoSpec(config.data.height, config.data.width, config.data.num_frames)
    frames = {
        (name, seed): torch.stack([decode_clip(folder / row[name], spec) for row in rows if row["seed"] == seed])
        for name in MODELS
        for seed in dict.fromkeys(row["seed"] for row in rows)
    }
    return rows, frames


def _file(model: str, seed: int, number: int) -> str:
    return f"{model}/seed{seed}-{number:04d}.mp4"
