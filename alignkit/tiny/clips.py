"""Rendered training clips: one coloured shape that moves over a muted background, with a caption.

A clip is a pure function of (seed, index): 48x48 pixels, 17 frames, 8 frames a second, RGB.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alignkit.media.videos import read_video, write_video

SIZE = 48
FRAMES = 17
FPS = 8

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
MOTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("plain", "gradient", "stripes", "checkered")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}

COLOUR_RGB = {"red": (215, 35, 35), "green": (35, 165, 60), "blue": (40, 75, 225), "yellow": (245, 215, 35)}
MOTION_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
BACKGROUND_WORD = {
    "plain": "plain",
    "gradient": "gradient",
    "stripes": "striped",
    "checkered": "checkered",
}
# Muted, so that no background is mistaken for one of the four shape colours.
TONES = np.array(
    [
        (196, 192, 186),
        (150, 152, 158),
        (104, 108, 116),
        (70, 70, 78),
        (176, 160, 140),
        (140, 158, 166),
        (160, 146, 168),
        (122, 134, 118),
        (226, 222, 216),
    ],
    dtype=np.float64,
)
SUPERSAMPLES = 4


@dataclass(frozen=True)
class RenderedClip:
    """frames: uint8 [F, H, W, 3]; caption: str; attributes: shape, colour, motion, background."""

    frames: np.ndarray
    caption: str
    attributes: dict[str, str]


@dataclass(frozen=True)
class Layers:
    """A clip before it is put together: background float64 [H, W, 3]; colour float64 [3] of the shape; cover float64
    [F, H, W], the share of each pixel that the shape covers; attributes."""

    background: np.ndarray
    colour: np.ndarray
    cover: np.ndarray
    attributes: dict[str, str]

    def composed(self, cover: np.ndarray) -> np.ndarray:
        """The shape's colour over the background by ``cover`` [F, H, W]: uint8 [F, H, W, 3]."""
        frames = self.background + cover[..., None] * (self.colour - self.background)
        return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ClipSet:
    """frames: uint8 [N, F, H, W, 3]; captions and attributes: N each."""

    frames: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]


def caption_of(attributes: dict[str, str]) -> str:
    """The caption that names all four attributes."""
    return (
        f"a {attributes['colour']} {attributes['shape']} moves {attributes['motion']} "
        f"on a {BACKGROUND_WORD[attributes['background']]} background"
    )


def draw_attributes(rng: np.random.Generator) -> dict[str, str]:
    """Four independent uniform draws, one per attribute."""
    return {name: values[int(rng.integers(len(values)))] for name, values in ATTRIBUTES.items()}


def random_attributes(seed: int, index: int) -> dict[str, str]:
    """The attributes of clip (seed, index), without rendering it."""
    return draw_attributes(np.random.default_rng([seed, index]))


def render_clip(seed: int, index: int, shape: str | None = None) -> RenderedClip:
    """Render clip ``index`` of the family ``seed``: the same two numbers always give the same clip.

    ``shape``: the same clip with another shape in its shape's place.
    """
    layers = clip_layers(seed, index, shape)
    return RenderedClip(layers.composed(layers.cover), caption_of(layers.attributes), layers.attributes)


def clip_layers(seed: int, index: int, shape: str | None = None) -> Layers:
    """What ``render_clip`` of the same arguments puts together."""
    rng = np.random.default_rng([seed, index])
    attributes = draw_attributes(rng)
    attributes |= {"shape": shape} if shape else {}
    background = _background(rng, attributes["background"])
    colour = np.array(COLOUR_RGB[attributes["colour"]]) + rng.uniform(-12, 12, 3)
    return Layers(background, colour, _shape_cover(rng, attributes["shape"], attributes["motion"]), attributes)


