"""Videos for the report: panels side by side and frames one under the other in one WebP, a film that the page's style
sheet moves: all of them in step, and still where the reader wants it."""

import base64
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from alignkit.errors import DataError
from alignkit.files import write_atomically
from alignkit.media.videos import read_video

ROWS, LABEL_HEIGHT = ("winner", "region", "loser"), 14  # of a preview
GAP = 2  # transparent pixels between panels
MASK_COLOUR = (255, 0, 170)
PANEL_WIDTH = 144  # pixels on the page that a small panel is magnified to, about
LARGEST_PANEL = 240  # pixels; larger videos are shrunk to it
MOST_FRAMES = 48  # of a longer video every second, third, … is shown
TALLEST_FILM = 16_383  # pixels, of a WebP
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)
LOSSLESS_PIXELS, LOSSLESS_BYTES = 50_000, 250_000  # of a frame, of a film: above either, it loses some of it


@dataclass(frozen=True)
class Picture:
    """A film, which frame of it people see who want no motion, the seconds of a frame, and its size on the page."""

    film: bytes
    frames: int
    still: int
    seconds: float
    width: int
    height: int
    magnified: bool

    @property
    def size(self) -> int:
        """Bytes that it takes in the page, in base64."""
        return len(self.film) * 4 // 3 + 200


@dataclass(frozen=True)
class StoredPair:
    winner: np.ndarray
    loser: np.ndarray
    mask: np.ndarray
    prompt: str
    strength: float | None


def read_pair(file: Path) -> StoredPair:
    """Read report_pairs/NNN.npz: videos uint8 [F, H, W, 3], mask [f, h, w]. DataError if it is unusable."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            winner, loser, mask = (np.asarray(stored[name]) for name in ("winner", "loser", "mask"))
            prompt = str(stored["prompt"]) if "prompt" in stored else ""
            strength = float(stored["strength"]) if "strength" in stored else None
    except UNREADABLE as error:
        raise DataError(f"{file.name} cannot be read ({error})") from error
    if winner.ndim != 4 or winner.shape != loser.shape or winner.dtype != np.uint8 or winner.shape[-1] != 3:
        shapes = f"winner {winner.dtype} {winner.shape} and loser {loser.dtype} {loser.shape}"
        raise DataError(f"{file.name}: {shapes} are no uint8 videos of one shape")
    if mask.ndim != 3 or 0 in mask.shape:
        raise DataError(f"{file.name}: the mask has the shape {mask.shape}, expected [F, H, W]")
    return StoredPair(winner, loser, mask, prompt, strength)


def write_pair(file: Path, pair: StoredPair) -> None:
    """What `read_pair` reads."""
    strength: dict[str, Any] = {} if pair.strength is None else {"strength": pair.strength}
    np.savez_compressed(file, winner=pair.winner, loser=pair.loser, mask=pair.mask, prompt=pair.prompt, **strength)


def write_preview(file: Path, pair: StoredPair, columns: int = 6) -> None:
    """A PNG for people to check a pair by: some frames of the winner, of the winner with the mask, of the loser, each
    row under its name."""
    winner, loser = _shrunk(pair.winner), _shrunk(pair.loser)
    chosen = np.linspace(0, len(winner) - 1, min(columns, len(winner))).round().astype(int)
    rows = [video[chosen] for video in (winner, with_mask(winner, pair.mask), loser)]
    framed = [np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0))) for frame in row], axis=1) for row in rows]
    strips = [np.concatenate([_label(name, row.shape[1]), row]) for name, row in zip(ROWS, framed, strict=True)]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(strips)).save(content, "PNG")
    write_atomically(file, content.getvalue())


def _label(words: str, width: int) -> np.ndarray:
    """White on black, uint8 [LABEL_HEIGHT, width, 3]."""
    strip = Image.new("RGB", (width, LABEL_HEIGHT))
    ImageDraw.Draw(strip).text((3, 1), words, fill="white")
    return np.asarray(strip)


def pair_picture(pair: StoredPair, fps: float) -> Picture:
    """Winner, winner with the mask over it, loser."""
    winner, loser = _shrunk(pair.winner), _shrunk(pair.loser)  # before the mask is drawn: its outline stays sharp
    return compose([winner, with_mask(winner, pair.mask), loser], fps, still=most_different(winner, loser))


def sample_picture(base: Path, aligned: Path, fps: float, cells: list[np.ndarray]) -> Picture:
    """Both samples of one noise, from files; where `cells` [f, h, w] of each are given the same with what the detector
    marks; and their difference. Raises DataError if one cannot be read."""
    videos = [read_video(file).numpy() for file in (base, aligned)]
    if videos[0].shape != videos[1].shape:
        raise DataError(f"{base.name} and {aligned.name} are not of one shape")
    videos = [_shrunk(video) for video in videos]
    marked = [with_heat(video, heat) for video, heat in zip(videos, cells, strict=False)]
    return compose([*videos, *marked, difference(*videos)], fps, still=most_different(*videos))


def read_maps(file: Path, count: int) -> dict[str, np.ndarray]:
    """Of "base" and "aligned", uint8 [count, f, h, w]; empty where the file is missing or of other samples."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            maps = {name: np.asarray(stored[name]) for name in ("base", "aligned")}
    except UNREADABLE:
        return {}
    fit = all(cells.ndim == 4 and len(cells) == count and cells.dtype == np.uint8 for cells in maps.values())
    return maps if fit else {}


