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


def installed() -> dict[str, Callable[[list[Path], list[str], Path], dict[str, float]]]:
    """The scorers that can be imported here, by the name of what has to be."""
    return {name: scorer for name, scorer in SCORERS.items() if _is_there(MODULES[name])}


def score(videos: list[Path], prompts: list[str], work: Path) -> dict[str, float]:
    """Every number that the installed scorers give, means over `videos`; `work` is for their own files."""
    found: dict[str, float] = {}
    for scorer in installed().values():
        found |= scorer(videos, prompts, work)
    return found


def _vbench(videos: list[Path], prompts: list[str], work: Path) -> dict[str, float]:
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
    return {f"vbench/{name}": float(value[0]) for name, value in results.items()}


def _hpsv2(videos: list[Path], prompts: list[str], work: Path) -> dict[str, float]:
    import hpsv2

    scores = []
    for video, prompt in zip(videos, prompts, strict=True):
        frames = read_video(video).numpy()
        times = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
        scores += [
            float(s) for s in hpsv2.score([Image.fromarray(frames[t]) for t in times], prompt, hps_version="v2.1")
        ]
    return {"hpsv2.1": float(np.mean(scores))}


def _videoalign(videos: list[Path], prompts: list[str], work: Path) -> dict[str, float]:
    """VideoAlign's repository is no package: its folder, with `checkpoints` in it, has to be on PYTHONPATH."""
    import inference
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoints = Path(inference.__file__).parent / "checkpoints"
    model = inference.VideoVLMRewardInference(str(checkpoints), device=device, dtype=torch.bfloat16)
    rewards = model.reward([str(video) for video in videos], prompts, use_norm=True)
    return {f"videoalign/{name}": float(np.mean([r[name] for r in rewards])) for name in ("VQ", "MQ", "TA", "Overall")}


SCORERS = {"VBench": _vbench, "HPSv2": _hpsv2, "VideoAlign": _videoalign}
MODULES = {"VBench": "vbench", "HPSv2": "hpsv2", "VideoAlign": "inference"}


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return True
    spec = importlib.util.find_spec(module)
    if spec is None or module != MODULES["VideoAlign"]:
        return spec is not None
    # another package has this name too
    return bool(spec.origin) and "VideoVLMRewardInference" in Path(spec.origin).read_text(encoding="utf-8")
