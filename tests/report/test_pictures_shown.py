"""What the page shows moving: pairs, samples of both models, where the detector fires, regions redrawn."""

import json
import re
import shutil

import numpy as np
from report_page import page_of

FRAMES, SIZE = 9, 32  # of the run that conftest.py makes


def test_samples_move_side_by_side_in_step_and_for_ever(run):
    page = page_of(run)
    assert len(page.images) == 4 + 2
    pair, sample = page.images[0], page.images[-1]
    for film, panels in ((sample, 3), (pair, 3)):
        assert film.n_frames == FRAMES
        assert film.motion["seconds"] == 0.125  # 8 frames a second
        assert film.size == (panels * SIZE + (panels - 1) * 2, SIZE)


def test_pair_shows_winner_marked_region_and_loser_at_the_same_moment(run):
    pair = page_of(run).images[1]
    stored = np.load(run / "report_pairs" / "001.npz")
    size = SIZE
    for t in (0, 4, 8):
        shown = pair.frame(t)
        panels = [shown[:, i * (size + 2) : i * (size + 2) + size, :3].astype(int) for i in range(3)]
        assert np.array_equal(panels[0], stored["winner"][t])
        assert np.array_equal(panels[2], stored["loser"][t])
        changed = (panels[1] != panels[0]).any(axis=-1)
        expected = np.zeros((size, size), bool)
        expected[8:20, 8:24] = True  # the mask's cells 2:5, 2:6, of 4 pixels
        assert np.array_equal(changed, expected)
        outline = np.abs(panels[1] - (255, 0, 170)).max(axis=-1) < 30
        assert outline[8, 8:24].all() and outline[8:20, 23].all() and not outline[9:19, 9:23].any()
        assert (shown[:, size : size + 2, 3] == 0).all(), "the gap is transparent, for light and dark pages"


def test_samples_of_both_models_keep_their_places(run):
    image = page_of(run).images[2].frame(0)[..., :3]
    noise = [image[24:, left : left + 28].astype(float).std() for left in (0, SIZE + 2)]
    assert noise[0] > 1.5 * noise[1], "the noisier base belongs on the left"


def test_broken_pictures_are_named_and_the_others_shown(run):
    (run / "report_pairs" / "000.npz").write_bytes(b"PK\x03\x04 not a zip")
    (run / "samples" / "aligned" / "001.mp4").write_bytes(b"nothing")
    (run / "samples" / "base" / "002.mp4").unlink()
    page = page_of(run)
    assert len(page.images) == 2 + 1
    for words in ("000.npz cannot be read", "001.mp4: cannot be read as a video", "002.mp4: no such file"):
        assert words in page.text


def test_samples_outside_of_the_run_are_not_read(run):
    rows = [{"prompt": "x", "seed": 0, "base": "../../outside.mp4", "aligned": "aligned/000.mp4"}]
    (run / "samples" / "samples.jsonl").write_text(json.dumps(rows[0]))
    shutil.copy(run / "samples" / "base" / "000.mp4", run.parent / "outside.mp4")
    page = page_of(run)
    assert len(page.images) == 2 and "lies outside" in page.text


def test_the_page_stays_small_with_many_large_pictures(make_run, tmp_path):
    run = make_run(tmp_path, samples=30, pairs=0)
    generator = np.random.default_rng(0)
    for i in range(8):
        noise = generator.integers(0, 256, (24, 90, 160, 3), dtype=np.uint8)  # nothing compresses worse
        np.savez(run / "report_pairs" / f"{i:03d}.npz", winner=noise, loser=noise, mask=np.ones((24, 9, 16)),
                 prompt="noise", strength=0.8)  # fmt: skip
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 8_000_000
    assert "All 30 samples were ordered" in page.text and len(page.images) > 9


def judge_samples(run, gains: list[float], following: list[bool]) -> None:
    """Give each sample of the run what `alignkit eval` measures: a fault that became less likely by the gain."""
    rows = [json.loads(line) for line in (run / "samples" / "samples.jsonl").read_text().splitlines()]
    for row, gain, kept in zip(rows, gains, following, strict=True):
        row |= {"fault_base": 0.5 + gain / 2, "fault_aligned": 0.5 - gain / 2, "change": 1.0}
        row |= {"followed_base": True, "followed_aligned": kept}
    evaluation = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(evaluation | {"samples": rows}))


def test_the_samples_shown_are_chosen_by_the_printed_rule(make_run, tmp_path):
    run = make_run(tmp_path, samples=20, pairs=0)
    gains = [0.04 * i for i in range(20)]
    judge_samples(run, gains, [i != 10 for i in range(20)])  # number 10 lost its prompt: the worst of all
    page = page_of(run)
    shown = [int(number) for number in re.findall(r'"quoted" word (\d+) ', page.text)]
    assert shown == [19, 18, 17, 11, 9, 8, 1, 0, 10]
    for words in ("largest gain", "median", "worst", "All 20 samples were ordered by how much less likely a fault"):
        assert words in page.text
    assert "aligned: fault 12 %, as prompted" in page.text and "not as prompted" in page.text


def test_where_the_detector_fires_is_shown_on_both_samples_and_what_differs_beside(run):
    cells = np.zeros((2, 4, 5, 4, 4), np.uint8)
    cells[1, 0, 0, 0, 0] = 255
    np.savez(run / "samples" / "maps.npz", base=cells[0], aligned=cells[1])
    page = page_of(run)
    image = page.images[2]
    assert image.size == (5 * SIZE + 4 * 2, SIZE) and "aligned: faults" in page.text
    shown = image.frame(0)[..., :3].astype(int)
    base, aligned, seen_base, seen_aligned, change = (
        shown[:, i * (SIZE + 2) : i * (SIZE + 2) + SIZE] for i in range(5)
    )
    assert np.array_equal(change, np.minimum(2 * np.abs(base - aligned), 255))
    marked = np.abs(seen_aligned - (255, 0, 170)).max(axis=-1) < 60
    assert marked[:8, :8].all() and not marked[8:].any() and not marked[:, 8:].any()
    assert not (np.abs(seen_base - (255, 0, 170)).max(axis=-1) < 60).any()


def test_maps_of_other_samples_are_not_shown(run):
    np.savez(
        run / "samples" / "maps.npz", base=np.zeros((3, 5, 4, 4), np.uint8), aligned=np.zeros((3, 5, 4, 4), np.uint8)
    )
    assert "aligned: faults" not in page_of(run).text


def test_a_region_is_shown_as_filmed_and_as_both_models_redraw_it(run):
    videos = {name: np.full((FRAMES, SIZE, SIZE, 3), tone, np.uint8) for name, tone in
              (("original", 40), ("base", 90), ("aligned", 140))}  # fmt: skip
    (run / "regions").mkdir()
    np.savez(run / "regions" / "000.npz", **videos, mask=np.ones((3, 8, 8), np.uint8), prompt="a region")
    (run / "regions" / "001.npz").write_bytes(b"nothing")
    page = page_of(run)
    shown = page.images[-1].frame(0)[0, :: SIZE + 2, 0]
    assert shown[0] == 40 and shown[2] == 90 and shown[3] == 140
    assert page.text.index("What a pair looks like") < page.text.index("Samples before and after")
    assert page.text.index("Samples before and after") < page.text.index("A held-out region, redrawn")
    assert "001.npz cannot be read" in page.text
