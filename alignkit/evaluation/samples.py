"""`alignkit sample`: videos from the base and from the aligned model, with the same prompts and the same noise."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.config import Config, ModelSection, Sampler
from alignkit.errors import DataError
from alignkit.evaluation.shared import model_terms, share_out_shown
from alignkit.files import write_lines
from alignkit.media.videos import PLAYBACK_FPS, VideoSpec, decode_clip, write_video
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.moment import end_if_of_the_moment, listed
from alignkit.sharing import shared_folder, stored_terms
from alignkit.stores.blocks import one_thread
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.export import aligned_section
from alignkit_kernels import NoiseKey, Stream, keyed_randn

MODELS = ("base", "aligned")
LISTED = "samples.jsonl"
MAPS = "maps.npz"
"""In the samples' folder: where the judge sees faults, uint8 [count, 5, 12, 12] of each model, 255: certain."""


MADE = r"\.?seed\d+-\d{4,}\..*"  # what `_file` names, what is being written of it, and locks


def samples_folder(config: Config) -> Path:
    return config.output.dir / "samples"


def sample(config: Config, device: torch.device, show: bool = True) -> Path:
    """Sample `sample.count` held-out prompts, in the order of their pairs and repeated as often as needed, with every
    seed from both models; returns the list of what is there.

    Any number of processes may call this at once: they share the batches between them. What is there is kept, of each
    model as long as its weights and settings are the same; else it is deleted, which is said.

    Video number i of seed number j starts from keyed noise (seed, sample id i, stream "rollout"), the same for
    both models, so that what differs between two videos is the training alone; or that and the sampler, where the
    aligned one is a few-step student. It has the same bits whoever makes it, on one kind of device.
    """
    prompts, folder, size = _prompts(config), samples_folder(config), config.sample.batch_size
    sampled_by = {name: _sampled_by(config, name) for name in MODELS}
    batches = [
        (name, seed, range(first, min(first + size, config.sample.count)))
        for name in MODELS
        for seed in config.sample.seeds
        for first in range(0, config.sample.count, size)
    ]
    videos = [[folder / _file(name, seed, i) for i in numbers] for name, seed, numbers in batches]
    loaded: dict[str, VideoModel] = {}

    def make(number: int) -> None:
        name, seed, numbers = batches[number]
        section, sampler = sampled_by[name]
        if name not in loaded:
            loaded.clear()
            loaded[name] = load_model(section, device=device, dtype=working_dtype(config.model, device))
        for told in (LISTED, MAPS):  # of what was there before
            (folder / told).unlink(missing_ok=True)
        # Filled up, since on most devices the bits of a batch depend on its size.
        ids = [*numbers] + [numbers[-1]] * (size - len(numbers))
        chosen, shape = [prompts[i % len(prompts)] for i in ids], loaded[name].latent_shape(*_size(config))
        frames = loaded[name].decode_video(sample_latents(config, loaded[name], chosen, ids, seed, shape, sampler))
        for file, video in zip(videos[number], frames, strict=False):
            for left in listed(file.parent, f".{file.stem}.*"):  # by a process that was killed
                left.unlink()
            if not file.exists():
                write_video(file, video, config.data.fps or PLAYBACK_FPS)

    terms = {name: _terms(config, section, sampler, prompts) for name, (section, sampler) in sampled_by.items()}
    for section, _ in sampled_by.values():  # refused before what was sampled under other terms is deleted
        load_model(section, with_transformer=False, with_encoders=False).latent_shape(*_size(config))
    with ExitStack() as held, one_thread(device):
        for name in MODELS:
            held.enter_context(shared_folder(folder / name, terms[name], "sample", MADE))
        for files in videos:
            if files[-1].exists() and not all(file.exists() for file in files):  # somebody has deleted one
                files[-1].unlink()  # which is written last and says that a batch is there
        whole = [file for files in videos for file in files]
        share_out_shown([files[-1] for files in videos], make, "sampling", show=show, counted=whole)
        rows = [
            {"prompt": prompts[i % len(prompts)], "seed": seed, "of": config.sample.weights}
            | {name: _file(name, seed, i) for name in MODELS}
            for seed in config.sample.seeds
            for i in range(config.sample.count)
        ]
        write_lines(folder / LISTED, rows)
    return folder / LISTED


def _prompts(config: Config) -> list[str]:
    return list(dict.fromkeys(PairStore(pairs_folder(config, "heldout")).rows["prompt"]))


def _sampled_by(config: Config, name: str) -> tuple[ModelSection, Sampler]:
    """What one of MODELS is loaded from, and how it is sampled."""
    if name == "base":
        return config.model, config.usual_sampler
    return aligned_section(config), config.few_step_sampler or config.usual_sampler


def _terms(config: Config, section: ModelSection, sampler: Sampler, prompts: list[str]) -> dict[str, Any]:
    """All that a video depends on beside its seed and number."""
    return {
        **model_terms(section, sampler.num_steps),
        **asdict(sampler),
        "prompts": prompts,
        "batch_size": config.sample.batch_size,
        "size": _size(config),
        "fps": config.data.fps,
    }


def _size(config: Config) -> tuple[int, int, int]:
    return config.data.num_frames, config.data.height, config.data.width


def sample_latents(
    config: Config,
    model: VideoModel,
    prompts: list[str],
    ids: list[int],
    seed: int,
    shape: tuple[int, ...],
    sampler: Sampler | None = None,
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


def listed_samples(config: Config) -> list[dict[str, Any]]:
    """The rows that `sample` wrote. Raises DataError where it has not, or not of `sample.weights` or `data`'s size."""
    folder = samples_folder(config)
    try:
        rows = [json.loads(line) for line in (folder / LISTED).read_text().splitlines()]
    except ValueError as error:
        raise DataError(f"{folder / LISTED}: damaged ({error}); run 'alignkit sample' again") from None
    except OSError as error:
        end_if_of_the_moment(folder / LISTED, error)
        raise DataError(f"{folder}: no samples; run 'alignkit sample' with this configuration first") from None
    of = {row.get("of", "trained") for row in rows}
    if of != {config.sample.weights}:
        raise DataError(
            f"{folder}: samples of {' and '.join(sorted(of))}, not of sample.weights; run 'alignkit sample'"
        )
    for name in MODELS:
        size = stored_terms(folder / name).get("size", list(_size(config)))
        if size != list(_size(config)):
            raise DataError(
                f"{folder / name}: holds videos of {size} (frames, height, width), the configuration's are "
                f"{list(_size(config))}; set data to what they were sampled with, or run 'alignkit sample' again"
            )
    missing = [row[name] for row in rows for name in MODELS if not (folder / row[name]).exists()]
    if missing:
        raise DataError(f"{folder / missing[0]}: no such file; run 'alignkit sample' with this configuration again")
    return rows


def read_samples(config: Config) -> tuple[list[dict[str, Any]], dict[tuple[str, int], Tensor]]:
    """What `sample` wrote: its rows, and frames uint8 [count, F, H, W, 3] by (model, seed)."""
    folder, rows = samples_folder(config), listed_samples(config)
    spec = VideoSpec(config.data.height, config.data.width, config.data.num_frames)
    frames = {
        (name, seed): torch.stack([decode_clip(folder / row[name], spec) for row in rows if row["seed"] == seed])
        for name in MODELS
        for seed in dict.fromkeys(row["seed"] for row in rows)
    }
    return rows, frames


def _file(model: str, seed: int, number: int) -> str:
    return f"{model}/seed{seed}-{number:04d}.mp4"
