"""What the machine cannot read just now is neither left out, nor called damaged, nor taken for what is not there."""

import errno
import os
from pathlib import Path

import datasets
import pytest

from alignkit.errors import MomentError
from alignkit.media.captions import caption_beside
from alignkit.media.finding import Clip
from alignkit.media.masks import read_mask
from alignkit.media.usable import usable_clips
from alignkit.media.videos import VideoFacts, VideoSpec, decode_clip
from alignkit.moment import listed
from alignkit.sharing import shared_folder, stored_terms
from alignkit.stores.store import StoreInfo, open_blocks, read_info
from alignkit.training import manifest
from alignkit.training.masters import handed_on

UNREADABLE = Path("/proc/self/mem")  # a file whose first bytes give EIO, as those of a disk that does not answer
INFO = StoreInfo("given", "wan", None, "", "", pairs=1, block_size=1)
SPEC = VideoSpec(48, 48, 5)


@pytest.fixture
def silent(tmp_path):
    """silent("a.mp4"): a file of that name that cannot be read."""

    def make(name: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(UNREADABLE)
        return tmp_path / name

    return make


def checkpoint_of(folder: Path) -> None:
    path = folder / "step-00000002"
    manifest.described(path, lambda: manifest.damage(path))


READERS = {
    "a.mp4": lambda folder: decode_clip(folder / "a.mp4", SPEC),
    "a.txt": lambda folder: caption_beside(folder / "a.mp4"),
    **{
        f"m.{kind}": lambda folder, name=f"m.{kind}": read_mask(
            folder / name, VideoFacts(folder / "a.mp4", 5, True, 48, 48, 1.0, 8.0, tuple(range(5))), SPEC
        )
        for kind in ("png", "npy", "json", "mp4")
    },
    "pairs.json": lambda folder: read_info(folder),
    "block-00000.arrow": lambda folder: open_blocks(folder, INFO, datasets.Features(), [0]),
    "masters.json": handed_on,
    "terms.json": stored_terms,
    "step-00000002/manifest.json": checkpoint_of,
}


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_just_now_ends_the_command_in_one_line(tmp_path, silent, name):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).unlink(missing_ok=True)
    silent(name)
    with pytest.raises(MomentError, match="the machine cannot read it just now") as error:
        READERS[name](tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_clip_that_cannot_be_read_just_now_is_not_left_out(tmp_path, silent, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    clips = [Clip(path, path.name, "a caption") for path in (silent("a.mp4"), tmp_path / "b.mp4")]
    with pytest.raises(MomentError, match=r"a\.mp4: .*Input/output error"):
        usable_clips(clips, tmp_path, SPEC, show=False)
    assert [problem.video for problem in usable_clips(clips[1:], tmp_path, SPEC, show=False)[1]] == ["b.mp4"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE])
def test_what_passes_before_a_second_look_counts_too(tmp_path, monkeypatch, number):
    def exhausted(*_, **__):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a.mp4").write_bytes(b"whatever")
    monkeypatch.setattr("alignkit.media.videos.av.open", exhausted)
    with pytest.raises(MomentError, match=os.strerror(number)):
        decode_clip(tmp_path / "a.mp4", SPEC)


def test_files_made_under_terms_that_cannot_be_read_just_now_are_kept(tmp_path, silent):
    with shared_folder(tmp_path, {"seed": 1}, "sample", r".*\.mp4"):
        (tmp_path / "made.mp4").write_bytes(b"hours of work")
    (tmp_path / "terms.json").rename(tmp_path / "kept")
    silent("terms.json")
    with pytest.raises(MomentError), shared_folder(tmp_path, {"seed": 1}, "sample", r".*\.mp4"):
        pass
    (tmp_path / "kept").replace(tmp_path / "terms.json")
    with shared_folder(tmp_path, {"seed": 1}, "sample", r".*\.mp4"):
        assert (tmp_path / "made.mp4").read_bytes() == b"hours of work"


def test_a_folder_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    for name in ("step-2", "step-10", "other"):
        (tmp_path / name).touch()
    assert [path.name for path in listed(tmp_path, "step-*")] == ["step-10", "step-2"]
    assert listed(tmp_path / "nowhere", "*") == listed(tmp_path / "other", "*") == []

    def unanswered(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

    monkeypatch.setattr("os.listdir", unanswered)
    with pytest.raises(MomentError, match=f"{tmp_path}: the machine cannot read it"):
        manifest.candidates(tmp_path)
