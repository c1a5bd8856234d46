"""Masks: keyed by the pair alone, never empty or full, closed, and really moving."""

import numpy as np
import pytest
import torch

from alignkit.config import MaskSection
from alignkit.errors import ConfigError
from alignkit.localdpo.masks import _filled, region_mask

GRID, PIXELS = (5, 12, 12), (48, 48)


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


def test_area_limits_hold_and_impossible_ones_are_refused():
    shares = masks(60, MaskSection(area=(0.05, 0.15))).float().mean(dim=(1, 2, 3))
    assert shares.min() >= 0.05 and shares.max() <= 0.15
    with pytest.raises(ConfigError, match=r"pairs.mask.area: none of 64 masks of pair 0"):
        masks(1, MaskSection(area=(0.999, 1.0)))


def test_shares_at_480p_are_the_published_ones():
    """Mean 9.4 % ± 1, median 8 % ± 1, 5–95 % about 4.5–22 (arXiv 2601.04068's code, as measured for the design)."""
    shares = masks(300, grid=(13, 60, 90), pixels=(480, 720)).float().mean(dim=(1, 2, 3)) * 100
    assert abs(shares.mean() - 9.4) < 1 and abs(shares.median() - 8) < 1
    low, high = shares.quantile(torch.tensor([0.05, 0.95]))
    assert 3 < low < 6 and 18 < high < 26


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
