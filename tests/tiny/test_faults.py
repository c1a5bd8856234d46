"""The mixed set: faults that are there, where they are said to be, and captions that are wrong as often as said."""

import numpy as np
import pytest
import torch

from alignkit.tiny.clips import ATTRIBUTES, render_clip
from alignkit.tiny.critics import faulty_cells
from alignkit.tiny.faults import FEWEST_PIXELS, KINDS, VISIBLE, faulty_clip

SEED = 53


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_local_visible_and_marked(kind):
    for index in range(12):
        clip, clean = faulty_clip(SEED, index, kinds=(kind,)), render_clip(SEED, index)
        assert clip.kinds == (kind,) and clip.attributes == clean.attributes
        change = np.abs(clip.frames.astype(int) - clean.frames).max(axis=-1)
        assert np.array_equal(clip.where, change >= VISIBLE)
        assert clip.where.sum() >= FEWEST_PIXELS
        assert clip.where.mean() < 0.2 and clip.where.any(axis=(1, 2)).sum() <= 12  # of 17 frames


def test_a_clip_is_a_function_of_seed_and_index():
    one, again = faulty_clip(SEED, 3), faulty_clip(SEED, 3)
    assert np.array_equal(one.frames, again.frames) and one.kinds == again.kinds and one.captioned == again.captioned
    assert not np.array_equal(one.frames, faulty_clip(SEED + 1, 3).frames)


def test_without_faults_a_clip_is_the_drawn_one():
    clip = faulty_clip(SEED, 5, fault_share=0.0)
    assert np.array_equal(clip.frames, render_clip(SEED, 5).frames)
    assert not clip.where.any() and clip.kinds == () and clip.captioned == clip.attributes


def test_faults_and_wrong_captions_come_as_often_as_asked():
    clips = [faulty_clip(SEED, index, fault_share=0.6, wrong_share=0.3) for index in range(400)]
    wrong = [[name for name in ATTRIBUTES if clip.captioned[name] != clip.attributes[name]] for clip in clips]
    assert {len(names) for names in wrong} == {0, 1}
    # Shares of 400 draws have deviations of 0.025 and 0.023; the draws are fixed.
    assert abs(np.mean([bool(clip.kinds) for clip in clips]) - 0.6) < 0.075
    assert abs(np.mean([bool(names) for names in wrong]) - 0.3) < 0.07
    assert {kind for clip in clips for kind in clip.kinds} == set(KINDS)
    assert {names[0] for names in wrong if names} == set(ATTRIBUTES)


def test_cells_are_those_of_the_faulty_pixels():
    where = torch.zeros(1, 17, 48, 48, dtype=torch.bool)
    where[0, 6, 8:12, 40:44] = True  # frame 6 belongs to cell 2 (frames 6 … 9): 16 of its 64 pixels
    where[0, 16, 0, 0] = True  # one pixel is too few
    cells = faulty_cells(where)
    assert cells.shape == (1, 5, 12, 12)
    assert cells.nonzero().tolist() == [[0, 2, 2, 10]]
