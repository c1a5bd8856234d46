"""Decodes videos to one shape, and writes new ones."""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from alignkit.errors import DataError
from alignkit.files import put_in_place
from alignkit.moment import end_if_unreadable

# A file is decoded beyond the frames that are used, because a damaged one often shows its damage late; a
# minute at 30 frames a second bounds what that costs on very long videos.
CHECKED_FRAMES = 1800

# Between YUV and RGB: chroma interpolated to full size, rounded exactly, the same bits on every processor.
CONVERSION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT

# Transfer characteristics of ITU-T H.273 that are no gamma of SDR: what they are, and filters of ffmpeg to BT.709.
TONEMAP = "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv"
RECODE = "zscale=p=bt709:t=bt709:m=bt709:r=tv"
CINEMA = "'clip(maxval*1.037*pow(val/maxval\\,13/12)\\,0\\,maxval)'"  # gamma 2.6 to 2.4, white 48 of 52.37
NOT_SDR = {
    8: ("video in linear light", RECODE),
    9: ("log video (100:1)", RECODE),
    10: ("log video (316:1)", RECODE),
    16: ("HDR video (PQ)", TONEMAP),
    17: (
        "digital cinema video (SMPTE ST 428)",  # which zscale does not know
        f"format=gbrp12le,lutrgb=r={CINEMA}:g={CINEMA}:b={CINEMA},setparams=color_trc=bt709,{RECODE}",
    ),
    18: ("HDR video (HLG)", TONEMAP),
}
UNTAGGED = 2  # in all tables of H.273
DOLBY_VISION = ("dvh1", "dvhe", "dvav", "dva1", "dav1")  # tags of what only its own decoders are to show
PLAYBACK_FPS = 8.0  # of videos that are sampled, where the data names no rate
TRANSPARENT = "has transparent pixels; put it on black first: ffmpeg -i IN -vf premultiply=inplace=1,format=yuv420p OUT"


@dataclass(frozen=True)
class VideoSpec:
    """The one shape every clip is brought to: pixels, frames, and frames a second.

    `fps=None` takes the file's own frames, the first `num_frames` of them; a number resamples in time to that
    rate, each frame the one with the nearest timestamp.
    """

    height: int
    width: int
    num_frames: int
    fps: float | None = None


@dataclass(frozen=True)
class VideoFacts:
    """What one pass over a video file has seen, and which of its frames a `VideoSpec` takes.

    frames: how many the file holds; where `whole` is False it holds more, and no more were looked at.
    height, width: pixels, upright; stretch: the shown width of a pixel over its height.
    rate: frames a second by their timestamps. chosen: the number of the file's frame behind each frame used.
    """

    path: Path
    frames: int
    whole: bool
    height: int
    width: int
    stretch: float
    rate: float
    chosen: tuple[int, ...]


class TooShortError(DataError):
    """A video that holds fewer frames than are needed."""


class OtherKindError(DataError):
    """A video of a kind that is not read, whatever is in it."""


# --- decoding -----------------------------------------------------------------------------------------------


def decode_clip(path: str | Path, spec: VideoSpec) -> Tensor:
    """Decode one video to uint8 RGB [F, H, W, 3] as a player shows it, resized to cover and centre-cropped.

    Honours rotation and mirroring (display matrix), the shape of pixels, the tagged colour matrix and range
    (untagged: BT.601 limited, as ffmpeg does), and timestamps. The resize is bicubic with antialiasing.

    Raises DataError, in one line that starts with the path, if the file has no video, cannot be decoded to
    its end (at most `CHECKED_FRAMES` beyond the frames used), or is too short (`TooShortError`).
    """
    return decode_with_facts(path, spec)[0]


def decode_with_facts(path: str | Path, spec: VideoSpec) -> tuple[Tensor, VideoFacts]:
    """What `decode_clip` returns, and what the same pass over the file has seen; raises the same errors."""
    path = Path(path)
    if min(spec.height, spec.width, spec.num_frames) < 1 or (spec.fps is not None and not spec.fps > 0):
        raise DataError(f"impossible video shape {spec}: height, width, frames and fps must be above 0")
    with _opened(path) as stream:
        return _pick(_timed_frames(stream, path), stream, spec, path)


def picture_digest(frames: Tensor) -> str:
    """SHA-256 of decoded pictures: equal for videos that show the very same, whatever file they are in."""
    return hashlib.sha256(frames.numpy().tobytes()).hexdigest()


def read_video(path: str | Path) -> Tensor:
    """Every frame of a video at its own size, uint8 RGB [F, H, W, 3]: what `write_video` wrote, for example.

    Upright and in the tagged colours as `decode_clip`, and refused with the same errors.
    """
    return torch.from_numpy(np.stack(list(upright_frames(Path(path)))))


