"""Finding the clips of a folder and their captions: what is used, what is left out, and why."""

import errno
import json
import os
from pathlib import Path

import pytest

from alignkit.errors import DataError
from alignkit.media.captions import NOTE
from alignkit.media.finding import find_clips


def touch(folder: Path, *names: str) -> None:
    """Stand-ins that differ in their bytes; finding does not decode."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def captions(folder: Path, rows: dict[str, str]) -> None:
    lines = [json.dumps({"video": video, "caption": text}) for video, text in rows.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_folder_is_searched_with_subfolders_in_order_of_names(tmp_path):
    touch(tmp_path, "b.MP4", "a.webm", "sub/c.mov", ".hidden.mp4", ".git/d.mp4", "note.md")
    captions(tmp_path, {"b.MP4": "bee", "a.webm": "ay", "sub/c.mov": "sea"})
    clips, problems = find_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [("a.webm", "ay"), ("b.MP4", "bee"), ("sub/c.mov", "sea")]
    assert clips[2].path == tmp_path / "sub" / "c.mov"
    assert problems == []


@pytest.mark.parametrize(
    "file, text",
    [
        ("captions.jsonl", '{"video": "a.mp4", "caption": "a cat"}\n'),
        ("metadata.jsonl", '\ufeff{"file_name": "a.mp4", "text": "a cat"}\r\n\r\n'),
        ("captions.csv", "video,caption\na.mp4,a cat\n"),
        ("metadata.csv", '\ufefffile_name,prompt\r\na.mp4,"a\ncat"\r\n'),
        ("a.txt", "  a cat\n"),
    ],
)
def test_captions_are_read_from_each_documented_place(tmp_path, file, text):
    touch(tmp_path, "a.mp4")
    (tmp_path / file).write_text(text, encoding="utf-8")
    clips, problems = find_clips(tmp_path)
    assert [clip.caption for clip in clips] == ["a cat"] and problems == []


def test_captions_file_elsewhere_and_bare_names_for_files_in_subfolders(tmp_path):
    touch(tmp_path / "videos", "x/a.mp4", "y/b.mp4", "z/b.mp4")
    rows = [{"video": "a.mp4", "caption": "one"}, {"video": "b.mp4", "caption": "which?"}]
    (tmp_path / "elsewhere.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips, problems = find_clips(tmp_path / "videos", tmp_path / "elsewhere.jsonl")
    assert [clip.name for clip in clips] == ["x/a.mp4"]
    reasons = {problem.video: problem.reason for problem in problems}
    assert reasons["b.mp4"] == "elsewhere.jsonl:2 could mean any of y/b.mp4, z/b.mp4"
    assert reasons["y/b.mp4"] == reasons["z/b.mp4"] == "no caption"


def test_every_kind_of_problem_is_told_apart_and_the_good_ones_are_kept(tmp_path):
    touch(tmp_path, "good.mp4", "captionless.mp4", "empty.mp4", "number.mp4", "beside.mp4")
    (tmp_path / "later.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    (tmp_path / "beside.txt").write_bytes(b"\xff\xfe\x00broken")
    (tmp_path / "captions.jsonl").write_text(
        "\n".join(
            [
                '{"video": "good.mp4", "caption": "fine"}',
                '{"video": "empty.mp4", "caption": "  "}',
                '{"video": "gone.mp4", "caption": "of nothing"}',
                '{"video": "later.mp4", "caption": "the same bytes"}',
                '{"video": "half',
                '["a", "list"]',
                '{"caption": "of what?"}',
                '{"video": "number.mp4", "caption": 7}',
                '{"video": "good.mp4", "caption": "again"}',
            ]
        )
    )
    clips, problems = find_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [("good.mp4", "fine")]
    found = {(problem.video, problem.reason) for problem in problems}
    for video, part in [
        ("captionless.mp4", "no caption"),
        ("empty.mp4", "its caption is empty (captions.jsonl:2)"),
        ("gone.mp4", "captions.jsonl:3 has a caption for it, but there is no such video"),
        ("later.mp4", "the same file as good.mp4, byte for byte"),
        ("captions.jsonl:5", "line 5 is not JSON"),
        ("captions.jsonl:6", "line 6 is not a JSON object"),
        ("captions.jsonl:7", "line 7 names no video"),
        ("captions.jsonl:8", "line 8: the caption is not a text but 7"),
        ("good.mp4", "second caption at captions.jsonl:9; captions.jsonl:1 is kept"),
        ("beside.mp4", "its caption file beside.txt cannot be read as UTF-8 text"),
    ]:
        assert [v for v, reason in found if v == video and part in reason], (video, part, found)


@pytest.mark.parametrize(
    "names, rows, message",
    [
        ([], None, "no videos in"),
        (["a.mp4"], None, "no captions for the 1 videos in"),
        (["a.mp4"], {"b.mp4": "other"}, "no captions for the 1 videos in"),
        (["a.mp4"], {"a.mp4": ""}, "no usable video in"),
    ],
)
def test_folder_without_anything_usable_is_one_clear_error(tmp_path, names, rows, message):
    touch(tmp_path, *names)
    if rows is not None:
        captions(tmp_path, rows)
    with pytest.raises(DataError, match=message) as error:
        find_clips(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_missing_captions_file_and_wrong_columns_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_clips(tmp_path / "nowhere")
    touch(tmp_path, "a.mp4")
    with pytest.raises(DataError, match=r"captions file mine\.jsonl does not exist"):
        find_clips(tmp_path, "mine.jsonl")
    (tmp_path / "captions.csv").write_text("clip,words\na.mp4,a cat\n")
    with pytest.raises(DataError, match="clip, words; one of video, file_name"):
        find_clips(tmp_path)


def test_folders_that_may_not_be_looked_into_are_said(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "closed/b.mp4", "sub/shut/c.mp4")
    captions(tmp_path, {"a.mp4": "one"})
    scandir = os.scandir

    def guarded(folder):
        if Path(folder).name in ("closed", "shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", guarded)
    clips, problems = find_clips(tmp_path)
    assert [clip.name for clip in clips] == ["a.mp4"]
    assert [(problem.video, problem.reason, problem.kind) for problem in problems] == [
        (name, "you may not look into this folder", NOTE) for name in ("closed", "sub/shut")
    ]
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match=r"no videos in .* \(closed: you may not look into this folder\)"):
        find_clips(tmp_path)


def test_a_link_back_up_does_not_go_round_in_circles(tmp_path):
    touch(tmp_path, "sub/a.mp4")
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    captions(tmp_path, {"sub/a.mp4": "one"})
    clips, problems = find_clips(tmp_path)
    assert [clip.name for clip in clips] == ["sub/a.mp4"] and problems == []


def test_names_that_differ_in_how_unicode_composes_them_are_matched(tmp_path):
    """macOS writes "é" as two characters, people type it as one."""
    one, two = "caf\u00e9.mp4", "cafe\u0301.mp4"
    for there, written in ((one, two), (two, one)):
        folder = tmp_path / str(len(there))
        touch(folder, there, f"sub/{there}x.mp4")
        captions(folder, {written: "a cat", f"sub/{written}x.mp4": "a dog"})
        clips, problems = find_clips(folder)
        assert [clip.caption for clip in clips] == ["a cat", "a dog"] and not problems
    both = tmp_path / "both"
    touch(both, one, two, "other.mp4")
    captions(both, {one: "a cat", two: "a dog", "other.mp4": "x"})
    assert {clip.name: clip.caption for clip in find_clips(both)[0]} == {one: "a cat", two: "a dog", "other.mp4": "x"}
    captions(both, {f" {one}": "a cat", "other.mp4": "x"})
    assert {problem.video for problem in find_clips(both)[1]} == {two}


def test_a_caption_file_beside_a_video_may_compose_its_name_otherwise(tmp_path):
    touch(tmp_path, "caf\u00e9.mp4")
    (tmp_path / "cafe\u0301.txt").write_text("a cat")
    assert [clip.caption for clip in find_clips(tmp_path)[0]] == ["a cat"]


def test_a_tilde_in_a_captions_file_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "clips", "a.mp4")
    captions(tmp_path / "clips", {"~/clips/a.mp4": "a cat"})
    clips, problems = find_clips(tmp_path / "clips")
    assert [clip.caption for clip in clips] == ["a cat"] and problems == []


def test_captions_files_that_are_not_read_are_said_once(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    captions(tmp_path, {"a.mp4": "a cat"})
    for name in ("metadata.csv", "captions.csv"):
        (tmp_path / name).write_text("file_name,text\nb.mp4,a dog\n")
    clips, problems = find_clips(tmp_path)
    assert [clip.name for clip in clips] == ["a.mp4"]
    assert [(problem.video, problem.reason) for problem in problems] == [
        ("b.mp4", "no caption"),
        ("captions.csv, metadata.csv", "not read: captions.jsonl is; keep one, or name it in data.captions"),
    ]
    assert [problem.video for problem in find_clips(tmp_path, "captions.jsonl")[1]] == ["b.mp4"]


@pytest.mark.parametrize(
    "row, differing",
    [
        ({"video": "a.mp4", "file_name": "b.mp4", "text": "x"}, "its video and its file_name differ"),
        ({"video": "x/a.mp4", "file_name": "y/a.mp4", "text": "x"}, "its video and its file_name differ"),
        ({"video": "a.mp4", "caption": "x", "text": "y"}, "its caption and its text differ"),
        ({"video": "a.mp4", "file_name": "sub/a.mp4", "caption": "x", "text": " x ", "description": "z"}, None),
        ({"video": "a.mp4", "file_name": None, "caption": "x", "text": ""}, None),
    ],
)
def test_two_columns_that_say_different_things_are_no_caption(tmp_path, row, differing):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + '\n{"video": "b.mp4", "caption": "fine"}\n')
    clips, problems = find_clips(tmp_path)
    assert [clip.name for clip in clips] == (["b.mp4"] if differing else ["a.mp4", "b.mp4"])
    reasons = {problem.video: problem.reason for problem in problems}
    assert reasons == ({} if not differing else {
        "a.mp4": "no caption", "captions.jsonl:1": f"line 1: {differing}; keep one of the columns"
    })  # fmt: skip
