import io

import numpy as np
import pytest
from PIL import Image

from alignkit.report.pictures import LARGEST_PANEL, MOST_FRAMES, StoredPair, compose, pair_picture, with_mask


@pytest.mark.parametrize(
    "frames, mask_frames, on, expected",
    [
        (17, 5, 0, [0]),  # a causal video VAE: the first latent frame holds the first picture alone
        (17, 5, 1, [1, 2, 3, 4]),
        (17, 5, 4, [13, 14, 15, 16]),
        (9, 9, 3, [3]),
        (8, 4, 1, [2, 3]),  # no causal count: spread evenly
        (6, 1, 0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_mask_is_drawn_on_the_frames_that_it_covers(frames, mask_frames, on, expected):
    video = np.full((frames, 8, 8, 3), 100, np.uint8)
    mask = np.zeros((mask_frames, 2, 2), np.uint8)
    mask[on, 0, 0] = 1
    changed = (with_mask(video, mask) != video).any(axis=-1)
    assert changed.any(axis=(1, 2)).nonzero()[0].tolist() == expected
    assert changed[expected[0], :4, :4].all() and not changed[:, 4:].any() and not changed[:, :, 4:].any()


def test_long_and_large_videos_are_thinned_at_their_own_speed():
    video = np.zeros((100, 60, 300, 3), np.uint8)
    video[:, :, :, 0] = np.arange(100)[:, None, None]
    picture = compose([video, video], fps=25)
    film = Image.open(io.BytesIO(picture.film))
    assert picture.frames == 34 <= MOST_FRAMES  # every third
    assert picture.seconds == 0.12, "three frames' worth, so that it plays as fast as before"
    assert film.size == (2 * LARGEST_PANEL + 2, 34 * 48) and not picture.magnified


def test_a_tall_video_is_thinned_to_what_one_picture_holds():
    picture = compose([np.zeros((48, 432, 240, 3), np.uint8)], fps=24)
    assert picture.frames == 24 and picture.seconds == 2 / 24
    assert Image.open(io.BytesIO(picture.film)).size == (240, 24 * 432)


def test_the_still_is_the_frame_that_shows_the_difference():
    """The middle one often shows none: a fault of a few frames would be missed by people who want no motion."""
    winner = np.full((17, 48, 48, 3), 100, np.uint8)
    loser = winner.copy()
    loser[13, 10:30, 10:30] = 0
    picture = pair_picture(StoredPair(winner, loser, np.ones((5, 6, 6), np.uint8), "a circle", None), fps=8)
    film = np.asarray(Image.open(io.BytesIO(picture.film)).convert("RGB"))
    assert picture.still == 13 and (film[13 * 48 + 20, -28] == 0).all()
