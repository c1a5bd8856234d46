"""`alignkit compare`: the samples of two runs of the same prompts and noise, beside each other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.evaluation.drawn import judge
from alignkit.evaluation.intervals import Difference, difference
from alignkit.evaluation.measures import edge_energy, motion_amount, temporal_flicker
from alignkit.evaluation.samples import read_samples, samples_folder
from alignkit.evaluation.scorers import installed

SHARES = ("samples with a fault", "prompts followed", "good samples")
"""Measures that are so or not of a sample; "good": the prompt is followed and nothing is wrong."""
PLACES = ("output.dir", "pairs.folder", "rollout.folder")
"""Where things are: no setting in which two runs differ."""


@dataclass(frozen=True)
class Comparison:
    """settings: by key, those that are not the same. same_base: what the two bases drew is equal byte for byte."""

    runs: tuple[str, str]
    samples: int
    same_base: bool
    settings: dict[str, tuple[Any, Any]]
    differences: list[Difference]


def compare(first: Config, second: Config, work: Path) -> Comparison:
    """Measure what `alignkit sample` drew for both runs with their aligned models, sample by sample.

    work: a folder for what installed scorers write. Raises DataError where there are no samples, or they are of other
    prompts, seeds or sizes: their differences would be those of prompts and noises.
    """
    runs = str(first.output.dir), str(second.output.dir)
    read = [read_samples(config) for config in (first, second)]
    (rows, _), (others, _) = read
    if [(row["prompt"], row["seed"]) for row in rows] != [(row["prompt"], row["seed"]) for row in others]:
        raise DataError(
            f"{runs[1]}: its samples are of other prompts or seeds than those of {runs[0]}; sample both with the same "
            "sample.count, sample.seeds and held-out pairs"
        )
    frames = [_aligned(rows, found) for rows, found in read]
    if frames[0].shape != frames[1].shape:
        sizes = " and ".join("×".join(map(str, videos.shape[1:4])) for videos in frames)
        raise DataError(f"{runs[1]}: its samples have another size than those of {runs[0]}: {sizes}")
    files = [[samples_folder(config) / row["base"] for row in rows] for config in (first, second)]
    same_base = all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))
    measured = [
        _measured(config, rows, videos, work / str(place))
        for place, (config, videos) in enumerate(zip((first, second), frames, strict=True))
    ]
    differences = [difference(name, *(numbers[name] for numbers in measured)) for name in measured[0]]
    return Comparison(runs, len(rows), same_base, _settings(first, second), differences)


def _aligned(rows: list[dict[str, Any]], frames: dict[tuple[str, int], Tensor]) -> Tensor:
    """uint8 [N, F, H, W, 3] in the order of `rows`, which go by seed."""
    return torch.cat([frames["aligned", seed] for seed in dict.fromkeys(row["seed"] for row in rows)])


def _measured(config: Config, rows: list[dict[str, Any]], videos: Tensor, work: Path) -> dict[str, np.ndarray]:
    """Numbers of each sample, [N], by measure."""
    prompts = [row["prompt"] for row in rows]
    found: dict[str, np.ndarray] = {}
    judged = judge(prompts, videos)
    if judged:
        found |= dict(zip(SHARES, (judged.faulty, judged.followed, judged.good), strict=True))
    for name, measure in (("motion", motion_amount), ("flicker", temporal_flicker), ("edge energy", edge_energy)):
        found[f"{name}, levels"] = measure(videos).numpy()
    files = [samples_folder(config) / row["aligned"] for row in rows]
    for scorer in installed().values():
        found |= {name: np.array(values) for name, values in scorer(files, prompts, work).items()}
    return found


def _settings(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    one, other = (_by_key(config.model_dump(mode="json")) for config in (first, second))
    keys = [key for key in {**one, **other} if key not in PLACES]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _by_key(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _by_key(value, f"{name}{key}.") if isinstance(value, dict) and value else {f"{name}{key}": value}
    return found


def described(found: Comparison) -> str:
    """The comparison as lines of text."""
    lines = [f"A  {found.runs[0]}", f"B  {found.runs[1]}"]
    for key, (one, other) in found.settings.items():
        lines.append(f"   {key}: {json.dumps(one)} in A, {json.dumps(other)} in B")
    lines.append(f"{found.samples} samples of each, of the same prompts and seeds")
    if not found.same_base:
        lines.append(
            "the bases did not draw the same: sizes, sampler, weights or devices differ, not the training alone"
        )
    lines.append("")
    width = max(len(each.measure) for each in found.differences)
    lines.append(f"{'':{width}}  {'A':>8}  {'B':>8}  B − A, 95 % interval")
    for each in found.differences:
        scale, digits, sign = (100, 1, " %") if each.measure in SHARES else (1, 3, "")
        first, second = (f"{scale * value:.{digits}f}{sign}" for value in (each.first, each.second))
        change, low, high = each.written(scale, digits)
        unit = " points" if sign else ""
        word = "" if each.beyond_chance else "  (may be chance)"
        lines.append(f"{each.measure:{width}}  {first:>8}  {second:>8}  {change}{unit}, {low} to {high}{word}")
    return "\n".join(lines)
