import errno
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import alignkit.given.validation as validation
from alignkit.errors import DataError
from alignkit.given.preferences import Preference
from alignkit.given.validation import Kind, split_preferences, validate_preferences
from alignkit.media.videos import VideoSpec, write_video
from alignkit.remembered import memory

SPEC = VideoSpec(height=48, width=48, num_frames=17)


def write(path: Path, shade: int, frames=17, height=48, width=48, fps=8.0) -> Path:
    """A white bar that moves over a grey of its own."""
    video = torch.full((frames, height, width, 3), shade, dtype=torch.uint8)
    for i in range(frames):
        video[i, 8:16, i : i + 8] = 255
    write_video(path, video, fps)
    return path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Good videos 0.mp4 to 7.mp4, and one of each that does not go with them."""
    folder = tmp_path_factory.mktemp("shelf")
    for i in range(8):
        write(folder / f"{i}.mp4", 20 * i)
    write(folder / "short.mp4", 10, frames=16)
    write(folder / "longer.mp4", 10, frames=18)
    write(folder / "larger.mp4", 10, height=64)
    write(folder / "faster.mp4", 10, fps=10)
    write(folder / "tv.mp4", 30, fps=25)
    write(folder / "film.mp4", 10, fps=24)
    write(folder / "hardly_faster.mp4", 10, fps=8.01)
    shutil.copy(folder / "0.mp4", folder / "copy_of_0.mp4")
    write(folder / "0_slightly_other_file.mp4", 0, fps=8.01)
    assert (folder / "0_slightly_other_file.mp4").read_bytes() != (folder / "0.mp4").read_bytes()

    whole = (folder / "1.mp4").read_bytes()
    end = whole.index(b"moov") - 4  # the index and its length stay whole
    middle = (whole.index(b"mdat") + end) // 2
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "overwritten.mp4").write_bytes(whole[:middle] + b"\xff" * (end - middle) + whole[end:])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()

    mask = np.zeros((17, 48, 48), dtype=bool)
    np.save(folder / "none.npy", mask)
    mask[:, 8:24, 8:24] = True
    np.save(folder / "good.npy", mask)
    speck = np.zeros_like(mask)
    speck[:, 8:10, 8:12] = True
    np.save(folder / "speck.npy", speck)
    np.save(folder / "long.npy", np.concatenate((mask, mask)))
    np.save(folder / "wide.npy", np.concatenate((mask, mask), axis=2))
    (folder / "broken.npy").write_bytes(b"no array")
    return folder


@pytest.fixture
def row(shelf):
    """`row(4, "2.mp4", "3.mp4", mask="good.npy", prompt="a cow")`; prompts are of the row's number otherwise."""

    def make(number: int, chosen: str, rejected: str, *, mask=None, prompt=None) -> Preference:
        given = shelf / mask if mask else None
        return Preference(
            number, f"p.jsonl:{number + 1}", prompt or f"prompt {number}", shelf / chosen, shelf / rejected, given
        )

    return make


