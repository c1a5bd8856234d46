"""`alignkit eval`: held-out pairs and samples measured before and after, and a verdict in plain words."""

import platform
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from alignkit import __version__
from alignkit.config import Config
from alignkit.evaluation.measures import edge_energy, frechet_distance, motion_amount, temporal_flicker
from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.samples import read_samples
from alignkit.files import write_json
from alignkit.media.videos import decode_clip
from alignkit.models import load_model, working_dtype
from alignkit.progress import progress, say
from alignkit.stores.folders import pairs_folder, source_folder, video_spec
from alignkit.stores.pairs import PairStore
from alignkit.tiny.classifier import NAMED, classify, features
from alignkit.tiny.clips import ATTRIBUTES, FRAMES, SIZE
from alignkit.training.export import aligned_section

ACCURACY_WANTED = 0.70
WINNER_ERROR_ALLOWED = 0.01
MOTION_ALLOWED = 0.10
NAMED_WANTED = 0.80
PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "datasets", "av")


def evaluate(config: Config, device: torch.device) -> dict:
    """Score held-out pairs and the samples of `alignkit sample`; writes eval.json and returns the summary's content."""
    pairs = _score_both(config, device)
    rows, frames = read_samples(config)
    real = _real_clips(config, device)
    rebuilt = _through_vae(config, real, device)
    with progress("measuring samples", 1) as bar:
        pictures = _measure(rows, frames, real, rebuilt)
        bar.advance()
    write_json(
        config.output.dir / "eval.json", {"pairs": pairs, "by_timestep": pairs["after"]["by_timestep"], **pictures}
    )
    return summarize(config, pairs, pictures, device)


def _score_both(config: Config, device: torch.device) -> dict:
    store = PairStore(pairs_folder(config, "heldout"))
    aligned = aligned_section(config)
    dtype = working_dtype(config.model, device)
    base = load_model(config.model, with_encoders=False, device=device, dtype=dtype)
    trained = load_model(aligned, with_encoders=False, device=device, dtype=dtype)
    networks = {"before": base.transformer, "after": trained.transformer}
    return {
        when: describe(
            score_pairs(config, base, store, network, base.transformer, f"scoring held-out pairs {when}", device)
        )
        for when, network in networks.items()
    }


def _real_clips(config: Config, device: torch.device) -> Tensor:
    """Frames of the held-out clips, or of the winners where both sides were sampled, uint8 [count, F, H, W, 3]."""
    store = PairStore(pairs_folder(config, "heldout"))
    if store.info.kind == "rollouts":
        model = load_model(config.model, with_transformer=False, device=device)
        return torch.cat([model.decode_video(pair.winner[None].to(device)) for pair in store])
    names = list(dict.fromkeys(store.rows["source"]))
    return torch.stack([decode_clip(source_folder(config) / name, video_spec(config)) for name in names])


def _through_vae(config: Config, clips: Tensor, device: torch.device) -> Tensor:
    """The clips encoded and decoded, uint8 as they came: the best that any samples of this model can look like."""
    model = load_model(config.model, with_transformer=False, device=device)
    size = config.evaluation.batch_size
    with progress("real clips through the VAE", len(clips)) as bar:
        rebuilt = []
        for part in clips.split(size):
            rebuilt.append(model.decode_video(model.encode_video(part)))
            bar.advance(len(part))
    return torch.cat(rebuilt)


