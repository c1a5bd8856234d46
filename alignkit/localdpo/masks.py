"""Random spatio-temporal regions: closed Bézier blobs that rest or move (arXiv 2601.04068, section 3.2).

Shapes are made in pixel units at the latent frame rate and rasterised at the centres of the latent grid, so
that no full-size picture is ever drawn. A mask is a function of (seed, pair id, draw) alone.
"""

import math

import numpy as np
import torch
from torch import Tensor

from alignkit.config import MaskSection
from alignkit.errors import ConfigError
from alignkit_kernels import NoiseKey, Stream, keyed_rand

CURVE_POINTS = 8  # straight pieces per Bézier curve: far below a latent cell at any size in use
MAX_REDRAWS = 64  # of a mask that comes out empty or full
MAX_REDRAWS_FOR_AREA = 2048  # of 63K pairs one fails where a share is met by one mask in 190
# Chosen so that masks at 480×720 cover what the published ones do: 9.4 % of the latent volume on average.
SIZE = 0.70


class _Draws:
    """Uniform numbers in [0, 1) of one mask, taken in order from its keyed stream."""

    def __init__(self, seed: int, pair_id: int, draw: int):
        self._key = NoiseKey(seed, torch.tensor([pair_id]), draw, Stream.MASK)
        self._values: list[float] = []
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if self._next == len(self._values):  # a keyed stream is the same however much of it is drawn
            count = max(1024, 2 * len(self._values))
            self._values = keyed_rand((1, count), self._key, device="cpu", dtype=torch.float64)[0].tolist()
        value = self._values[self._next]
        self._next += 1
        return low + (high - low) * value

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return min(low + int(self.uniform() * (high - low + 1)), high)

    def normal(self) -> float:
        radius = math.sqrt(-2 * math.log(1 - self.uniform()))
        return radius * math.cos(2 * math.pi * self.uniform())

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability


