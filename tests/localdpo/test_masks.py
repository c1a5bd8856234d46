"""Masks: keyed by the pair alone, never empty or full, closed, and really moving."""

import hashlib

import numpy as np
import pytest
import torch

from alignkit.config import MaskSection
from alignkit.errors import ConfigError
from alignkit.localdpo.masks import _filled, region_mask

GRID, PIXELS = (5, 12, 12), (48, 48)
HALVES = (slice(0, 12), slice(12, 24))


def masks(count, options=None, grid=GRID, pixels=PIXELS, seed=0):
    options = options or MaskSection()
    return torch.stack([region_mask(grid, pixels, options, seed=seed, pair_id=i) for i in range(count)])


def test_a_mask_depends_on_seed_and_pair_alone():
    first = masks(8)
    assert torch.equal(first, masks(8))
    assert len({mask.numpy().tobytes() for mask in first}) == 8
    assert not torch.equal(first, masks(8, seed=1))


@pytest.mark.parametrize("shape", ["bezier", "rectangle"])
@pytest.mark.parametrize("grid", [GRID, (1, 2, 2), (13, 60, 90)])
def test_no_mask_is_empty_or_full(shape, grid):
    for mask in masks(100 if grid[0] < 13 else 10, MaskSection(shape=shape), grid):
        assert mask.dtype == torch.uint8 and mask.shape == grid
        assert 0 < mask.sum() < mask.numel()


def test_a_blob_is_one_closed_region_without_holes():
    for mask in masks(40, MaskSection(blobs=(1, 1), moving=0.0), (1, 40, 40)):
        assert components(mask[0].numpy()) == 1
        assert components(np.pad(1 - mask[0].numpy(), 1, constant_values=1)) == 1


def test_still_blobs_rest_and_moving_ones_move():
    still = masks(30, MaskSection(moving=0.0))
    assert (still == still[:, :1]).all()
    moving = masks(30, MaskSection(moving=1.0))
    changed = (moving != moving[:, :1]).flatten(1).any(dim=1)
    # at least one pixel of four moves a latent frame: only blobs at rest in a corner may look the same
    assert changed.float().mean() > 0.9


def test_a_window_leaves_one_run_of_frames():
    runs = []
    for mask in masks(60, MaskSection(window=1.0, moving=0.0), (9, 12, 12)):
        frames = mask.flatten(1).any(dim=1).int()
        assert frames.sum() < 9 and (frames.diff() != 0).sum() <= 2, "one run, and not the whole video"
        runs.append((frames.argmax().item(), frames.sum().item()))
    assert len({first for first, _ in runs}) > 4 and len({length for _, length in runs}) > 4


def test_blobs_lie_all_over_the_frame_and_stay_in_it():
    """Centres start uniformly and bounce: of one blob's, a quarter in each quadrant, and none is lost in 49 frames."""
    drawn = masks(120, MaskSection(blobs=(1, 1), moving=1.0), (49, 24, 24), (96, 96))
    assert drawn.flatten(2).any(dim=2).float().mean() > 0.97, "a blob half outside may miss the grid now and then"
    quadrants = [drawn[:, 0, rows, columns].flatten(1).sum(dim=1) for rows in HALVES for columns in HALVES]
    chosen = torch.stack(quadrants, dim=1).argmax(dim=1)
    for quadrant in range(4):
        # binomial(120, 1/4): four standard deviations
        assert abs((chosen == quadrant).sum().item() - 30) < 4 * (120 * 0.25 * 0.75) ** 0.5