def region_picture(file: Path, fps: float) -> tuple[Picture, str]:
    """The original with its region, the region regenerated by the base and by the aligned model; and the prompt.

    Raises DataError if the file, regions/NNN.npz, cannot be used.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            original, base, aligned, mask = (stored[name] for name in ("original", "base", "aligned", "mask"))
            prompt = str(stored["prompt"])
    except UNREADABLE as error:
        raise DataError(f"{file.name} cannot be read ({error})") from error
    if original.ndim != 4 or not original.shape == base.shape == aligned.shape:
        raise DataError(f"{file.name}: its videos are not of one shape")
    videos = [_shrunk(video) for video in (original, base, aligned)]
    shown = [videos[0], with_mask(videos[0], mask), *videos[1:]]
    return compose(shown, fps, still=most_different(*videos[1:])), prompt


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What differs between two videos uint8 [F, H, W, 3], twice as strong, on black."""
    return np.minimum(2 * np.abs(first.astype(int) - second), 255).astype(np.uint8)


def most_different(first: np.ndarray, second: np.ndarray) -> int:
    """The frame in which two videos uint8 [F, H, W, 3] differ most."""
    return int(difference(first, second).mean(axis=(1, 2, 3)).argmax())


def with_heat(video: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The video uint8 [F, H, W, 3], greyed, with probabilities [f, h, w] in 1/255 laid over it in MASK_COLOUR.

    Cell t is of the frames around t·(F − 1)/(f − 1).
    """
    frames, height, width = video.shape[:3]
    times = np.rint(np.arange(frames) * (cells.shape[0] - 1) / max(frames - 1, 1)).astype(int)
    rows, columns = np.arange(height) * cells.shape[1] // height, np.arange(width) * cells.shape[2] // width
    heat = cells[times][:, rows][:, :, columns, None] / 255
    grey = 0.6 * video.mean(axis=-1, keepdims=True) + 0.25 * video
    return np.rint(grey * (1 - 0.8 * heat) + 0.8 * heat * np.array(MASK_COLOUR)).astype(np.uint8)


def with_mask(video: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The video uint8 [F, H, W, 3] with the mask [f, h, w] (any grid, nearest) tinted and outlined on it."""
    frames, height, width = video.shape[:3]
    rows = np.arange(height) * mask.shape[1] // height
    columns = np.arange(width) * mask.shape[2] // width
    inside = mask[_mask_frames(frames, mask.shape[0])][:, rows][:, :, columns] > 0
    padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))  # the picture's border closes the outline too
    core = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    weight = np.where(inside & ~core, 0.95, np.where(inside, 0.3, 0.0))[..., None]
    return np.rint(video * (1 - weight) + np.array(MASK_COLOUR) * weight).astype(np.uint8)


def _mask_frames(frames: int, mask_frames: int) -> np.ndarray:
    """For each video frame, the frame of the mask that covers it.

    A latent mask has its first frame for the first picture alone and one for every few after that, since
    video VAEs are causal in time; where the counts do not fit that, they are spread evenly.
    """
    index = np.arange(frames)
    if 1 < mask_frames < frames and (frames - 1) % (mask_frames - 1) == 0:
        step = (frames - 1) // (mask_frames - 1)
        return (index + step - 1) // step
    return index * mask_frames // frames


def compose(videos: list[np.ndarray], fps: float, still: int = 0) -> Picture:
    """Videos uint8 [F, H, W, 3] of one shape, side by side with a transparent gap, moving together for ever.

    still: the frame for people who want no motion."""
    count = len(videos[0])
    tallest = _shrunk(videos[0][:1]).shape[1] * count
    every = max(-(-count // MOST_FRAMES), -(-tallest // TALLEST_FILM))
    videos = [_shrunk(video[::every]) for video in videos]
    frames, height, width = videos[0].shape[:3]
    canvas = np.zeros((frames, height, width * len(videos) + GAP * (len(videos) - 1), 4), np.uint8)
    for i, video in enumerate(videos):
        left = i * (width + GAP)
        canvas[:, :, left : left + width, :3] = video
        canvas[:, :, left : left + width, 3] = 255
    scale = max(1, min(4, round(PANEL_WIDTH / width)))
    return Picture(
        film=_compressed(Image.fromarray(canvas.reshape(-1, *canvas.shape[2:])), frames),
        frames=frames,
        still=still // every,
        seconds=every / fps,
        width=canvas.shape[2] * scale,
        height=height * scale,
        magnified=scale > 1,
    )


def data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")


def _shrunk(video: np.ndarray) -> np.ndarray:
    height, width = video.shape[1:3]
    if width <= LARGEST_PANEL:
        return video
    size = (LARGEST_PANEL, max(1, round(height * LARGEST_PANEL / width)))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in video])


def _compressed(film: Image.Image, frames: int) -> bytes:
    """As it is, where that is small enough."""
    if film.width * film.height <= LOSSLESS_PIXELS * frames:
        content = _webp(film, lossless=True, quality=60, method=4)
        if len(content) <= LOSSLESS_BYTES:
            return content
    return _webp(film, quality=72, method=4)


def _webp(image: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", **options)
    return content.getvalue()
