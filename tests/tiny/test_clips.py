"""The rendered clips: repeatable, and showing what their captions say."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from alignkit.tiny.clips import (
    ATTRIBUTES,
    BACKGROUND_WORD,
    COLOUR_RGB,
    FRAMES,
    MOTION_STEP,
    SIZE,
    random_attributes,
    read_clips,
    render_clip,
    write_clips,
)

SEED = 31


def shape_cover(frames: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels are within 60 of the shape's colour in every channel (colours vary by 12)."""
    return (np.abs(frames.astype(int) - COLOUR_RGB[colour]) < 60).all(axis=-1)


def centres(frames: np.ndarray, colour: str) -> np.ndarray:
    """Centre of the coloured pixels by frame, [F, 2], x then y."""
    covers = shape_cover(frames, colour)
    return np.array([np.argwhere(cover).mean(axis=0)[::-1] for cover in covers])


def test_a_clip_is_a_function_of_seed_and_index():
    first, again = render_clip(SEED, 4), render_clip(SEED, 4)
    assert first.frames.shape == (FRAMES, SIZE, SIZE, 3) and first.frames.dtype == np.uint8
    assert np.array_equal(first.frames, again.frames) and first.caption == again.caption
    assert not np.array_equal(first.frames, render_clip(SEED, 5).frames)
    assert not np.array_equal(first.frames, render_clip(SEED + 1, 4).frames)
    assert random_attributes(SEED, 4) == first.attributes


def test_every_attribute_value_occurs_and_is_in_the_caption():
    seen = {name: set() for name in ATTRIBUTES}
    for index in range(80):
        clip = render_clip(SEED, index)
        for name, value in clip.attributes.items():
            seen[name].add(value)
            assert BACKGROUND_WORD.get(value, value) in clip.caption.split()
    assert seen == {name: set(values) for name, values in ATTRIBUTES.items()}


@pytest.mark.parametrize("index", range(24))
def test_the_shape_has_its_colour_and_moves_its_way(index):
    clip = render_clip(SEED, index)
    covers = shape_cover(clip.frames, clip.attributes["colour"])
    # The smallest shape, a triangle of radius 6.5, covers 3·√3·(0.62·6.5)² = 84 pixels, some at its edge.
    assert covers.sum(axis=(1, 2)).min() > 50
    path = centres(clip.frames, clip.attributes["colour"])
    moved = path[-1] - path[0]
    step = np.array(MOTION_STEP[clip.attributes["motion"]])
    along, across = moved @ step, abs(moved @ step[::-1])
    # 16 frames at 1.1 … 1.7 pixels; a pixel of tolerance for the edges.
    assert 16 * 1.1 - 1 < along < 16 * 1.7 + 1
    assert across < 1


def test_clips_survive_being_written_and_read_as_mp4(tmp_path):
    captions = write_clips(tmp_path, count=6, seed=SEED, first=2)
    lines = [json.loads(line) for line in captions.read_text().splitlines()]
    assert [line["video"] for line in lines] == [f"clip_{i:06d}.mp4" for i in range(2, 8)]
    read = read_clips(tmp_path)
    for i in range(6):
        clip = render_clip(SEED, 2 + i)
        assert read.captions[i] == clip.caption and read.attributes[i] == clip.attributes
        # yuv420p halves the colour's resolution, which costs most at the shape's edge.
        assert np.abs(read.frames[i].astype(float) - clip.frames).mean() < 4
        drift = centres(read.frames[i], clip.attributes["colour"]) - centres(clip.frames, clip.attributes["colour"])
        assert np.abs(drift).max() < 1


DRAW = """
import sys
from alignkit.tiny.clips import write_clips
write_clips(sys.argv[1], count=80, seed=20_260)
"""


def test_two_processes_draw_the_same_files(tmp_path):
    """x264's macroblock tree gave 10 to 28 of 160 files other bits in each process."""
    drawn = []
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / name)], check=True, timeout=300)
        files = sorted((tmp_path / name).glob("*.mp4"))
        drawn.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert len(drawn[0]) == 80 and drawn[0] == drawn[1]