def upright_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of `read_video` one by one, uint8 RGB [H, W, 3]; raises the same errors, some at the last."""
    frame = None
    with _opened(path) as stream:
        reformatter = VideoReformatter()
        for _, _, frame in _timed_frames(stream, path):
            yield _upright(frame, reformatter)[0]
    if frame is None:
        raise DataError(f"{path}: holds no frame that can be decoded")


@contextmanager
def _opened(path: Path) -> Iterator[VideoStream]:
    """The file's main video stream. What goes wrong in here becomes a DataError that names the file, or a MomentError
    where the machine cannot read it just now."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, not a video")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with av.open(os.path.abspath(path)) as container:  # else "http:x.mp4" is an address
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(f"{path}: holds no video stream")
            if stream.codec_context is None:
                raise DataError(f"{path}: no decoder for the codec of its video")
            if stream.codec_context.codec_tag in DOLBY_VISION:
                raise OtherKindError(
                    f"{path}: is Dolby Vision that no other decoder shows in its colours; export it as SDR"
                )
            _refuse_other_light(stream.codec_context, path)
            if stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
                raise OtherKindError(f"{path}: {TRANSPARENT}")
            yield stream
    except OtherKindError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError, OverflowError) as error:
        end_if_unreadable(path, error)
        if isinstance(error, DataError):
            raise
        reason = _reason(error) if isinstance(error, av.FFmpegError) else error
        raise DataError(f"{path}: cannot be read as a video ({reason})") from error


def _refuse_other_light(tagged: VideoCodecContext | VideoFrame, path: Path) -> None:
    """Read as if it were SDR, its white comes out as grey."""
    if tagged.color_trc in NOT_SDR:
        what, filters = NOT_SDR[tagged.color_trc]
        matrix, primaries = ("bt2020nc", "bt2020") if filters == TONEMAP else ("smpte170m", "bt709")
        assumed = [f"colorspace={matrix}"] * (tagged.colorspace == UNTAGGED)
        assumed += [f"color_primaries={primaries}"] * (tagged.color_primaries == UNTAGGED)
        if assumed:  # zscale finds no path from what is not tagged
            filters = f"setparams={':'.join(assumed)},{filters}"
        raise OtherKindError(f"{path}: is {what}; convert it first: ffmpeg -i IN -vf {filters},format=yuv420p OUT")


def _refuse_transparency(frame: VideoFrame, path: Path) -> None:
    """Behind what is transparent stands a colour that no player shows."""
    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        alpha = frame.to_ndarray(format="rgba")[..., 3]
        if alpha.min() < 255:
            raise OtherKindError(f"{path}: {TRANSPARENT}")


