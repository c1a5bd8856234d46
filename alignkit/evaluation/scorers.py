"""Published scorers of videos, where they are installed: VBench, HPSv2, VideoAlign. None of them comes with alignkit.

Each takes a folder's video files and their prompts and returns numbers by name. What is not installed is left out and
said to be.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from alignkit.media.videos import read_video

FRAMES = 8  # of a video that HPSv2, a scorer of pictures, looks at
# Those that VBench offers for prompts that are not its own and that need no detection model.
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


Scorer = Callable[[list[Path], list[str], Path], dict[str, list[float]]]
"""(videos, prompts, a folder for its own files) to numbers by name, each with one for every video."""


def installed() -> dict[str, Scorer]:
    """The scorers that can be imported here, by name."""
    return {name: scorer for name, scorer in SCORERS.items() if _is_there(MODULES[name])}


def score(videos: list[Path], prompts: list[str], work: Path) -> dict[str, float]:
    """Every number that the installed scorers give, means over `videos`; `work` is for their own files."""
    found: dict[str, float] = {}
    for scorer in installed().values():
        found |= {name: float(np.mean(values)) for name, values in scorer(videos, prompts, work).items()}
    return found


def scores_to_rank_by(name: str, videos: list[Path], prompts: list[str], work: Path) -> list[float]:
    """One number a video, the higher the better: VideoAlign's "Overall", HPSv2's score, the mean of VBench's
    dimensions. The scorer has to be installed."""
    numbers = SCORERS[name](videos, prompts, work)
    chosen = [numbers["videoalign/Overall"]] if name == "VideoAlign" else list(numbers.values())
    return [float(value) for value in np.mean(chosen, axis=0)]


def _vbench(videos: list[Path], prompts: list[str], work: Path) -> dict[str, list[float]]:
    import torch
    from vbench import VBench

    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = VBench(device, str(work / "full_info.json"), str(work))
    named = {str(video): prompt for video, prompt in zip(videos, prompts, strict=True)}
    bench.evaluate(
        videos_path=str(videos[0].parent),
        name="alignkit",
        prompt_list=named,
        dimension_list=list(DIMENSIONS),
        mode="custom_input",
    )
    results = json.loads((work / "alignkit_eval_results.json").read_text())
    found = {}
    for name, (mean, each) in results.items():
        by_video = {Path(row["video_path"]).name: float(row["video_results"]) for row in each}
        alone = len(videos) == 1 or not each
        found[f"vbench/{name}"] = [float(mean) if alone else by_video[video.name] for video in videos]
    return found


def _hpsv2(videos: list[Path], prompts: list[str], work: Path) -> dict[str, list[float]]:
    import hpsv2

    scores = []
    for video, prompt in zip(videos, prompts, strict=True):
        frames = read_video(video).numpy()
        times = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
        pictures = [Image.fromarray(frames[t]) for t in times]
        scores.append(float(np.mean([float(s) for s in hpsv2.score(pictures, prompt, hps_version="v2.1")])))
    return {"hpsv2.1": scores}


def _videoalign(videos: list[Path], prompts: list[str], work: Path) -> dict[str, list[float]]:
    """VideoAlign's repository is no package: its folder, with `checkpoints` in it, has to be on PYTHONPATH."""
    import inference
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoints = Path(inference.__file__).parent / "checkpoints"
    model = inference.VideoVLMRewardInference(str(checkpoints), device=device, dtype=torch.bfloat16)
    rewards = model.reward([str(video) for video in videos], prompts, use_norm=True)
    names = ("VQ", "MQ", "TA", "Overall")
    return {f"videoalign/{name}": [float(reward[name]) for reward in rewards] for name in names}


SCORERS: dict[str, Scorer] = {"VBench": _vbench, "HPSv2": _hpsv2, "VideoAlign": _videoalign}
MODULES = {"VBench": "vbench", "HPSv2": "hpsv2", "VideoAlign": "inference"}
INSTALL = {
    "VBench": "pip install vbench",
    "HPSv2": "pip install hpsv2",
    "VideoAlign": "clone its repository, with its checkpoints, and put it on PYTHONPATH",
}


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return True
    spec = importlib.util.find_spec(module)
    if spec is None or module != MODULES["VideoAlign"]:
        return spec is not None
    # another package has this name too
    return spec.origin is not None and "VideoVLMRewardInference" in Path(spec.origin).read_text(encoding="utf-8")
