"""`alignkit eval`: held-out pairs and samples measured before and after, and a verdict in plain words."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit import __version__
from alignkit.config import Config
from alignkit.evaluation.drawn import clip_features, judge
from alignkit.evaluation.measures import edge_energy, frechet_distance, motion_amount, temporal_flicker
from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.readiness import CLIPS, cannot_draw, explained_share, too_few
from alignkit.evaluation.regions import again, shown_pairs, write_regions
from alignkit.evaluation.samples import MAPS, read_samples, samples_folder
from alignkit.evaluation.verdict import change_of, criteria, relative_change, verdict
from alignkit.files import write_json
from alignkit.localdpo.build import guided_text
from alignkit.media.videos import decode_clip
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.progress import progress, say
from alignkit.stores.folders import pairs_folder, source_folder, video_spec
from alignkit.stores.pairs import PairStore
from alignkit.training.export import aligned_section

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "datasets", "av")


def evaluate(config: Config, device: torch.device) -> dict:
    """Score held-out pairs and the samples of `alignkit sample`; writes eval.json and returns the summary's content.

    Beside it, for the report: samples/maps.npz (`MAPS`) and what both models make of held-out regions.
    """
    store = PairStore(pairs_folder(config, "heldout"))
    dtype = working_dtype(config.model, device)
    # In turn, so that text encoder and VAE never lie beside both networks.
    encoder = load_model(config.model, with_transformer=False, device=device, dtype=dtype)
    real = _real_clips(config, encoder, store, device)
    rebuilt = _through_vae(config, encoder, real)
    shown = [] if config.few_step_sampler else shown_pairs(store)  # regions are redone in many steps
    texts = [guided_text(config, encoder, [pair.prompt], device) for pair in shown]
    del encoder
    base, trained = (
        load_model(section, with_encoders=False, device=device, dtype=dtype)
        for section in (config.model, aligned_section(config))
    )
    pairs = _score_both(config, base, trained, store, device)
    unjudged = _unjudged(config, base, store, device)
    redrawn: dict[str, list[Tensor]] = {}
    with progress("regenerating held-out regions", 2 * len(shown)) as bar:
        for name, model in (("base", base), ("aligned", trained)):
            for pair, text in zip(shown, texts, strict=True):
                redrawn.setdefault(name, []).append(again(config, model, [pair], text, device)[0].cpu())
                bar.advance()
    del base, trained, model
    rows, frames = read_samples(config)
    with progress("measuring samples", 1) as bar:
        pictures, samples = _measure(config, rows, frames, real, rebuilt)
        bar.advance()
    vae = load_model(config.model, with_transformer=False, device=device, dtype=dtype)
    write_regions(config, vae, shown, redrawn, device)
    write_json(
        config.output.dir / "eval.json",
        {"pairs": pairs, "by_timestep": pairs["after"]["by_timestep"], **pictures, "samples": samples},
    )
    return summarize(config, pairs, pictures, unjudged, device)


def _unjudged(config: Config, base: VideoModel, store: PairStore, device: torch.device) -> list[str]:
    """Why these held-out pairs say nothing; empty if they do."""
    first = [store[row] for row in range(min(CLIPS, len(store)))]
    text = base.pad_text([pair.text for pair in first]).to(device, base.dtype)
    share = explained_share(base, torch.stack([pair.winner for pair in first]), text)
    reasons = too_few(len(set(store.rows["source"]))), cannot_draw(share, config.model.path)
    return [reason for reason in reasons if reason]


def _score_both(config: Config, base: VideoModel, trained: VideoModel, store: PairStore, device: torch.device) -> dict:
    networks = {"before": base.transformer, "after": trained.transformer}
    return {
        when: describe(
            score_pairs(config, base, store, network, base.transformer, f"scoring held-out pairs {when}", device)
        )
        for when, network in networks.items()
    }


def _real_clips(config: Config, model: VideoModel, store: PairStore, device: torch.device) -> Tensor:
    """Frames of the held-out clips, or of the winners where both sides were sampled, uint8 [count, F, H, W, 3]."""
    if store.info.kind == "rollouts":
        return torch.cat([model.decode_video(pair.winner[None].to(device)) for pair in store])
    names = list(dict.fromkeys(store.rows["source"]))
    return torch.stack([decode_clip(source_folder(config) / name, video_spec(config)) for name in names])


def _through_vae(config: Config, model: VideoModel, clips: Tensor) -> Tensor:
    """The clips encoded and decoded, uint8 as they came: the best that any samples of this model can look like."""
    size = config.evaluation.batch_size
    with progress("real clips through the VAE", len(clips)) as bar:
        rebuilt = []
        for part in clips.split(size):
            rebuilt.append(model.decode_video(model.encode_video(part)))
            bar.advance(len(part))
    return torch.cat(rebuilt)


def _measure(
    config: Config, rows: list[dict], frames: dict[tuple[str, int], Tensor], real: Tensor, rebuilt: Tensor
) -> tuple[dict, list[dict]]:
    """Numbers of both models' samples, and of each pair of samples, in the order of `rows`."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    models = list(dict.fromkeys(name for name, _ in frames))
    together = {name: torch.cat([frames[name, seed] for seed in seeds]) for name in models}
    measured: dict = {"frechet": None, "fault_rate": None, "prompt_following": None}
    if min(len(real), len(rows) // len(seeds)) > 1:  # a covariance needs two
        wanted = clip_features(real)
        measured["frechet"] = {
            name: [frechet_distance(clip_features(frames[name, seed]), wanted) for seed in seeds] for name in models
        }
    for label, measure in (("motion", motion_amount), ("flicker", temporal_flicker), ("edge_energy", edge_energy)):
        clips = {"real": real, "real_through_vae": rebuilt, **together}
        measured[label] = {name: measure(videos).mean().item() for name, videos in clips.items()}
    samples = [dict(row) for row in rows]
    change = (together["base"].float() - together["aligned"].float()).abs().flatten(1).mean(1)
    for sample, value in zip(samples, change.tolist(), strict=True):
        sample["change"] = value
    verdicts = {name: judge([row["prompt"] for row in rows], videos) for name, videos in together.items()}
    judged = {name: found for name, found in verdicts.items() if found}
    if judged.keys() >= {"base", "aligned"}:
        of = {name: (found.faulty, found.followed) for name, found in judged.items()}
        for place, label in enumerate(("fault_rate", "prompt_following")):
            measured[label] = change_of(of["base"][place], of["aligned"][place]) | {"samples": len(rows)}
        for number, sample in enumerate(samples):
            for name, found in judged.items():
                sample[f"fault_{name}"] = float(found.fault[number])
                sample[f"followed_{name}"] = bool(found.followed[number])
        maps: dict[str, Any] = {name: np.rint(255 * found.cells).astype(np.uint8) for name, found in judged.items()}
        np.savez_compressed(samples_folder(config) / MAPS, **maps)
    return measured, samples


def summarize(config: Config, pairs: dict, pictures: dict, unjudged: list[str], device: torch.device) -> dict:
    before, after = pairs["before"], pairs["after"]
    student = config.few_step_sampler
    checks = criteria(after, pictures, few_step=student is not None)
    if student:
        say(f"the aligned model is a student: it samples in {student.num_steps} steps without guidance; that is judged")
    for check in checks:
        say(f"{'reached' if check['reached'] else 'NOT reached'}: {check['text']}")
    found = verdict(checks, unjudged)
    for reason in unjudged:
        say(f"cannot be judged: {reason}")
    say(f"verdict: {found}")
    return {
        "family": config.model.family,
        "verdict": found,
        "reached": found == "reached",
        "unjudged": unjudged,
        "criteria": checks,
        "student_steps": student.num_steps if student else None,
        "accuracy": {
            name: {"before": before[f"{name}_accuracy"], "after": after[f"{name}_accuracy"]}
            for name in ("region", "global")
        },
        "winner_error": relative_change(after, "w"),
        "loser_error": relative_change(after, "l"),
        **pictures,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }


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