def test_moving_blobs_change_speed_zoom_and_turn(monkeypatch):
    """Read off the outlines, which the rasteriser is given."""
    outlines = []

    def keep(polygons, x, y):
        outlines.append(polygons)
        return _filled(polygons, x, y)

    monkeypatch.setattr("alignkit.localdpo.masks._filled", keep)
    masks(
        60, MaskSection(blobs=(1, 1), moving=1.0, shape="rectangle"), (9, 40, 40), (400_000, 400_000)
    )  # no wall is near
    first = np.stack([polygon[0] for polygon in outlines])
    last = np.stack([polygon[-1] for polygon in outlines])
    growth = box_area(last) / box_area(first)
    zoomed = np.abs(growth - 1) > 1e-6
    assert 0.1 < zoomed.mean() < 0.45, "a quarter of them"
    assert growth.min() >= 0.9**16 and growth.max() <= 1.1**16 and growth.min() < 1 < growth.max()
    edge = last[:, 1] - last[:, 0]
    turned = np.degrees(np.arctan2(edge[:, 1], edge[:, 0]))
    turning = np.abs(turned) > 1e-6
    assert 0.1 < turning.mean() < 0.45 and turned.min() < 0 < turned.max()
    assert np.abs(turned[turning]).min() >= 8 * 1 and np.abs(turned).max() <= 8 * 10, "degrees in eight steps"
    centres = np.stack([polygon.mean(axis=1) for polygon in outlines])
    steps = np.diff(centres, axis=1)
    start = np.linalg.norm(steps[:, 0], axis=1)
    assert start.min() >= 1 - 1e-9 and start.max() <= 3 + 1e-9, "pixels a latent frame"
    change = np.diff(steps, axis=1)
    # normal accelerations: mean 0 and variance 1 within four standard errors of 60·7·2 draws
    assert abs(change.mean()) < 4 / change.size**0.5 and abs(change.var() - 1) < 4 * (2 / change.size) ** 0.5
    corners = first - first.mean(axis=1, keepdims=True)
    assert np.allclose(np.abs(corners), np.abs(corners[:, :1])), "a rectangle along the axes"


def test_many_blobs_over_many_frames_do_not_run_out_of_numbers():
    drawn = masks(3, MaskSection(blobs=(10, 10), moving=1.0), (120, 6, 6))
    assert drawn.shape == (3, 120, 6, 6)


def test_masks_stay_as_they_are():
    """Stores are told apart by seed and options: the same must give the same masks in every version."""
    drawn = masks(6, grid=(13, 60, 90), pixels=(480, 720)).numpy().tobytes()
    assert hashlib.sha256(drawn).hexdigest()[:16] == "ddcd335a3febe2b9"


def test_area_limits_hold_and_impossible_ones_are_refused():
    shares = masks(60, MaskSection(area=(0.05, 0.15))).float().mean(dim=(1, 2, 3))
    assert shares.min() >= 0.05 and shares.max() <= 0.15
    with pytest.raises(ConfigError, match=r"pairs.mask.area: none of 2048 masks of pair 0"):
        masks(1, MaskSection(area=(0.999, 1.0)))


def test_shares_at_480p_are_the_published_ones():
    """Mean 9.4 % ± 1, median 8 % ± 1, 5–95 % about 4.5–22 (arXiv 2601.04068's code, as measured for the design)."""
    shares = masks(300, grid=(13, 60, 90), pixels=(480, 720)).float().mean(dim=(1, 2, 3)) * 100
    assert abs(shares.mean() - 9.4) < 1 and abs(shares.median() - 8) < 1
    low, high = shares.quantile(torch.tensor([0.05, 0.95]))
    assert 3 < low < 6 and 18 < high < 26


def test_rectangles_cover_what_blobs_do():
    """A mean of 300 is known to about 0.5 %; a box around the whole blob would cover 21 % where the blob covers 9.4."""
    blobs, boxes = (
        masks(300, MaskSection(shape=shape)).float().mean(dim=(1, 2, 3)) for shape in ("bezier", "rectangle")
    )
    standard_error = ((blobs.var() + boxes.var()) / 300).sqrt()
    assert abs(blobs.mean() - boxes.mean()) < 3 * standard_error


def test_more_blobs_are_more_regions():
    one, five = (masks(60, MaskSection(blobs=(n, n), moving=0.0), (1, 60, 60), (480, 480)) for n in (1, 5))
    assert np.mean([components(m[0].numpy()) for m in five]) > np.mean([components(m[0].numpy()) for m in one]) + 0.5


def test_points_in_polygon_against_a_known_area():
    """Monte Carlo on a disc: the share of grid points inside converges to π/4."""
    angles = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    disc = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    axis = (np.arange(200) + 0.5) / 100 - 1
    # the grid misjudges only cells that the circle crosses: at most 8 per row of 200, half of them on average
    assert abs(_filled(disc[None], axis, axis).mean() - np.pi / 4) < 4 / 200


def box_area(corners: np.ndarray) -> np.ndarray:
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1]
    return np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])


def components(mask: np.ndarray) -> int:
    """Connected regions of ones (4-neighbours)."""
    left = {tuple(p) for p in np.argwhere(mask)}
    count = 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            r, c = front.pop()
            for p in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if p in left:
                    left.remove(p)
                    front.append(p)
    return count
