"""Make the tiny Wan2.1 and its classifier from nothing: ``python -m alignkit.tiny.pretrain --help``.

Each stage leaves its result in the work folder and is passed over when that is there; the stages that
train go on from their last checkpoint. So a run that was stopped is started again with the same command.
"""

import argparse
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from alignkit.errors import AlignkitError, ConfigError
from alignkit.tiny.classifier_training import train_classifier
from alignkit.tiny.clips import read_clips, write_clips
from alignkit.tiny.flow import FLOW_SHIFT, train_flow
from alignkit.tiny.stages import log
from alignkit.tiny.text import caption_bank, combination, encode_prompts, new_tokenizer, train_text_encoder
from alignkit.tiny.vae import (
    channels_last,
    decode_latents,
    encode_clips,
    normalise,
    polish_decoder,
    posterior_variance,
    store_statistics,
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


@dataclass(frozen=True)
class DecoderSection:
    steps: int
    peak_rate: float


@dataclass(frozen=True)
class TextSection:
    steps: int
    peak_rate: float


@dataclass(frozen=True)
class FlowSection:
    steps: int
    batch: int
    peak_rate: float
    hold: float
    ema_decay: float


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
    "flow": FlowSection,
    "classifier": ClassifierSection,
}


@dataclass(frozen=True)
class PretrainConfig:
    seed: int
    threads: int
    clips: ClipsSection
    vae: VaeSection
    decoder: DecoderSection
    text: TextSection
    flow: FlowSection
    classifier: ClassifierSection


def load_config(path: Path) -> PretrainConfig:
    """Read the YAML config. Raises ConfigError that names the file and the wrong or missing key."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    values = _checked(given, PretrainConfig, path, "")
    for name, section in SECTIONS.items():
        values[name] = section(**_checked(values[name], section, path, f"{name}."))
    return PretrainConfig(**values)


def _checked(given: object, section: type, path: Path, prefix: str) -> dict:
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {prefix.rstrip('.') or 'the config'} must be a mapping of keys to values")
    types = {field.name: field.type for field in fields(section)}
    for key in given:
        if key not in types:
            raise ConfigError(f"{path}: unknown key {prefix}{key}; known are {', '.join(types)}")
    for key, kind in types.items():
        if key not in given:
            raise ConfigError(f"{path}: {prefix}{key} is missing")
        if kind in (int, float):
            value = given[key]
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


def make_vae(config: PretrainConfig, work: Path, clips: np.ndarray) -> tuple[AutoencoderKLWan, torch.Tensor]:
    """The VAE with its latents' statistics, and the normalised latents of all clips."""
    folder, latents_file = work / "vae", work / "latents.safetensors"
    if not latents_file.exists():
        trained = len(clips) - config.clips.held_out
        vae = train_vae(clips[:trained], work, **asdict(config.vae), seed=config.seed)
        log.info("vae: encoding %d clips", len(clips))
        raw = encode_clips(vae, clips)
        store_statistics(vae, raw, posterior_variance(vae, clips[:256]))
        vae.save_pretrained(folder)
        save_file({"latents": normalise(vae, raw).contiguous()}, latents_file)
    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    channels_last(vae)
    return vae, load_file(latents_file)["latents"]


def make_polished_vae(
    config: PretrainConfig, work: Path, clips: np.ndarray, vae: AutoencoderKLWan, latents: torch.Tensor
) -> AutoencoderKLWan:
    """The VAE with its decoder trained further; the encoder is the same bit for bit."""
    folder = work / "vae_polished"
    if not folder.exists():
        trained = len(clips) - config.clips.held_out
        polish_decoder(vae, clips[:trained], latents, work, **asdict(config.decoder), seed=config.seed)
        vae.save_pretrained(folder)
    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    channels_last(vae)
    return vae


def make_text_encoder(config: PretrainConfig, work: Path) -> UMT5EncoderModel:
    """The text encoder, trained or from the work folder."""
    folder = work / "text_encoder"
    if not folder.exists():
        train_text_encoder(work, **asdict(config.text), seed=config.seed).save_pretrained(folder)
    return UMT5EncoderModel.from_pretrained(folder).eval()


def make_transformer(
    config: PretrainConfig,
    work: Path,
    latents: torch.Tensor,
    attributes: list[dict[str, str]],
    encoder: UMT5EncoderModel,
) -> WanTransformer3DModel:
    """The transformer, trained or from the work folder."""
    folder = work / "transformer"
    if not folder.exists():
        tokenizer = new_tokenizer()
        with torch.no_grad():
            empty = encode_prompts(tokenizer, encoder, [""])[0]
        train_flow(
            latents,
            torch.tensor([combination(entry) for entry in attributes]),
            caption_bank(tokenizer, encoder),
            empty,
            work,
            **asdict(config.flow),
            held_out=config.clips.held_out,
            seed=config.seed,
        ).save_pretrained(folder)
    return WanTransformer3DModel.from_pretrained(folder).eval()


def make_classifier(
    config: PretrainConfig,
    work: Path,
    clips: np.ndarray,
    attributes: list[dict[str, str]],
    vae: AutoencoderKLWan,
) -> Path:
    """The classifier's weights file, trained or from the work folder."""
    path, cache = work / "classifier.safetensors", work / "round_trips.npy"
    section = config.classifier
    if not path.exists():
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


def export(
    out: Path,
    vae: AutoencoderKLWan,
    encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    classifier: Path,
) -> None:
    """Write ``out``/wan, a folder for WanPipeline.from_pretrained, and ``out``/classifier.safetensors."""
    pipeline = WanPipeline(
        tokenizer=new_tokenizer(),
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
    )
    pipeline.save_pretrained(out / "wan")
    shutil.copyfile(classifier, out / "classifier.safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkit.tiny.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML, as configs/tiny-wan-pretrain.yaml")
    parser.add_argument("--work", type=Path, required=True, help="clips, checkpoints and stage results")
    parser.add_argument("--out", type=Path, required=True, help="where wan/ and classifier.safetensors go")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = load_config(given.config)
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(config.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    clips, attributes = make_clips(config, given.work)
    encoder = make_text_encoder(config, given.work)
    vae, latents = make_vae(config, given.work, clips)
    vae = make_polished_vae(config, given.work, clips, vae, latents)
    transformer = make_transformer(config, given.work, latents, attributes, encoder)
    classifier = make_classifier(config, given.work, clips, attributes, vae)
    export(given.out, vae, encoder, transformer, classifier)
    held_out = clips[-config.clips.held_out :]
    rebuilt = decode_latents(vae, encode_clips(vae, held_out))
    error = (to_unit(rebuilt) - to_unit(held_out)).square().mean(dim=(1, 2, 3, 4))
    log.info("vae: held-out PSNR %.2f dB", (10 * torch.log10(4 / error)).mean())
    log.info("done: %s; python -m alignkit.tiny.check measures it", given.out / "wan")
    return 0


if __name__ == "__main__":
    sys.exit(main())