def _reason(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__


TimedFrame = tuple[Fraction, Fraction, VideoFrame]  # start and duration in seconds


def _timed_frames(stream: VideoStream, path: Path) -> Iterator[TimedFrame]:
    """The frames in the order shown. Raises DataError at any damage."""
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    count = 0
    try:
        for packet in stream.container.demux(stream):
            if packet.is_corrupt:
                raise DataError(f"{path}: damaged after frame {count} (the file is cut off or broken there)")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DataError(f"{path}: damaged at frame {count + 1}")
                _refuse_other_light(frame, path)
                _refuse_transparency(frame, path)
                start = frame.pts * frame.time_base if frame.pts is not None else count * step
                yield start, (frame.duration * frame.time_base if frame.duration else step), frame
                count += 1
    except av.FFmpegError as error:
        raise DataError(f"{path}: damaged, decoding fails after {count} frames ({_reason(error)})") from error


def _pick(frames: Iterator[TimedFrame], stream: VideoStream, spec: VideoSpec, path: Path) -> tuple[Tensor, VideoFacts]:
    """The pictures that `spec` asks for, out of all frames of the file."""
    picture = _Pictures(spec, stream.sample_aspect_ratio)
    pictures: list[np.ndarray] = []
    chosen: list[int] = []
    count, beyond = 0, 0
    before: TimedFrame | None = None
    first = start = end = Fraction(0)
    rate = Fraction(spec.fps).limit_denominator(100_000) if spec.fps is not None else None

    def choose(number: int, frame: VideoFrame) -> None:
        chosen.append(number)
        pictures.append(picture(frame))

    for start, duration, frame in frames:
        if count == 0:
            first = start
        count += 1
        if len(chosen) == spec.num_frames:
            beyond += 1
            if beyond >= CHECKED_FRAMES:
                break
            continue
        if rate is None:
            choose(count - 1, frame)
            continue
        while len(chosen) < spec.num_frames and (wanted := first + len(chosen) / rate) <= start:
            if before is not None and wanted - before[0] <= start - wanted:
                choose(count - 2, before[2])
            else:
                choose(count - 1, frame)
        before, end = (start, duration, frame), start + duration
    while rate and before and len(chosen) < spec.num_frames and first + len(chosen) / rate < end:
        choose(count - 1, before[2])  # the last frame is shown until its duration ends
    if count == 0:
        raise DataError(f"{path}: holds no frame that can be decoded")
    if len(chosen) < spec.num_frames:
        has = f"{count} frame{'s' * (count != 1)}"
        if rate is not None:
            has += f" over {float(end - first):.2f} s, {len(chosen)} at {spec.fps:g} frames a second"
        raise TooShortError(f"{path}: too short: it has {has}, and {spec.num_frames} are needed")
    measured = (count - 1) / (start - first) if start > first else stream.average_rate or 0
    whole = beyond < CHECKED_FRAMES
    facts = VideoFacts(path, count, whole, *picture.size, picture.stretch, float(measured), tuple(chosen))
    return torch.from_numpy(np.stack(pictures)), facts


class _Pictures:
    """Turns decoded frames into upright uint8 RGB pictures [height, width, 3]; remembers the last one.

    `size` and `stretch` are those of the upright frames, before they are brought to the spec's shape.
    """

    size: tuple[int, int]
    stretch: float

    def __init__(self, spec: VideoSpec, pixel_shape: Fraction | None):
        self.spec = spec
        self.pixel_shape = Fraction(pixel_shape) if pixel_shape else Fraction(1)
        self.reformatter = VideoReformatter()
        self.last: tuple[VideoFrame, np.ndarray] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self.last is not None and self.last[0] is frame:
            return self.last[1]
        rgb, transposed = _upright(frame, self.reformatter)
        self.size = rgb.shape[:2]
        self.stretch = float(1 / self.pixel_shape if transposed else self.pixel_shape)
        picture = cover_and_crop(rgb, self.spec.height, self.spec.width, self.stretch)
        self.last = frame, picture
        return picture


def _upright(frame: VideoFrame, reformatter: VideoReformatter) -> tuple[np.ndarray, bool]:
    """uint8 RGB [height, width, 3] as shown, and whether rows and columns were exchanged for it."""
    rgb = reformatter.reformat(frame, format="rgb24", interpolation=CONVERSION).to_ndarray()
    transposed, mirrored, flipped = _orientation(frame)
    if transposed:
        rgb = rgb.transpose(1, 0, 2)
    return rgb[:: -1 if flipped else 1, :: -1 if mirrored else 1], transposed


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How the stored picture is to be shown: (transpose first, then mirror left-right, then flip top-bottom).

    The display matrix [[a, b, u], [c, d, v], [x, y, w]] takes stored (p, q) to shown (a·p + c·q, b·p + d·q).
    An angle between the quarter turns is taken as the nearest of them.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def cover_and_crop(picture: np.ndarray, height: int, width: int, stretch: float) -> np.ndarray:
    """Resize a uint8 picture [rows, columns, ...] to cover height x width and cut off evenly what sticks out.

    `stretch` is the width of one of its pixels over the pixel's height.
    """
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / (columns * stretch))  # shown pixels for each stored row
    box_w, box_h = min(width / (scale * stretch), columns), min(height / scale, rows)
    left, top = (columns - box_w) / 2, (rows - box_h) / 2
    image = Image.fromarray(np.ascontiguousarray(picture))
    box = (left, top, left + box_w, top + box_h)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


# --- writing ------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write uint8 RGB frames [F, H, W, 3] as h264 yuv420p (BT.709, limited range) mp4, at `fps` a second.

    An odd height or width is padded to even by repeating the last row or column (yuv420p has no odd sizes).
    The file appears whole or not at all; its folder is made if missing. Raises DataError for other shapes.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        given = f"{frames.dtype} {list(frames.shape)}"
        raise DataError(f"{path}: expected uint8 frames [F, H, W, 3], got {given}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.ascontiguousarray(frames.cpu().numpy())
    _, height, width, _ = pictures.shape
    pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".mp4")
    os.close(handle)
    try:
        _encode(temporary, pictures, fps)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner can read
        put_in_place(Path(temporary), path)
    except BaseException:
        os.unlink(temporary)
        raise


def _encode(path: str, pictures: np.ndarray, fps: float) -> None:
    with av.open(path, "w", format="mp4") as container:
        # crf 10 is visually lossless; x264's threads, and at small sizes its macroblock tree, change bits between runs
        rate = Fraction(fps).limit_denominator(100_000)
        settings = {"crf": "10", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=settings)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in all three tables
        context.color_range = 1  # limited
        reformatter = VideoReformatter()
        for index, picture in enumerate(pictures):
            frame = reformatter.reformat(
                VideoFrame.from_ndarray(picture, format="rgb24"),
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=CONVERSION,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
