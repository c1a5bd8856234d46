"""A small run directory with numbers that hang together: a square that moves, blurred and noised."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.evaluation.measures import edge_energy, motion_amount, temporal_flicker
from alignkit.media.videos import write_video

sys.path.insert(0, str(Path(__file__).parent))  # report_page.py

STEPS, FRAMES, SIZE = 60, 9, 32
PROMPT = 'a <b>red</b> square & a "quoted" word'


def square(seed: int, noise: float = 0.0) -> np.ndarray:
    """A red square that moves right over grey, uint8 [F, H, W, 3]."""
    generator = np.random.default_rng(seed)
    video = np.full((FRAMES, SIZE, SIZE, 3), 120.0)
    top = int(generator.integers(4, 16))
    for t in range(FRAMES):
        video[t, top : top + 10, 2 + 2 * t : 12 + 2 * t] = (215, 35, 35)
    video += noise * generator.standard_normal(video.shape)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def metrics_rows(steps: int = STEPS) -> list[dict]:
    """A plausible run: the logits grow, everything else follows from them."""
    generator = np.random.default_rng(0)
    beta, rows = 5000.0, []
    for step in range(1, steps + 1):
        progress = (step - 1) / steps
        gap_w, gap_l = -1e-4 * progress, 3e-4 * progress
        logit = -beta / 2 * (gap_w - gap_l) + 0.2 * progress * generator.standard_normal()
        error = 0.2 + 0.05 * generator.standard_normal()
        rows.append(
            {
                "step": step,
                "loss": 2 * float(np.log1p(np.exp(-logit))) + 0.1 * error,
                "lr": 3e-6 * min(1.0, step / 10),
                "grad_norm": 0.5 + 0.1 * generator.random(),
                "region/accuracy": 0.5 + 0.4 * progress + 0.05 * generator.standard_normal() * (step > 1),
                "global/accuracy": 0.5 + 0.3 * progress,
                "region/gap_w": gap_w,
                "region/gap_l": gap_l,
                "global/gap_w": gap_w / 5,
                "global/gap_l": gap_l / 5,
                "error_w": error,
                "error_l": error + 0.01,
                "region/logit": logit,
                "global/logit": logit / 5,
                "region/gradient_factor": float(1 / (1 + np.exp(logit))),
                "region/saturated": 0.0,
                "error_by_timestep": [0.4 + 0.01 * progress, None, 0.1],
                "region_empty": 0.0,
            }
        )
    rows[7]["grad_norm"] = None  # a step that was skipped
    return rows


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, *, reached: bool = True, samples: int = 4, pairs: int = 2) -> Path:
    """Write every file that a finished run leaves for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    real = torch.stack([torch.from_numpy(square(seed)) for seed in range(4)])
    base = torch.stack([torch.from_numpy(square(seed, noise=12)) for seed in range(4)])
    aligned = torch.stack([torch.from_numpy(square(seed, noise=6)) for seed in range(4)])
    measured = {
        name: {
            kind: measure(videos).mean().item()
            for kind, videos in (("real", real), ("real_through_vae", real), ("base", base), ("aligned", aligned))
        }
        for name, measure in (("motion", motion_amount), ("flicker", temporal_flicker), ("edge_energy", edge_energy))
    }
    summary = {
        "family": "wan",
        "reached": reached,
        "verdict": "reached" if reached else "not reached",
        "unjudged": [],
        "criteria": [
            {"name": "accuracy", "value": 0.81, "limit": 0.7, "reached": True, "text": "81.0% preferred (70% wanted)"},
            {
                "name": "winner error",
                "value": 0.002 if reached else 0.03,
                "limit": 0.01,
                "reached": reached,
                "text": "the error <changed> & more",
            },
        ],
        "accuracy": {"region": {"before": 0.5, "after": 0.81}, "global": {"before": 0.5, "after": 0.74}},
        "winner_error": {"before": 0.2, "after": 0.2004, "relative_change": 0.002},
        "loser_error": {"before": 0.21, "after": 0.2134, "relative_change": 0.0162},
        "frechet": {"base": [10.3, 9.8, 10.1], "aligned": [7.2, 7.9, 7.5]},
        **measured,
        "fault_rate": {"base": 0.41, "aligned": 0.14, "interval": [-0.36, -0.18], "samples": 64},
        "prompt_following": {"base": 0.86, "aligned": 0.875, "interval": [-0.05, 0.08], "samples": 64},
        "seconds": {"pairs": 61.2, "train": 143.0, "sample": 55.0, "eval": 30.5},
        "peak_memory_gb": 1.84,
        "versions": {"alignkit": "0.1.0", "torch": "2.13.0"},
        "device": "CPU, 2 threads",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        "model: {family: wan, path: tiny}\ndata:\n  fps: 8\ntrain: {global_batch_size: 16}\n"
        "objective: {beta: 5000, weight_region: 1.0, weight_global: 1.0}\nnote: <script>alert(1)</script>\n"
    )
    write_lines(folder / "train" / "metrics.jsonl", metrics_rows())
    levels = [
        {
            "sigma": sigma,
            "region_accuracy": 0.85 - 0.2 * sigma,
            "global_accuracy": 0.8 - 0.2 * sigma,
            "error_w_before": 0.1 + 0.4 * (1 - sigma),
            "error_w_after": (0.1 + 0.4 * (1 - sigma)) * (1.004 - 0.003 * sigma),
            "error_l_before": 0.1 + 0.4 * (1 - sigma),
            "error_l_after": (0.1 + 0.4 * (1 - sigma)) * 1.02,
        }
        for sigma in (0.95, 0.75, 0.5, 0.3, 0.1)
    ]
    (folder / "eval.json").write_text(json.dumps({"by_timestep": levels}))
    (folder / "report_pairs").mkdir(exist_ok=True)
    for i in range(pairs):
        mask = np.zeros((3, 8, 8), np.uint8)
        mask[:, 2:5, 2:6] = 1
        winner, loser = square(i), square(i)
        loser[:, 8:20, 8:24] = square(i + 9, noise=30)[:, 8:20, 8:24]
        np.savez_compressed(
            folder / "report_pairs" / f"{i:03d}.npz", winner=winner, loser=loser, mask=mask, prompt=PROMPT, strength=0.8
        )
    rows = []
    for i in range(samples):
        for kind, noise in (("base", 12), ("aligned", 6)):
            write_video(folder / "samples" / kind / f"{i:03d}.mp4", torch.from_numpy(square(i, noise)), 8)
        rows.append(
            {"prompt": f"{PROMPT} {i}", "seed": 0, "base": f"base/{i:03d}.mp4", "aligned": f"aligned/{i:03d}.mp4"}
        )
    write_lines(folder / "samples" / "samples.jsonl", rows)
    write_lines(folder / "skipped.jsonl", [{"video": "bad<1>.mp4", "reason": "too short: it has 3 frames"}])
    return folder


@pytest.fixture
def make_run():
    """The function that writes a whole run directory, for runs unlike `run`."""
    return write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