BAD_ROWS = [
    ("missing", dict(chosen="gone.mp4"), r"gone\.mp4: no such file"),
    ("damaged", dict(rejected="cut.mp4"), r"cut\.mp4: "),
    ("damaged", dict(chosen="overwritten.mp4"), r"overwritten\.mp4: damaged"),
    ("damaged", dict(chosen="empty.mp4"), r"empty\.mp4: cannot be read as a video"),
    ("damaged", dict(chosen="folder.mp4"), r"folder\.mp4: "),
    ("too_short", dict(rejected="short.mp4"), r"short\.mp4: too short: it has 16 frames, and 17 are needed"),
    ("frames", dict(rejected="longer.mp4"), r"2\.mp4 has 17 frames, .*longer\.mp4 has 18"),
    ("size", dict(rejected="larger.mp4"), r"2\.mp4 is 48x48 \(height x width\), .*larger\.mp4 is 64x48"),
    ("rate", dict(rejected="faster.mp4"), r"2\.mp4 has 8 frames a second, .*faster\.mp4 has 10"),
    ("identical", dict(rejected="2.mp4"), r"2\.mp4 and .*2\.mp4 show the same"),
    ("identical", dict(chosen="0.mp4", rejected="copy_of_0.mp4"), r"0\.mp4 and .*copy_of_0\.mp4 show the same"),
    ("identical", dict(chosen="0.mp4", rejected="0_slightly_other_file.mp4"), "show the same"),
    ("mask", dict(mask="gone.npy"), r"gone\.npy: no such mask"),
    ("mask", dict(mask="broken.npy"), r"broken\.npy: cannot be read as a NumPy array"),
    ("mask", dict(mask="long.npy"), r"long\.npy: has 34 frames, but 2\.mp4 has 17"),
    ("mask", dict(mask="wide.npy"), r"wide\.npy: is 48x96 \(height x width\), but 2\.mp4 is 48x48"),
    ("mask", dict(mask="none.npy"), r"none\.npy: is empty"),
    ("mask", dict(mask="speck.npy"), r"speck\.npy: .*too small: it covers half of no cell"),
    ("missing", dict(chosen="a" * 300), r"File name too long"),
    ("missing", dict(chosen="nul\0.mp4"), r"no such file"),
    ("mask", dict(mask="a" * 300), r"no such mask"),
    ("rate", dict(rejected="film.mp4", chosen="tv.mp4"), r"tv\.mp4 has 25 frames a second, .*film\.mp4 has 24"),
    ("duplicate", dict(prompt="A COW", chosen="6.mp4", rejected="7.mp4"), r"p\.jsonl:1 has the same prompt and videos"),
    ("leaked_video", dict(chosen="4.mp4"), r"4\.mp4 is trained on too \(p\.jsonl:2\)"),
    ("leaked_video", dict(chosen="0.mp4", rejected="4.mp4"), r"4\.mp4 is trained on too \(p\.jsonl:2\)"),
    ("leaked_prompt", dict(prompt="A cat"), r"its prompt 'A cat' is trained on too \(p\.jsonl:2\)"),
]


@pytest.mark.parametrize("kind, changes, message", BAD_ROWS, ids=[kind for kind, *_ in BAD_ROWS])
def test_each_kind_of_bad_row_is_dropped_and_listed_and_the_rest_goes_on(row, kind, changes, message):
    """The bad row is row 2. Beside it row 0, of 6 and 7, is good; row 1, of 4, 5 and a cat, is trained on."""
    bad = row(2, **{"chosen": "2.mp4", "rejected": "3.mp4", **changes})
    good = row(0, "6.mp4", "7.mp4", prompt="a cow", mask="good.npy")
    other = row(1, "4.mp4", "5.mp4", prompt="a cat")
    findings = validate_preferences([other], SPEC, grid=(5, 6, 6), heldout=[good, bad])
    assert findings.train == [other] and findings.heldout == [good]
    assert [(problem.video, problem.kind) for problem in findings.problems] == [("p.jsonl:3", kind)]
    assert "\n" not in findings.problems[0].reason
    assert re.search(message, findings.problems[0].reason)
    if not kind.startswith("leaked"):  # what makes a row bad does not depend on its side
        findings = validate_preferences([good, bad], SPEC, grid=(5, 6, 6))
        assert findings.train == [good] and [problem.kind for problem in findings.problems] == [kind]


def test_contradiction_drops_both_rows_because_neither_is_known_to_be_right(row):
    rows = [
        row(0, "0.mp4", "1.mp4", prompt="a cow"),
        row(1, "2.mp4", "3.mp4"),
        row(2, "1.mp4", "copy_of_0.mp4", prompt="A cow"),
        row(3, "1.mp4", "0.mp4", prompt="a horse"),
    ]
    findings = validate_preferences(rows, SPEC)
    assert [kept.number for kept in findings.train] == [1, 3], "another prompt may prefer the other video"
    assert [(problem.video, problem.kind) for problem in findings.problems] == [
        ("p.jsonl:1", "contradiction"),
        ("p.jsonl:3", "contradiction"),
    ]
    assert "p.jsonl:3 the other way round" in findings.problems[0].reason
    assert "p.jsonl:1 the other way round" in findings.problems[1].reason


def test_there_is_a_bad_input_for_every_kind_of_finding():
    assert {kind for kind, *_ in BAD_ROWS} | {"contradiction"} == set(get_args(Kind))


def test_all_that_is_wrong_with_a_row_is_listed_at_once(row):
    findings = validate_preferences([row(0, "0.mp4", "1.mp4"), row(1, "gone.mp4", "short.mp4")], SPEC)
    assert [problem.kind for problem in findings.problems] == ["missing", "too_short"]


