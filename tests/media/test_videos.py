import json
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import DataError
from alignkit.media.finding import Clip, find_clips
from alignkit.media.usable import usable_clips
from alignkit.media.videos import VideoSpec, decode_clip, read_video, write_video

SPEC = VideoSpec(height=48, width=48, num_frames=17)


def quadrants(height=48, width=48, frames=20) -> torch.Tensor:
    """Red top left, green top right, blue bottom left, white bottom right, and a grey bar that moves: every
    turn, mirroring and frame of it is different."""
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    video[:, : height // 2, : width // 2, 0] = 255
    video[:, : height // 2, width // 2 :, 1] = 255
    video[:, height // 2 :, : width // 2, 2] = 255
    video[:, height // 2 :, width // 2 :] = 255
    for i in range(frames):
        video[i, height // 2 - 4 : height // 2 + 4, 2 * i : 2 * i + 4] = 128
    return video


def corners(frame: torch.Tensor) -> list[str]:
    """The colours of the four corners: top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    y, x = height // 6, width // 6
    named = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    found = []
    for point in (frame[y, x], frame[y, -x], frame[-y, x], frame[-y, -x]):
        # 8-bit YCbCr with limited range is exact to about 3 levels
        near = [n for n, rgb in named.items() if (point.int() - torch.tensor(rgb)).abs().max() <= 4]
        found.append(near[0] if near else str(point.tolist()))
    return found


def grey_ramp(frames: int) -> torch.Tensor:
    """Frame i is grey of value 10·i: a decoded frame says which one it is."""
    values = (torch.arange(frames) * 10).to(torch.uint8)
    return values[:, None, None, None].expand(frames, 16, 16, 3).contiguous()


def which(frames: torch.Tensor) -> list[int]:
    return [round(value / 10) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Patch the matrix in an mp4's track header, as a phone writes it for a turned camera."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # type 4, version and flags 4, version 0 fields up to the matrix 36
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[start : start + 36] == identity
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def encode(
    path: Path,
    frames: torch.Tensor,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    times=None,
    matrix=None,
    full_range=False,
    pixel_shape=None,
    audio=False,
    transfer=None,
) -> Path:
    """A file unlike those that write_video makes: other codecs, formats, timestamps, tags, sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if matrix is not None:
            stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6}[matrix]
            stream.codec_context.color_range = 2 if full_range else 1
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=44100, layout="mono") if audio else None
        if sound is not None:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
            noise.sample_rate, noise.pts = 44100, 0
            container.mux(sound.encode(noise))
        for i, picture in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range="JPEG" if full_range else None
            )
            frame.pts, frame.time_base = (times[i] if times else 100 * i), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(sound.encode())
    return path


# --- decoding -----------------------------------------------------------------------------------------------


def test_written_video_reads_back_with_its_frames_and_colours(tmp_path):
    video = quadrants()
    write_video(tmp_path / "sub" / "a.mp4", video, 8)
    frames = decode_clip(tmp_path / "sub" / "a.mp4", SPEC)
    assert frames.shape == (17, 48, 48, 3) and frames.dtype == torch.uint8
    assert corners(frames[0]) == ["red", "green", "blue", "white"]
    # chroma at half resolution blurs the borders between colours only
    assert (frames.float() - video[:17].float()).abs().mean() < 4
    with av.open(str(tmp_path / "sub" / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.mp4"], "a temporary file is left behind"


@pytest.mark.parametrize(
    "matrix, expected",
    [
        ((1, 0, 0, 1), ["red", "green", "blue", "white"]),
        ((0, 1, -1, 0), ["blue", "red", "white", "green"]),  # a quarter turn clockwise
        ((-1, 0, 0, -1), ["white", "blue", "green", "red"]),
        ((0, -1, 1, 0), ["green", "white", "red", "blue"]),  # a quarter turn counterclockwise
        ((-1, 0, 0, 1), ["green", "red", "white", "blue"]),  # mirrored
        ((0, 1, 1, 0), ["red", "blue", "green", "white"]),  # transposed
    ],
)
def test_rotated_and_mirrored_files_are_shown_upright(tmp_path, matrix, expected):
    write_video(tmp_path / "r.mp4", quadrants(48, 64), 8)
    if matrix != (1, 0, 0, 1):
        set_display_matrix(tmp_path / "r.mp4", *matrix)
    turned = matrix[0] == 0
    spec = VideoSpec(*((64, 48) if turned else (48, 64)), num_frames=17)
    frames = decode_clip(tmp_path / "r.mp4", spec)
    assert corners(frames[0]) == expected
    # the whole picture fits: its borders are where they belong, so nothing was cropped before turning
    assert corners(decode_clip(tmp_path / "r.mp4", VideoSpec(48, 48, 17))[0]) == expected


@pytest.mark.parametrize("codec, pix_fmt", [("libx264", "yuv444p"), ("ffv1", "bgr0"), ("ffv1", "yuv420p")])
def test_odd_sizes_and_other_formats_are_used(tmp_path, codec, pix_fmt):
    path = encode(tmp_path / "odd.mkv", quadrants(51, 77), codec=codec, pix_fmt=pix_fmt)
    frames = decode_clip(path, SPEC)
    assert frames.shape == (17, 48, 48, 3)
    assert corners(frames[0]) == ["red", "green", "blue", "white"]


def test_whole_video_is_read_at_its_own_size(tmp_path):
    write_video(tmp_path / "a.mp4", quadrants(48, 64), 8)
    set_display_matrix(tmp_path / "a.mp4", 0, 1, -1, 0)
    frames = read_video(tmp_path / "a.mp4")
    assert frames.shape == (20, 64, 48, 3)
    assert corners(frames[0]) == ["blue", "red", "white", "green"]
    with pytest.raises(DataError, match="no such file"):
        read_video(tmp_path / "b.mp4")


def test_odd_sizes_are_written_padded(tmp_path):
    video = quadrants(33, 47)
    write_video(tmp_path / "odd.mp4", video, 8)
    frames = decode_clip(tmp_path / "odd.mp4", VideoSpec(34, 48, 17))
    assert corners(frames[0]) == ["red", "green", "blue", "white"]
    last = frames[0, 33, 30:].float() - video[0, 32, 30].float()
    assert last.abs().max() < 8, "the padding repeats the last row"


@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
@pytest.mark.parametrize("full_range", [False, True])
def test_tagged_colour_matrix_and_range_are_honoured(tmp_path, matrix, full_range):
    path = encode(tmp_path / "tagged.mp4", quadrants(), matrix=matrix, full_range=full_range)
    assert corners(decode_clip(path, SPEC)[0]) == ["red", "green", "blue", "white"]


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = encode(tmp_path / "wide.mkv", quadrants(48, 48), pixel_shape=Fraction(2, 1))
    shown = decode_clip(path, VideoSpec(48, 96, 17))
    assert corners(shown[0]) == ["red", "green", "blue", "white"], "48x48 pixels of 2:1 are shown as 96x48"
    middle = decode_clip(path, VideoSpec(48, 48, 17))
    assert corners(middle[0]) == ["red", "green", "blue", "white"]
    assert middle[0, 8, 20].argmax() == 0 and middle[0, 8, 27].argmax() == 1, "the crop is not centred"


def test_pixels_that_are_not_square_are_stretched_before_turning(tmp_path):
    path = encode(tmp_path / "wide.mp4", quadrants(48, 48), pixel_shape=Fraction(2, 1))
    set_display_matrix(path, 0, 1, -1, 0)
    shown = decode_clip(path, VideoSpec(96, 48, 17))[0]  # 96x48, turned
    assert corners(shown) == ["blue", "red", "white", "green"]
    # the bar is 8 of the 48 rows high as stored, and 8 of the 48 columns wide as shown
    assert 6 <= ((shown[2].int() - 128).abs().amax(dim=-1) < 40).sum() <= 10


def test_resize_covers_crops_in_the_middle_and_antialiases(tmp_path):
    wide = torch.zeros(17, 64, 192, 3, dtype=torch.uint8)
    wide[:, :, 64:128, 0] = 255  # the middle third is red
    write_video(tmp_path / "wide.mp4", wide, 8)
    crop = decode_clip(tmp_path / "wide.mp4", VideoSpec(32, 32, 17))
    assert (crop[..., 0] > 200).float().mean() > 0.9, "the middle third should fill the square"

    lines = torch.zeros(17, 128, 128, 3, dtype=torch.uint8)
    lines[:, ::2] = 255  # the finest stripes there are: shrunk to a quarter they must become even grey
    encode(tmp_path / "lines.mkv", lines, codec="ffv1", pix_fmt="bgr0")
    small = decode_clip(tmp_path / "lines.mkv", VideoSpec(32, 32, 17)).float()
    assert (small - 127.5).abs().max() < 12


def test_sound_in_the_file_changes_nothing(tmp_path):
    with_sound = encode(tmp_path / "sound.mkv", quadrants(), codec="ffv1", audio=True)
    silent = encode(tmp_path / "silent.mkv", quadrants(), codec="ffv1")
    with av.open(str(with_sound)) as container:
        assert len(container.streams.audio) == 1
    assert torch.equal(decode_clip(with_sound, SPEC), decode_clip(silent, SPEC))


def test_own_frames_are_the_first_ones_whatever_their_times(tmp_path):
    times = [0, 10, 20, 500, 510, 900]
    path = encode(tmp_path / "vfr.mkv", grey_ramp(6), codec="ffv1", times=times)
    assert which(decode_clip(path, VideoSpec(16, 16, 4))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "fps, frames, expected",
    [
        (5, 5, [0, 2, 4, 6, 8]),  # 10 a second: every second one
        (10, 4, [0, 1, 2, 3]),
        (20, 5, [0, 0, 1, 1, 2]),  # halfway between two: the earlier one
        (7.5, 4, [0, 1, 3, 4]),  # 0, 0.133, 0.267, 0.4 s
    ],
)
def test_resampling_takes_the_frames_nearest_in_time(tmp_path, fps, frames, expected):
    path = encode(tmp_path / "ramp.mkv", grey_ramp(10), codec="ffv1")
    assert which(decode_clip(path, VideoSpec(16, 16, frames, fps))) == expected


def test_resampling_uses_real_timestamps_when_they_are_uneven(tmp_path):
    times = [0, 100, 600, 700, 1000, 1100]
    path = encode(tmp_path / "vfr.mkv", grey_ramp(6), codec="ffv1", times=times)
    # wanted at 0, 0.25, 0.5, 0.75, 1.0 s; nearest: 0, 0.1, 0.6, 0.7, 1.0 s
    assert which(decode_clip(path, VideoSpec(16, 16, 5, 4))) == [0, 1, 2, 3, 4]


def test_last_frame_counts_until_its_duration_ends(tmp_path):
    path = encode(tmp_path / "ramp.mkv", grey_ramp(10), codec="ffv1")  # 1.0 s
    assert decode_clip(path, VideoSpec(16, 16, 8, 8)).shape[0] == 8
    with pytest.raises(DataError, match="8 at 8 frames a second, and 9 are needed"):
        decode_clip(path, VideoSpec(16, 16, 9, 8))


# --- files that cannot be used ------------------------------------------------------------------------------


def test_too_short_says_how_many_frames_there_are_and_are_needed(tmp_path):
    write_video(tmp_path / "short.mp4", quadrants(frames=5), 8)
    with pytest.raises(DataError, match=r"short\.mp4: too short: it has 5 frames, and 17 are needed"):
        decode_clip(tmp_path / "short.mp4", SPEC)


def test_damage_is_refused_even_after_the_frames_that_are_used(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (40, 48, 48, 3), dtype=torch.uint8, generator=generator)
    write_video(tmp_path / "late.mp4", noise, 8)
    data = bytearray((tmp_path / "late.mp4").read_bytes())
    start, end = data.index(b"mdat"), data.index(b"moov")
    at = start + int((end - start) * 0.9)
    data[at : at + 400] = b"\xff" * 400
    (tmp_path / "late.mp4").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        decode_clip(tmp_path / "late.mp4", SPEC)


def test_file_that_was_cut_off_is_refused(tmp_path):
    with av.open(str(tmp_path / "whole.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        for picture in quadrants(frames=40).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = (tmp_path / "whole.mp4").read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat"), "the index must survive the cut"
    (tmp_path / "cut.mp4").write_bytes(whole[: (whole.index(b"mdat") + 9 * len(whole)) // 10])
    assert decode_clip(tmp_path / "whole.mp4", SPEC).shape[0] == 17
    with pytest.raises(DataError, match=r"cut\.mp4: damaged after frame \d+ \(the file is cut off"):
        decode_clip(tmp_path / "cut.mp4", SPEC)


@pytest.mark.parametrize("content", [b"", b"not a video at all", bytes(4096)], ids=["empty", "text", "zeros"])
def test_files_that_are_no_video_are_refused(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.mp4: cannot be read as a video"):
        decode_clip(tmp_path / "bad.mp4", SPEC)


def test_missing_file_and_sound_only_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        decode_clip(tmp_path / "none.mp4", SPEC)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no video stream"):
        decode_clip(tmp_path / "sound.mp4", SPEC)


def test_random_damage_never_ends_in_anything_but_a_data_error(tmp_path):
    write_video(tmp_path / "whole.mp4", quadrants(), 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for round_ in range(60):
        data = bytearray(whole)
        if round_ % 2:
            data = data[: generator.integers(len(data))]
        for at in generator.integers(len(data) or 1, size=round_ % 7):
            data[at : at + 1] = bytes([generator.integers(256)])
        (tmp_path / "hit.mp4").write_bytes(data)
        try:
            assert decode_clip(tmp_path / "hit.mp4", SPEC).shape == (17, 48, 48, 3)
            outcomes.add("used")
        except DataError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"used", "refused"}


def test_write_video_leaves_the_old_file_alone_when_it_fails(tmp_path):
    write_video(tmp_path / "a.mp4", quadrants(), 8)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(DataError, match="uint8"):
        write_video(tmp_path / "a.mp4", quadrants().float(), 8)
    with pytest.raises(Exception):  # noqa: B017 (whatever the encoder says to a frame rate of 0)
        write_video(tmp_path / "a.mp4", quadrants(), 0)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_written_bytes_are_the_same_every_time(tmp_path):
    write_video(tmp_path / "a.mp4", quadrants(), 8)
    write_video(tmp_path / "b.mp4", quadrants(), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


# --- real clips ---------------------------------------------------------------------------------------------

BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / ".." / "shared" / "data" / "clips"
REAL = Path(os.environ.get("ALIGNKIT_TEST_CLIPS") or BESIDE_THE_REPOSITORY)
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no folder of real clips: set ALIGNKIT_TEST_CLIPS to one that has them"
)


@needs_real
@pytest.mark.parametrize("fps", [None, 8])
def test_real_clips_are_used_and_the_two_bad_ones_refused_with_a_reason(fps, tmp_path):
    names = sorted(p.name for p in REAL.iterdir() if p.suffix in (".mp4", ".mov", ".webm"))
    clips = [Clip(REAL / name, name, "a caption") for name in names]
    spec = VideoSpec(48, 64, 17 if fps is None else 7, fps)
    used, problems = usable_clips(clips, tmp_path, spec)
    assert {clip.name for clip, _ in used} == set(names) - {"corrupted.mp4", "rotated_90.mov"}
    reasons = {problem.video: problem.reason for problem in problems}
    assert "damaged, decoding fails after 28 frames" in reasons["corrupted.mp4"]
    assert "it has 3 frames" in reasons["rotated_90.mov"]
    pictures = [decode_clip(clip.path, spec) for clip, _ in used]
    assert all(frames.float().std() > 5 for frames in pictures), "a picture without contrast"


@needs_real
def test_real_rotated_file_is_upright():
    frame = decode_clip(REAL / "rotated_90.mov", VideoSpec(568, 320, 3))[0].float().mean(dim=-1)
    # A keyboard seen from the front, stored on its side: upright, its bright letters stand in rows, so the
    # brightness varies more from row to row than from column to column.
    assert frame.mean(dim=1).std() > frame.mean(dim=0).std()


@needs_real
def test_real_folder_lists_its_captioned_clips():
    clips, problems = find_clips(REAL)
    assert [clip.name for clip in clips] == sorted(clip.name for clip in clips) and len(clips) == 6
    assert all(clip.caption for clip in clips)
    assert {problem.video for problem in problems} == {"corrupted.mp4", "odd_height_and_width.mp4", "rotated_90.mov"}


def test_test_pictures_differ_in_every_orientation():
    """The orientation tests stand on this: no two of the eight turns and mirrorings look alike."""
    picture = Image.fromarray(quadrants()[0].numpy())
    shown = [
        tuple(corners(torch.from_numpy(np.array(p))))
        for p in [picture, *(picture.transpose(method) for method in Image.Transpose)]
    ]
    assert len(set(shown)) == len(shown) == 8


@pytest.mark.parametrize(
    ("transfer", "what", "filters"),
    [
        (16, r"HDR video \(PQ\)", "setparams=colorspace=bt2020nc:color_primaries=bt2020,zscale=.*tonemap"),
        (18, r"HDR video \(HLG\)", "setparams=.*tonemap"),
        (8, "video in linear light", "setparams=colorspace=smpte170m:color_primaries=bt709,zscale=p=bt709:t=bt709"),
        (9, "log video", "setparams=.*zscale"),
        (10, "log video", "setparams=.*zscale"),
        (17, "digital cinema video", "setparams=.*lutrgb"),
    ],
)
def test_other_light_than_sdr_is_refused_with_the_command_that_converts_it(tmp_path, transfer, what, filters):
    """Read as if it were SDR, its white comes out as grey."""
    for codec in ("libx264", "ffv1"):
        file = encode(tmp_path / "phone.mkv", quadrants(), codec=codec, pix_fmt="yuv420p10le", transfer=transfer)
        with pytest.raises(DataError, match=rf"phone\.mkv: is {what}.*; convert it first: ffmpeg -i IN -vf {filters}"):
            decode_clip(file, SPEC)


def test_a_command_that_converts_assumes_only_what_is_not_tagged(tmp_path):
    file = encode(tmp_path / "tagged.mkv", quadrants(), matrix="ITU709", transfer=8)
    with pytest.raises(DataError, match="setparams=color_primaries=bt709,zscale"):
        decode_clip(file, SPEC)


@pytest.mark.parametrize("transfer", [1, 4, 6, 7, 11, 12, 13, 14])
def test_gammas_of_sdr_are_read(tmp_path, transfer):
    plain = encode(tmp_path / "plain.mkv", quadrants(), codec="ffv1", pix_fmt="yuv420p10le", transfer=transfer)
    assert corners(decode_clip(plain, SPEC)[0]) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("tag", ["dva1", "dvav", "dvh1", "dvhe"])
def test_dolby_vision_alone_is_refused(tmp_path, tag):
    """Decoded as what it is built on, its colours are others; files that have a picture for all have another tag."""
    write_video(tmp_path / "a.mp4", quadrants(frames=2), 8)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"avc1", tag.encode()))
    with pytest.raises(DataError, match=r"a\.mp4: is Dolby Vision"):
        decode_clip(tmp_path / "a.mp4", SPEC)


def test_transparent_pixels_are_refused_and_opaque_ones_with_an_alpha_channel_are_not(tmp_path):
    """Behind what is transparent stands a colour that no player shows."""
    for alpha in (255, 120):
        coloured = [np.concatenate([p, np.full((48, 48, 1), 255, np.uint8)], axis=2) for p in quadrants().numpy()]
        for picture in coloured:
            picture[10:20, 10:20, 3] = alpha
        entries = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
        entries[:2] = [[alpha, 255, 0, 0], [255, 255, 0, 0]]
        index = np.ones((48, 48), np.uint8)
        index[10:20, 10:20] = 0
        for name, pix_fmt, pictures in (("rgba", "rgba", coloured), ("palette", "pal8", [(index, entries)] * 17)):
            with av.open(str(tmp_path / f"{name}{alpha}.mov"), "w") as container:
                stream = container.add_stream("png", rate=10)
                stream.height, stream.width, stream.pix_fmt = 48, 48, pix_fmt
                for picture in pictures:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pix_fmt)))
                container.mux(stream.encode())
    assert corners(decode_clip(tmp_path / "rgba255.mov", SPEC)[0]) == ["red", "green", "blue", "white"]
    assert corners(decode_clip(tmp_path / "palette255.mov", SPEC)[0]) == ["red"] * 4
    for name in ("rgba120", "palette120"):
        with pytest.raises(DataError, match=rf"{name}\.mov: has transparent pixels; .* ffmpeg -i IN"):
            decode_clip(tmp_path / f"{name}.mov", SPEC)


@pytest.mark.parametrize(
    "name",
    ["http:x.mp4", "a b.mp4", " lead.mp4", "trail .mp4", "%03d.mp4", "[1].mp4", "*.mp4", "back\\slash.mp4",
     "new\nline.mp4", "-i.mp4", "file:c.mp4", "concat:a|b.mp4", "quote'\".mp4", "ü.mp4", "日本.mp4"],
)  # fmt: skip
def test_whatever_a_file_system_allows_is_the_name_of_that_file(tmp_path, name, monkeypatch):
    write_video(tmp_path / name, quadrants(), 8)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        assert corners(decode_clip(path, SPEC)[0]) == ["red", "green", "blue", "white"]
    (tmp_path / "captions.jsonl").write_text(json.dumps({"video": name, "caption": "a thing"}))
    clips, problems = find_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [(name, "a thing")] and not problems