def _measure(rows: list[dict], frames: dict[tuple[str, int], Tensor], real: Tensor, rebuilt: Tensor) -> dict:
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    models = list(dict.fromkeys(name for name, _ in frames))
    together = {name: torch.cat([frames[name, seed] for seed in seeds]) for name in models}
    measured: dict = {"frechet": None}
    if min(len(real), len(rows) // len(seeds)) > 1:  # a covariance needs two
        wanted = clip_features(real)
        measured["frechet"] = {
            name: [frechet_distance(clip_features(frames[name, seed]), wanted) for seed in seeds] for name in models
        }
    for label, measure in (("motion", motion_amount), ("flicker", temporal_flicker), ("edge_energy", edge_energy)):
        clips = {"real": real, "real_through_vae": rebuilt, **together}
        measured[label] = {name: measure(videos).mean().item() for name, videos in clips.items()}
    measured["classifier"] = _named([row["prompt"] for row in rows], together)
    return measured


def _named(prompts: list[str], frames: dict[str, Tensor]) -> dict | None:
    """Share of each model's samples in which a classifier sees all that the prompt names; None for other prompts."""
    wanted = [attributes_in(prompt) for prompt in prompts]
    if not all(wanted):
        return None
    shares = {}
    for name, videos in frames.items():
        seen = classify(thumbnails(videos))
        right = [all(seen[key][i] == value for key, value in names.items()) for i, names in enumerate(wanted)]
        shares[name] = sum(right) / len(right)
    return {**shares, "samples": len(wanted)}


def clip_features(frames: Tensor) -> Tensor:
    return torch.from_numpy(features(thumbnails(frames)))


def thumbnails(frames: Tensor) -> np.ndarray:
    """uint8 [B, F, H, W, 3] of any size to what the shipped classifier looks at."""
    if frames.shape[1:4] != (FRAMES, SIZE, SIZE):
        times = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
        pictures = rearrange(frames[:, times], "b f h w c -> (b f) c h w").float()
        small = torch.nn.functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        frames = rearrange(small.round().to(torch.uint8), "(b f) c h w -> b f h w c", f=FRAMES)
    return frames.numpy()


def attributes_in(prompt: str) -> dict[str, str] | None:
    """Shape, colour and motion that a drawn clip's caption names; None if it does not name one of each."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found = {name: [value for value in ATTRIBUTES[name] if value in words] for name in NAMED}
    return {name: values[0] for name, values in found.items()} if all(map(len, found.values())) else None


def summarize(config: Config, pairs: dict, pictures: dict, device: torch.device) -> dict:
    before, after = pairs["before"], pairs["after"]
    checks = criteria(after, pictures)
    for check in checks:
        say(f"{'reached' if check['reached'] else 'NOT reached'}: {check['text']}")
    return {
        "family": config.model.family,
        "reached": all(check["reached"] for check in checks),
        "criteria": checks,
        "accuracy": {
            name: {"before": before[f"{name}_accuracy"], "after": after[f"{name}_accuracy"]}
            for name in ("region", "global")
        },
        "winner_error": _change(after, "w"),
        "loser_error": _change(after, "l"),
        **pictures,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _change(after: dict, side: str) -> dict[str, float]:
    reference, trained = after[f"error_{side}_before"], after[f"error_{side}_after"]
    return {"before": reference, "after": trained, "relative_change": trained / reference - 1}


def criteria(after: dict, pictures: dict) -> list[dict]:
    """All must hold at once for an alignment to be called reached; accuracy alone is no success."""
    accuracy = after["region_accuracy"]
    change = _change(after, "w")["relative_change"]
    motion = pictures["motion"]
    # the VAE's own flicker counts as motion and no training of the network can take it away
    off, off_before = (abs(motion[name] / motion["real_through_vae"] - 1) for name in ("aligned", "base"))
    checks = [
        _check(
            "accuracy",
            accuracy,
            ACCURACY_WANTED,
            accuracy >= ACCURACY_WANTED,
            f"the real region is preferred in {accuracy:.1%} of {after['comparisons']} held-out comparisons "
            f"({ACCURACY_WANTED:.0%} wanted)",
        ),
        _check(
            "winner error",
            change,
            WINNER_ERROR_ALLOWED,
            change <= WINNER_ERROR_ALLOWED,
            f"the error on real held-out videos changed by {change:+.2%} (at most {WINNER_ERROR_ALLOWED:+.0%} allowed)",
        ),
        _frechet_check(pictures["frechet"]),
        _check(
            "motion",
            off,
            max(MOTION_ALLOWED, off_before),
            off <= max(MOTION_ALLOWED, off_before),
            f"samples change by {motion['aligned']:.2f} levels a frame, real clips after the VAE by "
            f"{motion['real_through_vae']:.2f} (as filmed {motion['real']:.2f}), the base's samples by "
            f"{motion['base']:.2f} (wanted: within {MOTION_ALLOWED:.0%} of clips after the VAE, or closer than base)",
        ),
    ]
    named = pictures["classifier"]
    if named:
        for name in ("base", "aligned"):
            checks.append(
                _check(
                    f"prompt followed ({name})",
                    named[name],
                    NAMED_WANTED,
                    named[name] >= NAMED_WANTED,
                    f"shape, colour and direction are as prompted in {named[name]:.1%} of {named['samples']} samples "
                    f"of the {name} model ({NAMED_WANTED:.0%} wanted)",
                )
            )
    return checks


def _frechet_check(frechet: dict | None) -> dict:
    if frechet is None:
        text = "the distance of samples to real clips cannot be measured with fewer than two held-out clips"
        return _check("frechet distance", None, None, False, text)
    base, aligned = (torch.tensor(frechet[name], dtype=torch.float64) for name in ("base", "aligned"))
    spread = (base.max() - base.min()).item()
    limit = base.mean().item() + spread
    return _check(
        "frechet distance",
        aligned.mean().item(),
        limit,
        aligned.mean().item() <= limit,
        f"samples lie {aligned.mean():.3g} from real clips (Fréchet distance), the base's {base.mean():.3g}, which "
        f"spreads over {spread:.2g} between seeds",
    )


def _check(name: str, value: float | None, limit: float | None, reached: bool, text: str) -> dict:
    return {"name": name, "value": value, "limit": limit, "reached": bool(reached), "text": text}


def versions() -> dict[str, str]:
    found = {"alignkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def summary_file(config: Config) -> Path:
    return config.output.dir / "summary.json"
