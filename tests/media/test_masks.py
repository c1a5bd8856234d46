import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import DataError
from alignkit.media.masks import mask_digest, read_mask
from alignkit.media.videos import VideoSpec, decode_clip, decode_with_facts, read_video, write_video

SPEC = VideoSpec(height=48, width=48, num_frames=17)
OWN = (20, 60, 100)  # frames, height and width of the video itself


def box(frames=OWN[0], height=OWN[1], width=OWN[2]) -> np.ndarray:
    """Bool: a box, unlike in any turn and mirroring, that moves to the right by two pixels a frame."""
    mask = np.zeros((frames, height, width), dtype=bool)
    for i in range(frames):
        mask[i, 8 : height // 2, width // 4 + 2 * i : width // 2 + 2 * i] = True
    return mask


def white(mask: np.ndarray) -> torch.Tensor:
    """The mask as a video, uint8 [F, H, W, 3], white inside."""
    return torch.from_numpy(np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1))


def lossless(path: Path, frames: torch.Tensor, times=None, pixel_shape=None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        stream.codec_context.sample_aspect_ratio = pixel_shape or Fraction(1)
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else 100 * i), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pngs(folder: Path, mask: np.ndarray, picture=lambda frame: Image.fromarray(frame)) -> Path:
    """Names whose order as texts is another than that of their numbers."""
    folder.mkdir()
    for i, frame in enumerate(mask):
        picture(frame).save(folder / f"frame{i}.png")
    return folder


def palette(frame: np.ndarray) -> Image.Image:
    """As segmenters write label maps: dark red is object 1."""
    image = Image.fromarray(frame.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def boxes_of(mask: np.ndarray) -> list:
    """One box a frame, and a second one inside it: boxes add up."""
    found = []
    for frame in mask:
        y, x = frame.nonzero()
        outer = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        found.append([outer, [outer[0] + 1, outer[1], outer[2] - 0.75, outer[3]]])
    return found


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def text(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


FORMATS = {
    "video": lambda folder, mask: lossless(folder / "m.mkv", white(mask)),
    "lossy video": lambda folder, mask: write_video(folder / "m.mp4", white(mask), 10) or folder / "m.mp4",
    "1-bit pngs": lambda folder, mask: pngs(folder / "m", mask),
    "grey pngs": lambda folder, mask: pngs(folder / "m", mask, lambda f: Image.fromarray(f * np.uint8(255))),
    "pngs of 0 and 1": lambda folder, mask: pngs(folder / "m", mask, lambda f: Image.fromarray(f.astype(np.uint8))),
    "16-bit pngs": lambda folder, mask: pngs(folder / "m", mask, lambda f: Image.fromarray(f * np.uint16(65535))),
    "grey pngs in RGB": lambda folder, mask: pngs(folder / "m", mask, lambda f: Image.fromarray(f).convert("RGB")),
    "palette pngs": lambda folder, mask: pngs(folder / "m", mask, palette),
    "bool array": lambda folder, mask: saved(folder / "m.npy", mask),
    "0-1 array": lambda folder, mask: saved(folder / "m.npy", mask.astype(np.int64)),
    "0-255 array": lambda folder, mask: saved(folder / "m.npy", mask * np.uint8(155) + np.uint8(100)),
    "float array": lambda folder, mask: saved(folder / "m.npy", mask * np.float32(0.3) + np.float32(0.3)),
    "boxes": lambda folder, mask: text(folder / "m.json", {"boxes": boxes_of(mask)}),
}  # fmt: skip


@pytest.fixture
def video(tmp_path) -> Path:
    """60x100 pixels, 20 frames, 10 a second; its pictures are the mask's own, white on black."""
    return lossless(tmp_path / "video.mkv", white(box()))


def shown(video: Path, spec: VideoSpec) -> torch.Tensor:
    return decode_clip(video, spec)[..., 0] >= 128


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_pixels_that_decoding_gives(tmp_path, video, kind):
    mask = read_mask(FORMATS[kind](tmp_path, box()), video, SPEC)
    assert mask.dtype == torch.bool and mask.shape == (17, 48, 48) and 0 < mask.sum() < mask.numel()
    assert torch.equal(mask, shown(video, SPEC))


@pytest.mark.parametrize("fps", [5, 7.5, 20])
@pytest.mark.parametrize("kind", ["video", "1-bit pngs", "bool array", "boxes"])
def test_resampling_in_time_takes_the_frames_that_decoding_takes(tmp_path, fps, kind):
    times = [100 * i + 30 * (i % 3) for i in range(20)]  # uneven: the timestamps of the video decide
    video = lossless(tmp_path / "video.mkv", white(box()), times)
    spec = VideoSpec(48, 48, 9, fps)
    mask = read_mask(FORMATS[kind](tmp_path, box()), video, spec)
    assert torch.equal(mask, shown(video, spec))
    assert not torch.equal(mask, shown(video, VideoSpec(48, 48, 9))), "resampling changes nothing here"


def test_pixels_that_are_not_square_are_stretched_as_those_of_the_video(tmp_path):
    video = lossless(tmp_path / "video.mkv", white(box()), pixel_shape=Fraction(2))
    assert decode_with_facts(video, SPEC)[1].stretch == 2
    mask = read_mask(saved(tmp_path / "m.npy", box()), video, SPEC)
    assert torch.equal(mask, shown(video, SPEC))


def test_mask_of_a_turned_video_is_upright(tmp_path):
    video = tmp_path / "turned.mp4"
    write_video(video, white(box()), 10)
    identity, one = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), 1 << 16
    head, _, tail = video.read_bytes().rpartition(identity)
    video.write_bytes(head + struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30) + tail)
    upright = read_video(video)[..., 0].numpy() >= 128
    assert upright.shape == (20, 100, 60)
    mask = read_mask(pngs(tmp_path / "m", upright), video, SPEC)
    assert (mask == shown(video, SPEC)).float().mean() > 0.99  # the video's own edges are blurred by its codec
    with pytest.raises(DataError, match=r"m\.npy: is 60x100 .* turned\.mp4 is 100x60"):
        read_mask(saved(tmp_path / "m.npy", box()), video, SPEC)