def write_clips(
    folder: str | Path, count: int, seed: int, first: int = 0, *, written: Callable[[], None] = lambda: None
) -> Path:
    """Write clips ``first`` … ``first + count - 1`` as h264 mp4 files with ``captions.jsonl``.

    Each line of the captions file holds ``video`` (file name), ``caption`` and ``attributes``; it is written
    last and replaces one that was there. ``written()`` is called after each clip.
    Returns the path of the captions file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(first, first + count):
        clip = render_clip(seed, index)
        name = f"clip_{index:06d}.mp4"
        write_video(folder / name, torch.from_numpy(clip.frames), FPS)
        lines.append(json.dumps({"video": name, "caption": clip.caption, "attributes": clip.attributes}))
        written()
    captions = folder / "captions.jsonl"
    captions.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return captions


def read_clips(folder: str | Path, decode: bool = True) -> ClipSet:
    """Read what ``write_clips`` wrote; ``decode=False`` leaves the frames out."""
    folder = Path(folder)
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    frames = np.empty((len(entries) if decode else 0, FRAMES, SIZE, SIZE, 3), np.uint8)
    for i in range(len(frames)):
        frames[i] = read_video(folder / entries[i]["video"]).numpy()
    captions = [entry["caption"] for entry in entries]
    return ClipSet(frames, captions, [entry["attributes"] for entry in entries])


def _background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """float64 [H, W, 3], drawn at four times the size and averaged, so that edges are smooth."""
    first, second = TONES[rng.permutation(len(TONES))[:2]] + rng.uniform(-8, 8, (2, 3))
    if np.abs(first - second).mean() < 30:  # two tones must be told apart
        second = first + np.sign(128 - first.mean()) * rng.uniform(40, 70)
    angle = rng.uniform(0, 2 * np.pi)
    period = rng.uniform(9, 15)
    phase = rng.uniform(0, 1, 2)
    if kind == "plain":
        return np.broadcast_to(first, (SIZE, SIZE, 3)).copy()
    grid = (np.arange(SIZE * SUPERSAMPLES) + 0.5) / SUPERSAMPLES
    y, x = np.meshgrid(grid, grid, indexing="ij")
    if kind == "gradient":
        along = (x - SIZE / 2) * np.cos(angle) + (y - SIZE / 2) * np.sin(angle)
        mix = np.clip(0.5 + along / SIZE, 0, 1)
    elif kind == "stripes":
        angle = np.pi / 4 * np.floor(4 * angle / np.pi)
        along = x * np.cos(angle) + y * np.sin(angle)
        mix = ((along / period + phase[0]) % 1.0 < 0.5).astype(np.float64)
    else:
        cell = period / 2 + 2
        mix = (np.floor(x / cell + 2 * phase[0]) + np.floor(y / cell + 2 * phase[1])) % 2
    mix = mix.reshape(SIZE, SUPERSAMPLES, SIZE, SUPERSAMPLES).mean(axis=(1, 3))
    return first + mix[..., None] * (second - first)


def _shape_cover(rng: np.random.Generator, shape: str, motion: str) -> np.ndarray:
    """Share of each pixel that the shape covers, float64 [F, H, W], from signed distances."""
    radius = rng.uniform(6.5, 8.5)
    speed = rng.uniform(1.1, 1.7)  # pixels a frame
    step = np.array(MOTION_STEP[motion])
    travel = speed * (FRAMES - 1)
    # The middle of the path keeps the whole shape inside the frame at both ends.
    slack = SIZE / 2 - radius - np.abs(step) * travel / 2
    middle = SIZE / 2 + rng.uniform(-1, 1, 2) * slack
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle + time[:, None] * speed * step  # [F, 2], x then y
    grid = np.arange(SIZE) + 0.5
    dx = grid[None, None, :] - centre[:, 0, None, None]
    dy = grid[None, :, None] - centre[:, 1, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    else:
        low = dy - 0.62 * radius
        side = np.sqrt(0.75) * np.abs(dx) - 0.5 * dy - 0.62 * radius
        distance = np.maximum(low, side)
    return np.clip(0.5 - distance, 0, 1)
