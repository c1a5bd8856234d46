"""`alignkit eval`: held-out pairs and samples measured before and after, and a verdict in plain words."""

import platform
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit import __version__
from alignkit.config import Config
from alignkit.evaluation.drawn import clip_features, judge
from alignkit.evaluation.measures import frechet_distance
from alignkit.evaluation.pairs import describe
from alignkit.evaluation.parts import MEASURES, SCORED, Parts
from alignkit.evaluation.readiness import cannot_draw, too_few
from alignkit.evaluation.regions import write_regions
from alignkit.evaluation.samples import MAPS, MODELS, listed_samples, read_samples, samples_folder
from alignkit.evaluation.verdict import change_of, criteria, relative_change, verdict
from alignkit.files import write_json
from alignkit.models import load_model, working_dtype
from alignkit.progress import progress, say
from alignkit.sharing import one_at_a_time, run_lock
from alignkit.stores.blocks import one_thread

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "datasets", "av")


def evaluate(config: Config, device: torch.device, conclude: bool = True) -> dict[str, Any] | None:
    """Score held-out pairs and the samples of `alignkit sample`; writes eval.json and returns the summary's content.

    Beside it, for the report: samples/maps.npz (`MAPS`) and what both models make of held-out regions.

    Any number of processes may call this at once: they share the work of networks and VAE (`Parts`), and one of them is
    to `conclude`; the others return None as soon as all is measured.
    """
    parts = Parts(config, device)
    with ExitStack() as held, one_thread(device):
        for name in MODELS:  # nobody samples others under other terms meanwhile
            held.enter_context(run_lock(samples_folder(config) / name, "eval", shared=True))
        listed_samples(config)
        held.enter_context(parts.held())
        parts.make(show=conclude)
        if not conclude:
            return None
        held.enter_context(one_at_a_time(parts.folder / ".summary.lock"))
        return _concluded(config, parts, device)


def _concluded(config: Config, parts: Parts, device: torch.device) -> dict[str, Any]:
    pairs = {when: describe(parts.scores(when)) for when in SCORED}
    rows, frames = read_samples(config)
    with progress("measuring samples", 1) as bar:
        pictures, samples = _measure(config, rows, frames, parts.frames(), parts.rebuilt())
        bar.advance()
    vae = load_model(config.model, with_transformer=False, device=device, dtype=working_dtype(config.model, device))
    write_regions(config, vae, parts.shown, parts.redrawn(), device)
    write_json(
        config.output.dir / "eval.json",
        {"pairs": pairs, "by_timestep": pairs["after"]["by_timestep"], **pictures, "samples": samples},
    )
    reasons = too_few(len(set(parts.store.rows["source"]))), cannot_draw(parts.explained(), config.model.path)
    return summarize(config, pairs, pictures, [reason for reason in reasons if reason], device)


def _measure(
    config: Config,
    rows: list[dict[str, Any]],
    frames: dict[tuple[str, int], Tensor],
    real: Tensor,
    rebuilt: dict[str, float],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Numbers of both models' samples, and of each pair of samples, in the order of `rows`. rebuilt: MEASURES of `real`
    after the VAE."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    models = list(dict.fromkeys(name for name, _ in frames))
    together = {name: torch.cat([frames[name, seed] for seed in seeds]) for name in models}
    measured: dict[str, Any] = {"frechet": None, "fault_rate": None, "prompt_following": None}
    if min(len(real), len(rows) // len(seeds)) > 1:  # a covariance needs two
        wanted = clip_features(real)
        measured["frechet"] = {
            name: [frechet_distance(clip_features(frames[name, seed]), wanted) for seed in seeds] for name in models
        }
    for label, measure in MEASURES.items():
        means = {name: measure(videos).mean().item() for name, videos in {"real": real, **together}.items()}
        measured[label] = {"real": means.pop("real"), "real_through_vae": rebuilt[label], **means}
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


def summarize(
    config: Config, pairs: dict[str, Any], pictures: dict[str, Any], unjudged: list[str], device: torch.device
) -> dict[str, Any]:
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