@pytest.mark.parametrize("one", [1, 17, 20])
def test_mask_of_the_final_size_is_taken_as_it_is(tmp_path, video, one):
    given = box(one, 48, 48)
    mask = read_mask(saved(tmp_path / "m.npy", given), video, SPEC)
    assert torch.equal(mask, torch.from_numpy(given[:17]).expand(17, 48, 48))


@pytest.mark.parametrize("spec", [SPEC, VideoSpec(48, 48, 17, 20.0)])
def test_mask_of_the_frames_used_is_not_resampled_again(tmp_path, video, spec):
    given = box(17, 48, 48)
    assert torch.equal(read_mask(saved(tmp_path / "m.npy", given), video, spec), torch.from_numpy(given))


@pytest.mark.parametrize(
    "still",
    [
        lambda folder: saved(folder / "m.npy", box()[3]),
        lambda folder: pngs(folder / "m", box()[3:4]),
        lambda folder: pngs(folder / "m", box()[3:4]) / "frame0.png",
        lambda folder: text(folder / "m.json", {"static": boxes_of(box()[3:4])[0]}),
        lambda folder: text(folder / "m.json", {"boxes": boxes_of(box()[3:4])}),
    ],
)
def test_still_mask_holds_for_every_frame(tmp_path, video, still):
    mask = read_mask(still(tmp_path), video, SPEC)
    assert torch.equal(mask, shown(video, SPEC)[3].expand(17, 48, 48))


def test_known_facts_of_the_video_save_a_second_decoding(tmp_path, video):
    _, facts = decode_with_facts(video, SPEC)
    expected = shown(video, SPEC)
    file = saved(tmp_path / "m.npy", box())
    video.write_bytes(b"no video any more")
    assert torch.equal(read_mask(file, facts, SPEC), expected)


