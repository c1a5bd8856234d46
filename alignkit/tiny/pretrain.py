"""Make a tiny model and the clips' classifier from nothing: ``python -m alignkit.tiny.pretrain --help``.

The clean model comes first, from well-made clips alone: OUT/clean/FAMILY. Then its transformer goes on with clips of
mixed quality, as real bases are trained: OUT/FAMILY, which is what ships.

Each stage leaves its result in the work folder and is passed over when that is there; the stages that
train go on from their last checkpoint. So a run that was stopped is started again with the same command.
"""

import argparse
import copy
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from alignkit.config.yaml_text import read_yaml
from alignkit.errors import AlignkitError, ConfigError
from alignkit.tiny.classifier_training import train_classifier
from alignkit.tiny.clips import SHAPES, read_clips, render_clip, write_clips
from alignkit.tiny.faults import faulty_clip
from alignkit.tiny.recipes import FAMILIES, Recipe, recipe_of
from alignkit.tiny.stages import log
from alignkit.tiny.text import caption_bank, combination, new_tokenizer, train_text_encoder
from alignkit.tiny.transformer import train_transformer
from alignkit.tiny.vae import (
    channels_last,
    decode_latents,
    encode_clips,
    polish_decoder,
    posterior_variance,
    shape_contrast,
    to_unit,
    train_vae,
)


@dataclass(frozen=True)
class ClipsSection:
    count: int
    seed: int
    held_out: int


@dataclass(frozen=True)
class VaeSection:
    steps: int
    peak_rate: float
    kl_weight: float
    late_kl_weight: float
    autocast: bool


@dataclass(frozen=True)
class DecoderSection:
    steps: int
    peak_rate: float
    autocast: bool


@dataclass(frozen=True)
class TextSection:
    steps: int
    peak_rate: float


@dataclass(frozen=True)
class TransformerSection:
    steps: int
    batch: int
    peak_rate: float
    hold: float
    ema_decay: float
    autocast: bool
    every_shape: bool
    """Show each clip in every shape at once, drawn again without the mp4, with one noise."""
    contrast_weight: float
    blind: float


@dataclass(frozen=True)
class MixedSection:
    """What makes the base one of mixed quality: the trained transformer goes on, on clips that nobody has sorted."""

    count: int
    seed: int
    fault_share: float
    wrong_share: float
    held_out: int
    steps: int
    batch: int
    peak_rate: float
    hold: float
    ema_decay: float
    share: float
    """How far from the clean weights (0) to the trained ones (1) those that ship lie."""


@dataclass(frozen=True)
class ClassifierSection:
    steps: int
    peak_rate: float
    round_trips: int


SECTIONS = {
    "clips": ClipsSection,
    "vae": VaeSection,
    "decoder": DecoderSection,
    "text": TextSection,
    "transformer": TransformerSection,
    "mixed": MixedSection,
    "classifier": ClassifierSection,
}


@dataclass(frozen=True)
class PretrainConfig:
    family: str
    seed: int
    threads: int
    clips: ClipsSection
    vae: VaeSection
    decoder: DecoderSection
    text: TextSection
    transformer: TransformerSection
    mixed: MixedSection
    classifier: ClassifierSection | None
    """None: only the first family's run trains the classifier, on clips that also passed through its VAE."""


@dataclass(frozen=True)
class Parts:
    """What is trained of a pipeline."""

    encoder: PreTrainedModel
    vae: ModelMixin
    transformer: ModelMixin


def load_config(path: Path) -> PretrainConfig:
    """Read the YAML config. Raises ConfigError that names the file and the wrong or missing key."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        given = read_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    values = _checked(given, PretrainConfig, path, "")
    if values["family"] not in FAMILIES:
        raise ConfigError(f"{path}: family must be one of {', '.join(FAMILIES)}, not {values['family']!r}")
    for name, section in SECTIONS.items():
        if name == "classifier" and values[name] is None:
            continue
        values[name] = section(**_checked(values[name], section, path, f"{name}."))
    return PretrainConfig(**values)


def _checked(given: object, section: type, path: Path, prefix: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {prefix.rstrip('.') or 'the config'} must be a mapping of keys to values")
    types = {field.name: field.type for field in fields(section)}
    for key in given:
        if key not in types:
            raise ConfigError(f"{path}: unknown key {prefix}{key}; known are {', '.join(types)}")
    for key, kind in types.items():
        if key not in given:
            raise ConfigError(f"{path}: {prefix}{key} is missing")
        value = given[key]
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{path}: {prefix}{key} must be true or false, not {value!r}")
        if kind in (int, float):
            fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if not fits or value < 0:
                raise ConfigError(f"{path}: {prefix}{key} must be a {kind.__name__} ≥ 0, not {value!r}")
    return dict(given)


def make_clips(config: PretrainConfig, work: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Render the clips to mp4 and read them back: uint8 [N, F, H, W, 3] and their attributes."""
    folder, cache = work / "clips", work / "clips.npy"
    if not (folder / "captions.jsonl").exists():
        log.info("clips: writing %d", config.clips.count)
        write_clips(folder, config.clips.count, config.clips.seed)
    if not cache.exists():
        log.info("clips: reading them back")
        np.save(cache, read_clips(folder).frames)
    return np.load(cache, mmap_mode="r"), read_clips(folder, decode=False).attributes