def region_mask(
    latent_shape: tuple[int, int, int], pixel_shape: tuple[int, int], options: MaskSection, *, seed: int, pair_id: int
) -> Tensor:
    """One video's mask, uint8 [F, H, W] on the latent grid (1: regenerate), never empty and never full.

    latent_shape: (F, H, W) of the latents; pixel_shape: (height, width) of the frames, in which sizes and
    speeds are drawn. Attempts that come out empty or full on the latent grid, or with a share of the volume outside
    `options.area`, are redrawn. Raises ConfigError when none of 2048 has such a share.
    """
    low, high = options.area
    limited = (low, high) != (0.0, 1.0)
    for draw in range(MAX_REDRAWS_FOR_AREA if limited else MAX_REDRAWS):
        mask = _draw_mask(latent_shape, pixel_shape, options, _Draws(seed, pair_id, draw))
        if mask.any() and not mask.all() and low <= mask.mean() <= high:
            return torch.from_numpy(mask)
    if limited:
        raise ConfigError(
            f"pairs.mask.area: none of {MAX_REDRAWS_FOR_AREA} masks of pair {pair_id} covers {low:g} to {high:g} "
            f"of the video; widen it, or change pairs.mask.blobs"
        )
    # A grid too coarse for the shapes (a few cells in all): regenerate its middle cell.
    mask = np.zeros(latent_shape, dtype=np.uint8)
    mask[:, latent_shape[1] // 2, latent_shape[2] // 2] = 1
    return torch.from_numpy(mask)


def _draw_mask(
    latent_shape: tuple[int, int, int], pixel_shape: tuple[int, int], options: MaskSection, draws: _Draws
) -> np.ndarray:
    frames, rows, columns = latent_shape
    height, width = pixel_shape
    y = (np.arange(rows) + 0.5) * height / rows
    x = (np.arange(columns) + 0.5) * width / columns
    mask = np.zeros(latent_shape, dtype=np.uint8)
    count = draws.integer(*options.blobs)
    shrink_all = draws.chance(0.7)
    for _ in range(count):
        shrink = count**-0.5 if shrink_all or draws.chance(0.5) else 1.0
        half = np.array([draws.uniform(1 / 3, 1) * width / 2, draws.uniform(1 / 3, 1) * height / 2]) * shrink * SIZE
        outline = _bezier_outline(draws) if options.shape == "bezier" else _RECTANGLE
        size, angle = 1.0, 0.0
        turns, zooms, moves = draws.chance(0.25), draws.chance(0.25), draws.chance(options.moving)
        turn = math.radians(draws.uniform(1, 10)) * (1 if draws.chance(0.5) else -1) if turns else 0.0
        zoom = draws.uniform(0.9, 1.1) if zooms else 1.0
        centre = np.array([draws.uniform(0, width), draws.uniform(0, height)])
        speed, direction = draws.uniform(1, 3), draws.uniform(0, 2 * math.pi)
        velocity = speed * np.array([math.cos(direction), math.sin(direction)])
        outlines = []
        for _ in range(frames):
            rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            outlines.append(centre + (outline * half * size) @ rotation.T)
            if moves:
                centre, velocity = _bounce(centre + velocity, velocity, np.array([width, height]))
                velocity = velocity + np.array([draws.normal(), draws.normal()])
                angle, size = angle + turn, size * zoom
        mask |= _filled(np.stack(outlines), x, y)
    if draws.chance(options.window):
        length = draws.integer(1, max(1, frames - 1))
        first = draws.integer(0, frames - length)
        mask[:first], mask[first + length :] = 0, 0
    return mask


# As large as a blob is on average, π·0.7², so that an ablation compares shapes and not areas.
_RECTANGLE = math.sqrt(math.pi * 0.7**2) / 2 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _bezier_outline(draws: _Draws) -> np.ndarray:
    """A closed chain of 6–8 cubic Béziers around the unit circle, radii scaled by 0.6–0.8; [points, 2]."""
    count = draws.integer(6, 8)
    angles = 2 * math.pi * np.arange(count) / count
    radii = np.array([draws.uniform(0.6, 0.8) for _ in range(count)])
    knots = radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    # Control points along the tangent at distance 4/3·tan(π/2n)·r, which makes a circle of equal radii.
    tangents = np.stack((-np.sin(angles), np.cos(angles)), axis=1)
    reach = 4 / 3 * math.tan(math.pi / (2 * count)) * radii[:, None]
    leave, arrive = knots + reach * tangents, knots - reach * tangents
    t = np.linspace(0, 1, CURVE_POINTS, endpoint=False)[:, None]
    pieces = [
        (1 - t) ** 3 * knots[i]
        + 3 * (1 - t) ** 2 * t * leave[i]
        + 3 * (1 - t) * t**2 * arrive[(i + 1) % count]
        + t**3 * knots[(i + 1) % count]
        for i in range(count)
    ]
    return np.concatenate(pieces)


def _filled(polygons: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points (x[j], y[i]) lie inside each closed polygon [F, n, 2], by even and odd; uint8 [F, rows, columns].

    By scan lines: each edge that crosses a row ends a run of columns to its left, and a point is inside when an
    odd number of such runs hold it. x must rise.
    """
    start, end = polygons[:, None], np.roll(polygons, -1, axis=1)[:, None]  # [F, 1, n, 2]
    row = y[:, None]
    crosses = (start[..., 1] > row) != (end[..., 1] > row)  # [F, rows, n]
    rise = np.where(end[..., 1] == start[..., 1], 1.0, end[..., 1] - start[..., 1])
    at = start[..., 0] + (row - start[..., 1]) * (end[..., 0] - start[..., 0]) / rise
    ends = np.zeros((*crosses.shape[:2], len(x) + 1), dtype=np.uint8)
    frame, line, _ = crosses.nonzero()
    np.add.at(ends, (frame, line, np.searchsorted(x, at[crosses])), 1)
    runs = np.cumsum(ends[..., :0:-1], axis=-1, dtype=np.uint8)[..., ::-1]  # crossings to the right of each column
    return runs % 2


def _bounce(centre: np.ndarray, velocity: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outside = (centre < 0) | (centre > size)
    return np.clip(centre, 0, size), np.where(outside, -velocity, velocity)