def test_leak_through_a_row_that_is_dropped_is_none(row):
    train = [row(0, "0.mp4", "1.mp4"), row(1, "2.mp4", "gone.mp4", prompt="a cow")]
    heldout = [row(0, "2.mp4", "3.mp4", prompt="a cow")]
    assert validate_preferences(train, SPEC, heldout=heldout).heldout == heldout


def test_same_pictures_in_another_file_leak(row):
    heldout = [row(0, "copy_of_0.mp4", "3.mp4"), row(1, "4.mp4", "5.mp4")]
    findings = validate_preferences([row(7, "0.mp4", "1.mp4")], SPEC, heldout=heldout)
    assert findings.heldout == heldout[1:] and findings.problems[0].kind == "leaked_video"


def test_rounded_frame_rates_do_not_make_a_pair_unequal(row):
    findings = validate_preferences([row(0, "1.mp4", "hardly_faster.mp4")], SPEC)
    assert findings.problems == []


def test_size_is_compared_as_shown_with_the_shape_of_pixels(row, shelf, monkeypatch):
    decode = validation.decode_with_facts

    def decode_stretched(path, spec):
        frames, facts = decode(path, spec)
        return frames, replace(facts, stretch=2.0) if path.name == "1.mp4" else facts

    monkeypatch.setattr(validation, "decode_with_facts", decode_stretched)
    findings = validate_preferences([row(0, "0.mp4", "1.mp4"), row(1, "2.mp4", "3.mp4")], SPEC)
    reason = f"{shelf / '0.mp4'} is 48x48 (height x width), {shelf / '1.mp4'} is 48x96"
    assert [(problem.kind, problem.reason) for problem in findings.problems] == [("size", reason)]


def test_videos_of_several_rows_are_decoded_once_and_every_row_is_counted(row, monkeypatch):
    decoded, rows_seen = [], []
    decode = validation.decode_with_facts
    monkeypatch.setattr(validation, "decode_with_facts", lambda path, spec: decoded.append(path) or decode(path, spec))
    train = [row(0, "0.mp4", "1.mp4", mask="good.npy"), row(1, "0.mp4", "2.mp4"), row(2, "gone.mp4", "1.mp4")]
    heldout = [row(5, "3.mp4", "4.mp4"), row(6, "0.mp4", "4.mp4")]
    findings = validate_preferences(train, SPEC, heldout=heldout, watch=lambda: rows_seen.append(1))
    names = [path.name for path in decoded]
    assert sorted(names) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "gone.mp4"]
    assert len(rows_seen) == 5
    assert {path.name for path in findings.keys} == set(names) - {"gone.mp4"}


