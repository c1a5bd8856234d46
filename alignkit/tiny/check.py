"""How good a tiny base is: samples from held-out prompts, seen by the judges.

``python -m alignkit.tiny.check --samples 64`` prints the shares that came out right and the share with a fault, at the
demo's own sampling settings, and, with ``--sheet``, writes a picture of the samples to look at: frames 0, 4, 8, 12
and 16 of each, in the order of the prompts.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from alignkit.config import load_config, shipped_config
from alignkit.files import write_lines
from alignkit.media.videos import write_video
from alignkit.models import shipped_model
from alignkit.tiny.classifier import NAMED, classify
from alignkit.tiny.clips import ATTRIBUTES, FPS, FRAMES, SIZE, caption_of, random_attributes
from alignkit.tiny.detector import FAULTY, fault_scores
from alignkit.tiny.recipes import FAMILIES

PROMPT_SEED = 7001
"""Prompts of clips of this seed, which no training stage sees."""


def sample(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 4.5,
    max_sequence_length: int = 64,
    batch: int = 16,
) -> np.ndarray:
    """Sample a clip for each prompt: uint8 [N, 17, 48, 48, 3]. Sample i depends on (seed, i) only."""
    parts = []
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(1_000_003 * seed + first + i) for i in range(len(chosen))]
        frames = pipeline(
            prompt=chosen,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            max_sequence_length=max_sequence_length,
            output_type="np",
        ).frames
        parts.append(np.rint(frames * 255).astype(np.uint8))
    return np.concatenate(parts)


def shares_right(frames: np.ndarray, attributes: list[dict[str, str]]) -> dict[str, float]:
    """Share of clips whose named attribute is the prompted one, for each, and for ``NAMED`` all at once."""
    named = classify(frames)
    right = {
        name: np.array([got == entry[name] for got, entry in zip(named[name], attributes, strict=True)])
        for name in ATTRIBUTES
    }
    shares = {name: float(values.mean()) for name, values in right.items()}
    return shares | {"all": float(np.logical_and.reduce([right[name] for name in NAMED]).mean())}


def contact_sheet(frames: np.ndarray, path: Path, columns: int = 4, scale: int = 2) -> None:
    """Write a PNG with one strip of five frames a clip, ``columns`` strips a row."""
    strips = [np.concatenate(list(clip[:: (FRAMES - 1) // 4]), axis=1) for clip in frames]
    strips = [np.pad(strip, ((2, 2), (4, 4), (0, 0))) for strip in strips]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    picture = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(picture).save(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkit.tiny.check", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="wan", help="which shipped model")
    parser.add_argument("--model", type=Path, help="a diffusers folder, instead of the shipped one")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the sampler; the demo's unless given")
    parser.add_argument("--guidance", type=float, help="the demo's unless given")
    parser.add_argument("--max-sequence-length", type=int, default=64)
    parser.add_argument("--videos", type=Path, help="write the samples (mp4) and FAMILY.jsonl into this folder")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) here")
    given = parser.parse_args(arguments)
    pipeline = DiffusionPipeline.from_pretrained(given.model or shipped_model(given.family))
    pipeline.set_progress_bar_config(disable=True)
    attributes = [random_attributes(PROMPT_SEED, i) for i in range(given.samples)]
    demo = load_config(shipped_config(f"{given.family}-tiny-localdpo.yaml"), ["output.dir=runs"]).sample
    started = time.monotonic()
    frames = sample(
        pipeline,
        [caption_of(entry) for entry in attributes],
        seed=given.seed,
        steps=given.steps or demo.num_inference_steps,
        guidance=demo.guidance_scale if given.guidance is None else given.guidance,
        max_sequence_length=given.max_sequence_length,
    )
    seconds = time.monotonic() - started
    faulty = float((fault_scores(frames) > FAULTY).mean())
    print(json.dumps(shares_right(frames, attributes) | {"faulty": faulty, "seconds": round(seconds, 1)}))
    if given.videos:
        given.videos.mkdir(parents=True, exist_ok=True)
        rows = [{"video": f"{given.family}-{i:03d}.mp4", "prompt": caption_of(a)} for i, a in enumerate(attributes)]
        for row, clip in zip(rows, frames, strict=True):
            write_video(given.videos / row["video"], torch.from_numpy(clip), FPS)
        write_lines(given.videos / f"{given.family}.jsonl", rows)
    if given.sheet:
        contact_sheet(frames, given.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