def make_vae(config: PretrainConfig, recipe: Recipe, work: Path, clips: np.ndarray) -> tuple[ModelMixin, torch.Tensor]:
    """The VAE with its latents' statistics, and the normalised latents of all clips."""
    folder, latents_file = work / "vae", work / "latents.safetensors"
    if not latents_file.exists():
        trained = len(clips) - config.clips.held_out
        vae = train_vae(recipe, clips[:trained], work, **asdict(config.vae), seed=config.seed)
        some, contrast = encode_clips(vae, clips[:1024]), shape_contrast(vae, config.clips.seed)
        recipe.store_statistics(vae, some, posterior_variance(vae, clips[:256]), contrast)
        vae.save_pretrained(folder)
        log.info("vae: encoding %d clips", len(clips))
        save_file({"latents": recipe.normalise(vae, encode_clips(vae, clips)).contiguous()}, latents_file)
    return _load_vae(recipe, folder), load_file(latents_file)["latents"]


def make_versions(
    config: PretrainConfig,
    recipe: Recipe,
    work: Path,
    vae: ModelMixin,
    latents: torch.Tensor,
    attributes: list[dict[str, str]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer learns from: latents [N, V, C, F, h, w] of each clip's versions, their combinations [N, V].

    One version, the clip itself, or the clip drawn in every shape.
    """
    if not config.transformer.every_shape:
        return latents[:, None], torch.tensor([[combination(entry)] for entry in attributes])
    file = work / "versions.safetensors"
    if not file.exists():
        log.info("transformer: encoding %d clips in %d shapes", len(attributes), len(SHAPES))
        parts = [
            encode_clips(vae, np.stack([render_clip(config.clips.seed, index, shape).frames for shape in SHAPES]))
            for index in range(len(attributes))
        ]
        save_file({"latents": recipe.normalise(vae, torch.cat(parts)).contiguous()}, file)
    versions = load_file(file)["latents"].unflatten(0, (-1, len(SHAPES)))
    return versions, torch.tensor([[combination(e | {"shape": shape}) for shape in SHAPES] for e in attributes])


def make_polished_vae(
    config: PretrainConfig, recipe: Recipe, work: Path, clips: np.ndarray, vae: ModelMixin, latents: torch.Tensor
) -> ModelMixin:
    """The VAE with its decoder trained further; the encoder is the same bit for bit."""
    folder = work / "vae_polished"
    if not folder.exists():
        trained = len(clips) - config.clips.held_out
        polish_decoder(recipe, vae, clips[:trained], latents, work, **asdict(config.decoder), seed=config.seed)
        vae.save_pretrained(folder)
    return _load_vae(recipe, folder)


def _load_vae(recipe: Recipe, folder: Path) -> ModelMixin:
    vae = type(recipe.new_vae()).from_pretrained(folder).eval()
    channels_last(vae)
    return vae


def make_text_encoder(config: PretrainConfig, recipe: Recipe, work: Path) -> PreTrainedModel:
    """The text encoder, trained or from the work folder."""
    folder = work / "text_encoder"
    if not folder.exists():
        train_text_encoder(recipe, work, **asdict(config.text), seed=config.seed).save_pretrained(folder)
    return type(recipe.new_text_encoder()).from_pretrained(folder).eval()


def make_transformer(
    config: PretrainConfig,
    recipe: Recipe,
    work: Path,
    versions: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    encoder: PreTrainedModel,
) -> ModelMixin:
    """The transformer, trained on `make_versions`' or from the work folder."""
    folder = work / "transformer"
    if not folder.exists():
        settings = asdict(config.transformer)
        del settings["every_shape"]
        train_transformer(
            recipe,
            *versions(),
            caption_bank(recipe, new_tokenizer(), encoder),
            work,
            **settings,
            held_out=config.clips.held_out,
            seed=config.seed,
        ).save_pretrained(folder)
    return type(recipe.new_transformer()).from_pretrained(folder).eval()


def make_mixed_transformer(
    config: PretrainConfig,
    recipe: Recipe,
    work: Path,
    transformer: ModelMixin,
    vae: ModelMixin,
    encoder: PreTrainedModel,
) -> ModelMixin:
    """The transformer after the mixed set (`alignkit.tiny.faults`), trained or from the work folder."""
    folder, file, section = work / "mixed", work / "mixed.safetensors", config.mixed
    start, transformer = transformer, copy.deepcopy(transformer)
    if not folder.exists():
        mixed = [
            faulty_clip(section.seed, index, fault_share=section.fault_share, wrong_share=section.wrong_share)
            for index in range(section.count)
        ]
        if not file.exists():
            log.info("mixed: encoding %d clips", section.count)
            latents = encode_clips(vae, np.stack([clip.frames for clip in mixed]))
            save_file({"latents": recipe.normalise(vae, latents).contiguous()}, file)
        train_transformer(
            recipe,
            load_file(file)["latents"][:, None],
            torch.tensor([[combination(clip.captioned)] for clip in mixed]),
            caption_bank(recipe, new_tokenizer(), encoder),
            work,
            **{name: getattr(section, name) for name in ("steps", "batch", "peak_rate", "hold", "ema_decay")},
            autocast=False,
            contrast_weight=1.0,
            blind=0.0,
            held_out=section.held_out,
            seed=config.seed,
            start=transformer.train(),
            stage="mixed",
        ).save_pretrained(folder)
    mixed = type(recipe.new_transformer()).from_pretrained(folder)
    clean = dict(start.named_parameters())
    with torch.no_grad():
        for name, p in mixed.named_parameters():
            p.copy_(torch.lerp(clean[name], p, section.share))
    return mixed.eval()


def make_classifier(
    config: PretrainConfig,
    work: Path,
    clips: np.ndarray,
    attributes: list[dict[str, str]],
    vae: ModelMixin,
) -> Path:
    """The classifier's weights file, trained or from the work folder."""
    path, cache = work / "classifier.safetensors", work / "round_trips.npy"
    section = config.classifier
    if not path.exists():
        assert section is not None
        if not cache.exists():
            log.info("classifier: %d clips through the VAE", section.round_trips)
            latents = encode_clips(vae, clips[: section.round_trips])
            scale = latents.std(dim=(0, 2, 3, 4), keepdim=True)
            generator = torch.Generator().manual_seed(config.seed)
            # Up to a fifth of the latents' deviation: generated latents are not exact either.
            amount = 0.2 * torch.rand(len(latents), 1, 1, 1, 1, generator=generator) * scale
            noise = torch.randn(latents.shape, generator=generator)
            np.save(cache, decode_latents(vae, latents + amount * noise))
        trained = len(clips) - config.clips.held_out
        model = train_classifier(
            clips[:trained],
            np.load(cache),
            attributes,
            work,
            steps=section.steps,
            peak_rate=section.peak_rate,
            seed=config.seed,
        )
        save_file(model.state_dict(), path)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkit.tiny.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML, as configs/tiny-*-pretrain.yaml")
    parser.add_argument("--work", type=Path, required=True, help="clips, checkpoints and stage results")
    parser.add_argument("--out", type=Path, required=True, help="where the model's folders and the classifier go")
    parser.add_argument(
        "--start", type=Path, help="diffusers folder of the clean model: only the stage on the mixed set is trained"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = load_config(given.config)
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recipe = recipe_of(config.family)
    torch.set_num_threads(config.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    parts = start_parts(recipe, given.start) if given.start else make_parts(config, recipe, given)
    save_pipeline(recipe, given.out / "clean" / config.family, parts)
    mixed = make_mixed_transformer(config, recipe, given.work, parts.transformer, parts.vae, parts.encoder)
    folder = given.out / config.family
    save_pipeline(recipe, folder, replace(parts, transformer=mixed))
    log.info("done: %s; python -m alignkit.tiny.check --model measures it", folder)
    return 0


def start_parts(recipe: Recipe, folder: Path) -> Parts:
    """The clean model's parts from a diffusers folder."""
    kinds = {"encoder": ("text_encoder", recipe.new_text_encoder), "vae": ("vae", recipe.new_vae)}
    kinds["transformer"] = ("transformer", recipe.new_transformer)
    return Parts(**{name: type(new()).from_pretrained(folder, subfolder=part) for name, (part, new) in kinds.items()})


def make_parts(config: PretrainConfig, recipe: Recipe, given: argparse.Namespace) -> Parts:
    """The clean model's parts, trained on drawn clips or from the work folder; and, where asked, the classifier."""
    clips, attributes = make_clips(config, given.work)
    encoder = make_text_encoder(config, recipe, given.work)
    vae, latents = make_vae(config, recipe, given.work, clips)
    versions = partial(make_versions, config, recipe, given.work, vae, latents, attributes)
    transformer = make_transformer(config, recipe, given.work, versions, encoder)
    vae = make_polished_vae(config, recipe, given.work, clips, vae, latents)
    if config.classifier:
        classifier = make_classifier(config, given.work, clips, attributes, vae)
        shutil.copyfile(classifier, given.out / "classifier.safetensors")
    held_out = clips[-config.clips.held_out :]
    rebuilt = decode_latents(vae, encode_clips(vae, held_out))
    error = (to_unit(rebuilt) - to_unit(held_out)).square().mean(dim=(1, 2, 3, 4))
    log.info("vae: held-out PSNR %.2f dB", (10 * torch.log10(4 / error)).mean())
    return Parts(encoder, vae, transformer)


def save_pipeline(recipe: Recipe, folder: Path, parts: Parts) -> None:
    """Write the diffusers folder."""
    recipe.PIPELINE(
        tokenizer=new_tokenizer(),
        text_encoder=parts.encoder,
        vae=parts.vae,
        transformer=parts.transformer,
        scheduler=recipe.new_scheduler(),
    ).save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # diffusers notes where a part was loaded from
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