def test_what_is_known_is_not_looked_at_again_and_what_was_of_the_moment_is(row, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode = validation.decode_with_facts

    def exhausted(path, spec):
        if path.name == "1.mp4":
            raise DataError(f"{path}: cannot be read") from OSError(errno.EMFILE, "Too many open files")
        return decode(path, spec)

    rows = [row(0, "0.mp4", "1.mp4"), row(1, "2.mp4", "3.mp4", mask="good.npy"), row(2, "short.mp4", "gone.mp4")]
    monkeypatch.setattr(validation, "decode_with_facts", exhausted)
    with memory("rows", "of this test") as known:
        first = validate_preferences(rows, SPEC, grid=(5, 6, 6), known=known)
    decoded = []
    monkeypatch.setattr(validation, "decode_with_facts", lambda path, spec: decoded.append(path) or decode(path, spec))
    with memory("rows", "of this test") as known:
        findings = validate_preferences(rows, SPEC, grid=(5, 6, 6), known=known)
    assert sorted(path.name for path in decoded) == ["1.mp4", "gone.mp4"]
    assert [row.number for row in first.train] == [1] and [row.number for row in findings.train] == [0, 1]
    assert findings == validate_preferences(rows, SPEC, grid=(5, 6, 6))


@pytest.mark.parametrize(
    "train, heldout, message",
    [
        ([], None, "no pair is left to train on$"),
        ([("0.mp4", "0.mp4")], None, r"no pair is left to train on: p\.jsonl:1: .* show the same$"),
        ([("gone.mp4", "none.mp4")], None, r"no pair is left to train on: p\.jsonl:1: .*and 1 more problems"),
        ([("0.mp4", "1.mp4")], [("1.mp4", "2.mp4")], r"no pair is left to hold out: p\.jsonl:1: .*is trained on too"),
        ([("0.mp4", "1.mp4")], [], "no pair is left to hold out$"),
    ],
)
def test_nothing_left_is_one_clear_error(row, train, heldout, message):
    rows = [row(i, *names) for i, names in enumerate(train)]
    held = heldout and [row(i, *names, prompt="another") for i, names in enumerate(heldout)]
    with pytest.raises(DataError, match=message):
        validate_preferences(rows, SPEC, heldout=heldout if held is None else held)


# --- splitting ----------------------------------------------------------------------------------------------


def pairs(*rows: tuple[str, str, str]) -> tuple[list[Preference], dict[Path, str]]:
    """(prompt, chosen, rejected) rows, and keys that tell videos apart by their first letter."""
    preferences = [Preference(i, f"p.jsonl:{i + 1}", p, Path(c), Path(r), None) for i, (p, c, r) in enumerate(rows)]
    return preferences, {path: path.name[0] for row in preferences for path in (row.chosen, row.rejected)}


def alphabet(count: int) -> tuple[list[Preference], dict[Path, str]]:
    """Rows that share nothing."""
    return pairs(*((f"prompt {i}", chr(500 + 2 * i), chr(501 + 2 * i)) for i in range(count)))


def test_split_is_a_function_of_the_seed_and_of_the_asked_size():
    preferences, keys = alphabet(40)
    train, heldout = split_preferences(preferences, keys, 0.25, 7)
    assert len(heldout) == 10 and sorted([*train, *heldout], key=lambda row: row.number) == preferences
    assert train == sorted(train, key=lambda row: row.number), "rows keep their order"
    assert split_preferences(preferences, keys, 0.25, 7) == (train, heldout)
    assert split_preferences(preferences, keys, 0.25, 8) != (train, heldout)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.999, 1.0])
def test_there_is_at_least_one_row_on_each_side(share):
    preferences, keys = alphabet(3)
    train, heldout = split_preferences(preferences, keys, share, 0)
    assert len(train) >= 1 and len(heldout) >= 1


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_share_a_prompt_or_a_video_stay_together(seed):
    preferences, keys = pairs(
        ("one", "a", "b"),
        ("two", "c", "d"),
        ("ONE", "e", "f"),  # by its prompt to 0
        ("three", "f2", "g"),  # by a video in another file to 2, and so to 0
        ("four", "h", "i"),
        ("five", "j", "c"),  # to 1
    )
    train, heldout = split_preferences(preferences, keys, 0.3, seed)
    sides = [{row.number for row in side} for side in (train, heldout)]
    for group in ({0, 2, 3}, {1, 5}, {4}):
        assert any(group <= side for side in sides), sides


@pytest.mark.parametrize("seed", range(6))
def test_smallest_group_is_held_out_where_all_are_larger_than_asked(seed):
    preferences, keys = pairs(("x", "a", "b"), ("x", "c", "d"), ("x", "e", "f"), ("y", "g", "h"), ("y", "i", "j"))
    train, heldout = split_preferences(preferences, keys, 0.1, seed)
    assert [row.number for row in heldout] == [3, 4] and [row.number for row in train] == [0, 1, 2]


@pytest.mark.parametrize("rows", [[("x", "a", "b")], [("x", "a", "b"), ("y", "b", "c"), ("y", "d", "e")]])
def test_one_group_cannot_be_split(rows):
    preferences, keys = pairs(*rows)
    with pytest.raises(DataError, match="hang together by the videos or prompts they share"):
        split_preferences(preferences, keys, 0.5, 0)


def test_what_is_held_out_by_the_split_passes_for_leaks(row):
    rows = [
        row(0, "0.mp4", "1.mp4"),
        row(1, "copy_of_0.mp4", "2.mp4"),
        row(2, "3.mp4", "4.mp4"),
        row(3, "5.mp4", "6.mp4"),
    ]
    findings = validate_preferences(rows, SPEC)
    for seed in range(6):
        train, heldout = split_preferences(findings.train, findings.keys, 0.5, seed)
        assert validate_preferences(train, SPEC, heldout=heldout).problems == []