def test_boxes_hold_the_pixels_with_their_centre_inside(tmp_path):
    write_video(tmp_path / "video.mp4", white(box(17, 48, 48)), 8)
    file = text(tmp_path / "m.json", {"static": [[10.5, 10.4, 12.6, 12.5]]})
    inside = read_mask(file, tmp_path / "video.mp4", SPEC)[0].nonzero().tolist()
    assert inside == [[y, x] for y in (10, 11) for x in (10, 11, 12)]


def test_boxes_end_at_the_border_of_the_video(tmp_path, video):
    mask = read_mask(text(tmp_path / "m.json", {"static": [[-50, -50, 500, 500]]}), video, SPEC)
    assert mask.all()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.npy", None, "no such mask"),
        ("m.tiff", b"", "a mask is a folder of .png files or one of .mp4"),
        ("m.mp4", b"nothing", "cannot be read as a video"),
        ("m.png", b"nothing", "cannot be read as a picture"),
        ("m.npy", b"", "cannot be read as a NumPy array"),
        ("m.npy", np.array([[{}]]), "cannot be read as a NumPy array"),
        ("m.npy", np.array([["inside"]]), "holds <U6; a mask is bool"),
        ("m.npy", np.ones((2, 3, 4, 5), bool), r"expected an array \[F, H, W\] or \[H, W\], got \(2, 3, 4, 5\)"),
        ("m.npy", box() * np.int16(300), r"holds int16 from 0 to 300; a mask is bool"),
        ("m.npy", box() * np.float32(255), r"holds float32 from 0.0 to 255.0"),
        ("m.npy", box() * np.float32("nan"), "holds float32 from nan"),
        ("m.npy", box() * 1j, "holds complex128"),
        ("m.npy", box(18), r"has 18 frames, but video\.mkv has 20: .* each of the 17"),
        ("m.npy", box(20, 61, 100), r"is 61x100 \(height x width\), but video\.mkv is 60x100: .* 48x48"),
        ("m.npy", np.zeros(OWN, bool), r"is empty"),
        ("m.npy", np.where(np.arange(20)[:, None, None] > 16, box(), False), "is empty"),  # only after what is used
        ("m.json", b"{", "cannot be read as JSON"),
        ("m.json", b"[" * 100_000, "cannot be read as JSON"),
        ("m.json", b'{"static": [[1, 2, 1%s, 4]]}' % (b"0" * 400), "frame 0: expected"),
        ("m.json", b"[]", 'expected {"boxes"'),
        ("m.json", b'{"boxes": [], "static": []}', 'expected {"boxes"'),
        ("m.json", b'{"boxes": []}', "boxes is not a list with a list of boxes for each frame"),
        ("m.json", b'{"boxes": [[[1, 2, 3]]]}', r"frame 0: expected \[x0, y0, x1, y1\] with .* got \[1, 2, 3\]"),
        ("m.json", b'{"boxes": [[], [[9, 2, 3, 4]]]}', r"frame 1: expected .* got \[9, 2, 3, 4\]"),
        ("m.json", b'{"boxes": [[1, 2, 3, 4]]}', "frame 0: expected .* got 1"),
        ("m.json", b'{"static": [[1, 2, NaN, 4]]}', r"got \[1, 2, nan, 4\]"),
        ("m.json", b'{"static": [[99.6, 0, 300, 9]]}', "is empty"),
        (
            "m.json",
            b'{"boxes": [[[0, 0, 9, 9]], [[0, 0, 9, 9], [100, 0, 110, 9]]]}',
            r"frame 1: \[100, 0, 110, 9\] lies outside the video's 100 x 60 pixels",
        ),
        ("m.json", b'{"static": [[0, -9, 9, 0]]}', r"frame 0: \[0, -9, 9, 0\] lies outside"),
        ("m.json", b'{"static": 7}', "frame 0: expected .* got 7"),
        ("m.json", b'{"static": [[0, 0, 9, 9]], "static": [[30, 0, 48, 9]]}', "holds the key 'static' twice; keep one"),
    ],
)
def test_mask_that_cannot_be_used_is_refused_in_one_line(tmp_path, video, name, content, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(DataError, match=message) as error:
        read_mask(file, video, SPEC)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def labels(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame.astype(np.uint8) * np.uint8(3))


def alpha(frame: np.ndarray) -> Image.Image:
    image = Image.new("RGBA", frame.shape[::-1], "white")
    image.putalpha(Image.fromarray(frame * np.uint8(255)))
    return image


def coloured(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame[..., None] * np.array([255, 0, 0], np.uint8))


def labels_in_16_bits(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame * np.uint16(257) + np.uint16(2))


@pytest.mark.parametrize(
    "picture, words",
    [
        (labels, "values up to 3, as labels would"),
        (labels_in_16_bits, "holds uint16 from 2 to 259"),
        (alpha, "is transparent"),
        (coloured, "is in colour"),
    ],
)
def test_pictures_that_could_be_read_two_ways_are_refused(tmp_path, video, picture, words):
    with pytest.raises(DataError, match=words):
        read_mask(pngs(tmp_path / "m", box(), picture), video, SPEC)


def test_an_empty_frame_of_black_and_white_pictures_does_not_change_what_white_means(tmp_path, video):
    """Some segmenters leave a stray 1 where they found nothing; alone in a frame it is no 0-and-1 mask."""
    inside = box()
    inside[12:] = False
    grey = inside * np.uint8(255)
    grey[12:, 0, 0] = 1
    folder = tmp_path / "m"
    folder.mkdir()
    for i, frame in enumerate(grey):
        Image.fromarray(frame).save(folder / f"frame{i}.png")
    (folder / "thumbnails").mkdir()
    assert not read_mask(folder, video, SPEC)[12:].any()
    before = mask_digest(folder)
    (folder / "notes.txt").write_text("no picture")
    assert mask_digest(folder) == before, "what is not read does not count"


def test_animations_are_refused(tmp_path, video):
    """Their first frame alone would be the mask of all."""
    first, *others = [Image.fromarray(frame * np.uint8(255)) for frame in box()]
    first.save(tmp_path / "m.png", save_all=True, append_images=others)
    with pytest.raises(DataError, match=r"m\.png: is an animation; save each of its frames as a \.png"):
        read_mask(tmp_path / "m.png", video, SPEC)


def test_frames_of_other_kinds_than_png_are_not_missed(tmp_path, video):
    folder = pngs(tmp_path / "m", box(17, 48, 48))
    for name in ("cover.jpg", "frame3.jpg"):  # no frame, and the picture that a mask was made of
        (folder / name).touch()
    assert read_mask(folder, video, SPEC).any()
    (folder / "frame17.JPG").touch()
    with pytest.raises(DataError, match=r"m: frame17\.JPG lies among \.png files"):
        read_mask(folder, video, SPEC)


def test_folder_without_pictures_damaged_video_and_the_video_itself_are_refused(tmp_path, video):
    (tmp_path / "m").mkdir()
    with pytest.raises(DataError, match=r"m: holds no \.png file"):
        read_mask(tmp_path / "m", video, SPEC)
    damaged = FORMATS["lossy video"](tmp_path, box())
    data = bytearray(damaged.read_bytes())
    start, end = data.index(b"mdat") + 900, data.index(b"moov") - 40
    data[start:end] = b"\xff" * (end - start)
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"m\.mp4: damaged"):
        read_mask(damaged, video, SPEC)
    with pytest.raises(DataError, match="is the video itself"):
        read_mask(video, video, SPEC)
    with pytest.raises(DataError, match=r"gone\.mkv: no such file"):
        read_mask(damaged, tmp_path / "gone.mkv", SPEC)


def test_mask_of_a_video_longer_than_is_looked_at_may_be_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit.media.videos.CHECKED_FRAMES", 2)
    video = lossless(tmp_path / "long.mkv", white(box(30)))
    assert decode_with_facts(video, SPEC)[1].frames == 19
    assert torch.equal(read_mask(saved(tmp_path / "m.npy", box(30)), video, SPEC), shown(video, SPEC))
