from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import DataError
from alignkit.media.masks import find_mask, mask_on_grid, read_mask
from alignkit.media.videos import VideoSpec, write_video

GRID = (5, 6, 6)  # of 17 frames of 48x48: four frames and 8x8 pixels a cell


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.webm", "a.mkv", "a.png", "a.npy", "a.json", "a/0.png"])
def test_mask_of_a_clip_is_found_by_its_name(tmp_path, name):
    touch(tmp_path, f"sub/{name}", "a.npy", "sub/a.b.npy", "sub/ab.npy", "sub/a.txt")
    expected = tmp_path / "sub" / ("a" if name == "a/0.png" else name)
    assert find_mask(tmp_path, "sub/a.webm") == expected
    assert find_mask(tmp_path, "sub/a.b.mp4") == tmp_path / "sub" / "a.b.npy"


def test_masks_may_lie_beside_their_videos_and_have_capital_endings(tmp_path):
    touch(tmp_path, "a.mp4", "a.npy", "b.mov", "b.PNG", "c.webm")
    for clip, mask in (("a.mp4", "a.npy"), ("b.mov", "b.PNG"), ("c.webm", None)):
        assert find_mask(tmp_path, clip, tmp_path / clip) == (mask and tmp_path / mask)


def test_clip_without_a_mask_has_none(tmp_path):
    touch(tmp_path, "a/other.npy", "b.npy")  # a folder without pictures is no mask: it may hold those of other clips
    assert find_mask(tmp_path, "a.mp4") is None
    assert find_mask(tmp_path, "sub/b.mp4") is None


def test_two_masks_for_one_clip_are_refused(tmp_path):
    touch(tmp_path, "sub/a.npy", "sub/a/0.png")
    with pytest.raises(DataError, match=r"sub/a\.mp4 has more than one mask: sub/a\.npy, sub/a; keep one"):
        find_mask(tmp_path, "sub/a.mp4")


def pixels(frames=slice(None), rows=slice(None), columns=slice(None)) -> torch.Tensor:
    mask = torch.zeros(17, 48, 48, dtype=torch.bool)
    mask[frames, rows, columns] = True
    return mask


@pytest.mark.parametrize("frame, latent", [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 4)])
def test_one_frame_regenerates_the_latent_frame_that_stands_for_it(frame, latent):
    on_grid = mask_on_grid(pixels(frame), GRID)
    assert on_grid.dtype == torch.uint8 and on_grid.shape == GRID
    expected = torch.zeros(GRID, dtype=torch.uint8)
    expected[latent] = 1
    assert torch.equal(on_grid, expected)


@pytest.mark.parametrize("width, cells", [(12, 2), (11, 1), (8, 1), (4, 1)])
def test_cell_is_regenerated_from_half_coverage_on(width, cells):
    on_grid = mask_on_grid(pixels(columns=slice(0, width)), GRID)
    assert on_grid.sum(dim=2).eq(cells).all() and on_grid[:, :, :cells].all()


def test_coverage_is_counted_within_single_frames_not_over_all_of_a_cell():
    passing = pixels(2, slice(8, 16), slice(8, 16))  # one frame of four
    assert mask_on_grid(passing, GRID)[1, 1, 1] == 1 and mask_on_grid(passing, GRID).sum() == 1
    mask = pixels(0)
    for frame in range(1, 5):  # a quarter in each: together all of the cell, half of it in no frame
        row, column = divmod(frame - 1, 2)
        mask |= pixels(frame, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
    assert not mask_on_grid(mask, GRID)[1].any()


def test_full_mask_is_allowed_and_one_that_would_vanish_refused():
    assert mask_on_grid(pixels(), GRID).all()
    thin = pixels(columns=slice(6, 10))  # a quarter of two cells
    with pytest.raises(DataError, match=r"too small: it covers half of no cell .*\(8x8 pixels each\)"):
        mask_on_grid(thin, GRID)


@pytest.mark.parametrize("grid", [(4, 6, 6), (1, 6, 6), (5, 7, 6), (5, 6, 5), (9, 6, 48 * 2)])
def test_grid_that_does_not_divide_the_video_is_refused(grid):
    with pytest.raises(DataError, match=r"a mask of \[17, 48, 48\] does not fit a latent grid of"):
        mask_on_grid(pixels(), grid)


def test_grid_may_have_a_single_frame():
    assert torch.equal(mask_on_grid(pixels()[:1], (1, 6, 6)), torch.ones(1, 6, 6, dtype=torch.uint8))


def test_same_shape_in_every_format_is_the_same_region(tmp_path):
    moving = torch.zeros(17, 48, 48, dtype=torch.bool)
    for i in range(17):
        moving[i, 8:27, i : i + 16] = True
    spec, video = VideoSpec(48, 48, 17), tmp_path / "a.mp4"
    write_video(video, torch.full((17, 48, 48, 3), 90, dtype=torch.uint8), 8)
    white = (moving[..., None].expand(17, 48, 48, 3) * 255).to(torch.uint8)
    write_video(tmp_path / "video" / "a.mp4", white, 8)
    for name in ("array", "boxes", "pictures/a"):
        (tmp_path / name).mkdir(parents=True)
    np.save(tmp_path / "array" / "a.npy", moving.numpy())
    boxes = [[[i, 8, i + 16, 27]] for i in range(17)]
    (tmp_path / "boxes" / "a.json").write_text(f'{{"boxes": {boxes}}}')
    for i, frame in enumerate(moving.numpy()):
        Image.fromarray(frame).save(tmp_path / "pictures" / "a" / f"{i}.png")
    regions = [
        mask_on_grid(read_mask(find_mask(tmp_path / name, "a.mp4"), video, spec), GRID)
        for name in ("video", "array", "boxes", "pictures")
    ]
    assert 0 < regions[0].sum() < regions[0].numel()
    assert all(torch.equal(region, regions[0]) for region in regions)
