"""Local faults of drawn clips, as video models make them: what a set of mixed quality holds and a detector looks for.

A faulty clip is a pure function of (seed, index), as the clip it spoils.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignkit.tiny.clips import ATTRIBUTES, COLOUR_RGB, FRAMES, SIZE, Layers, clip_layers

SHORTEST, LONGEST = 5, 12  # frames that a fault lasts
VISIBLE = 24.0  # levels, of the channel that differs most: from here on a pixel counts as faulty
FEWEST_PIXELS = 40  # of all frames together
_SPOILED = 1  # keeps the faults' random numbers apart from the clips' own


@dataclass(frozen=True)
class FaultyClip:
    """frames: uint8 [F, H, W, 3]; where: bool [F, H, W], what the faults change visibly; kinds: of its faults, in
    order; attributes: what is really drawn; captioned: what the caption says."""

    frames: np.ndarray
    where: np.ndarray
    kinds: tuple[str, ...]
    attributes: dict[str, str]
    captioned: dict[str, str]


def glitch(rng: np.random.Generator, layers: Layers, frames: np.ndarray) -> np.ndarray:
    """A block of strong colours that jumps now and then, as of a broken stream."""
    height, width = rng.integers(10, 19, size=2)
    times = _times(rng)
    for place in np.array_split(times, rng.integers(1, 4)):
        top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
        cell = int(rng.integers(5, 9))
        tones = rng.integers(0, 256, size=(-(-height // cell), -(-width // cell), 3))
        block = tones.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
        frames[place, top : top + height, left : left + width] = block
    return frames


def ghost(rng: np.random.Generator, layers: Layers, frames: np.ndarray) -> np.ndarray:
    """A second, paler copy of the shape in its own or another colour, beside it for a while."""
    times = _times(rng)
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(13, 20)
    by = np.rint(far * np.array([np.sin(angle), np.cos(angle)])).astype(int)
    cover = _moved(layers.cover[times], *by)
    colour = layers.colour if rng.random() < 0.5 else np.array(list(COLOUR_RGB.values()))[rng.integers(4)]
    return _painted(frames, times, cover * rng.uniform(0.5, 0.8), colour)


def smear(rng: np.random.Generator, layers: Layers, frames: np.ndarray) -> np.ndarray:
    """The shape leaves a broad trail of its own colour behind."""
    times, length = _times(rng), int(rng.integers(8, 13))
    trail = np.zeros((len(times), SIZE, SIZE))
    for back in range(1, length + 1):
        trail = np.maximum(trail, (1 - back / (length + 2)) * layers.cover[np.maximum(times - back, 0)])
    return _painted(frames, times, 0.9 * trail * (1 - layers.cover[times]), layers.colour)


def torn(rng: np.random.Generator, layers: Layers, frames: np.ndarray) -> np.ndarray:
    """Bands of the shape are pushed aside, so that it falls apart."""
    times = _times(rng)
    cover = layers.cover.copy()
    axis = int(rng.integers(1, 3))
    band = int(rng.integers(4, 8))
    shifts = rng.integers(5, 11, size=SIZE // band + 2) * (-1) ** np.arange(SIZE // band + 2)
    for line in range(SIZE):
        by = [0, 0]
        by[2 - axis] = int(shifts[line // band])
        part = (slice(None), slice(line, line + 1)) if axis == 1 else (slice(None), slice(None), slice(line, line + 1))
        cover[part] = _moved(layers.cover[part], *by)
    frames[times] = layers.composed(cover)[times]
    return frames


def flicker(rng: np.random.Generator, layers: Layers, frames: np.ndarray) -> np.ndarray:
    """Part of the picture, with what is in it, is bright and dark by turns, four frames each.

    Frames 1 to 4, 5 to 8, … share a latent frame: what is faster the VAEs average away.
    """
    height, width = rng.integers(14, 27, size=2)
    top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
    amount = rng.uniform(50, 90) * rng.choice([-1, 1])
    first = int(rng.integers(3))
    for turn in range(first, min(first + int(rng.integers(2, 4)), 4)):
        times = slice(1 + 4 * turn, 5 + 4 * turn)
        part = frames[times, top : top + height, left : left + width].astype(float) + amount * (-1) ** turn
        frames[times, top : top + height, left : left + width] = np.clip(np.rint(part), 0, 255)
    return frames


KINDS: dict[str, Callable[[np.random.Generator, Layers, np.ndarray], np.ndarray]] = {
    "glitch": glitch,
    "ghost": ghost,
    "smear": smear,
    "torn": torn,
    "flicker": flicker,
}


def faulty_clip(
    seed: int, index: int, *, fault_share: float = 1.0, wrong_share: float = 0.0, kinds: tuple[str, ...] = tuple(KINDS)
) -> FaultyClip:
    """Clip (seed, index) of `alignkit.tiny.clips`, spoiled with the given probabilities.

    fault_share: that it has faults, one or two (as likely) of different `kinds`. wrong_share: that its caption names
    one attribute, any of the four, wrongly. A fault that would hardly show is drawn again.
    """
    layers = clip_layers(seed, index)
    rng = np.random.default_rng([seed, index, _SPOILED])
    clean = layers.composed(layers.cover)
    captioned = dict(layers.attributes)
    spoiled, wrong = rng.random(2) < (fault_share, wrong_share)
    if wrong:
        name = list(ATTRIBUTES)[rng.integers(len(ATTRIBUTES))]
        captioned[name] = str(rng.choice([value for value in ATTRIBUTES[name] if value != captioned[name]]))
    frames = clean
    chosen: tuple[str, ...] = ()
    if spoiled:
        chosen = tuple(str(kind) for kind in rng.permutation(kinds)[: rng.integers(1, min(2, len(kinds)) + 1)])
        for kind in chosen:
            before = frames
            while (_differs(frames, before)).sum() < FEWEST_PIXELS:
                frames = KINDS[kind](rng, layers, before.copy())
    return FaultyClip(frames, _differs(frames, clean), chosen, layers.attributes, captioned)


def _differs(frames: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(frames.astype(float) - others).max(axis=-1) >= VISIBLE


def _times(rng: np.random.Generator) -> np.ndarray:
    """A run of frames."""
    length = int(rng.integers(SHORTEST, LONGEST + 1))
    return int(rng.integers(FRAMES - length + 1)) + np.arange(length)


def _moved(cover: np.ndarray, down: int, right: int) -> np.ndarray:
    """Covers [F, h, w] moved by whole pixels; what leaves the picture is gone."""
    moved = np.zeros_like(cover)
    height, width = cover.shape[1:]
    if abs(down) < height and abs(right) < width:
        to = [slice(max(by, 0), size + min(by, 0)) for by, size in ((down, height), (right, width))]
        of = [slice(max(-by, 0), size - max(by, 0)) for by, size in ((down, height), (right, width))]
        moved[:, to[0], to[1]] = cover[:, of[0], of[1]]
    return moved


def _painted(frames: np.ndarray, times: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
    part = frames[times] + cover[..., None] * (colour - frames[times])
    frames[times] = np.clip(np.rint(part), 0, 255)
    return frames
