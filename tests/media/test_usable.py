"""Which videos are used: bad and repeated ones are passed over, and each file is decoded once."""

import errno

import pytest
import torch

from alignkit.errors import DataError
from alignkit.media import usable, videos
from alignkit.media.finding import Clip
from alignkit.media.usable import usable_clips
from alignkit.media.videos import VideoSpec, write_video

SPEC = VideoSpec(48, 48, 5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """a and d show the same pictures, b is too short, c is no video, e is fine."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (8, 48, 48, 3), generator=generator, dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    write_video(tmp_path / "b.mp4", frames[:3], 8)
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    (tmp_path / "d.mp4").write_bytes((tmp_path / "a.mp4").read_bytes() + b"free space at the end")
    write_video(tmp_path / "e.mp4", frames.flip(1), 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def look(folder):
    clips = [Clip(path, path.name, "a caption") for path in sorted(folder.glob("*.mp4"))]
    return usable_clips(clips, folder, SPEC, show=False)


def test_bad_files_and_repeated_pictures_are_passed_over(folder):
    good, problems = look(folder)
    assert [clip.name for clip, _ in good] == ["a.mp4", "e.mp4"]
    assert len({digest for _, digest in good}) == 2
    reasons = {problem.video: problem.reason for problem in problems}
    assert list(reasons) == ["b.mp4", "c.mp4", "d.mp4"]
    assert reasons["b.mp4"].startswith("too short: it has 3 frames")
    assert reasons["d.mp4"] == "the same pictures as a.mp4"


def test_what_was_found_is_remembered_until_the_file_changes(folder, monkeypatch):
    first = look(folder)
    looked_at = []
    monkeypatch.setattr(usable, "decode_clip", lambda path, spec: looked_at.append(path.name))
    assert look(folder) == first and looked_at == []
    monkeypatch.undo()
    (memory,) = (folder / "cache").rglob("*.jsonl")
    lines = memory.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    memory.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    assert look(folder) == first
    (folder / "e.mp4").write_bytes(b"damaged since")
    good, problems = look(folder)
    assert [clip.name for clip, _ in good] == ["a.mp4"]
    assert "e.mp4" in {problem.video for problem in problems}


@pytest.mark.parametrize("cause", [PermissionError(), MemoryError()])
def test_what_the_machine_could_not_do_for_a_moment_is_not_remembered(folder, monkeypatch, cause):
    def exhausted(path, spec):
        raise DataError(f"{path}: cannot be read as a video") from cause

    monkeypatch.setattr(usable, "decode_clip", exhausted)
    assert look(folder)[0] == []
    monkeypatch.undo()
    assert [clip.name for clip, _ in look(folder)[0]] == ["a.mp4", "e.mp4"]


def test_rights_that_a_folder_gives_are_looked_at_anew(folder, monkeypatch):
    """They come and go without a trace on the file."""
    opened, av_open = [], videos.av.open

    def guarded(path, *given, **more):
        if not opened and str(path).endswith("e.mp4"):
            raise videos.av.error.PermissionError(errno.EACCES, "Permission denied", path)
        return av_open(path, *given, **more)

    monkeypatch.setattr(videos.av, "open", guarded)
    assert "Permission denied" in {problem.video: problem.reason for problem in look(folder)[1]}["e.mp4"]
    opened.append(True)
    assert [clip.name for clip, _ in look(folder)[0]] == ["a.mp4", "e.mp4"]
