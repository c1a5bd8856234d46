"""Masks that users bring, from any segmenter: read in the geometry of their video, and put on the latent grid.

| file | inside the mask is |
| --- | --- |
| .mp4 .mov .webm .mkv | what is at least half as bright as white |
| .png, a folder of them, frame10 after frame9 | as in .npy, or the upper half of 16 bits; of palettes all but black |
| .npy [F, H, W] or [H, W] | True; 1 of 0 and 1; 128 and above of 0 to 255; 0.5 and above of floats from 0 to 1 |
| .json {"boxes": [[[x0, y0, x1, y1], …], …]}, a list for each frame | pixels with their centre in any of the boxes |
| .json {"static": [[x0, y0, x1, y1], …]} | the same, one list for all frames |

Boxes are in pixels of the upright video: x to the right and y down from its top left corner.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.errors import DataError
from alignkit.json_text import read_json
from alignkit.media.names import located
from alignkit.media.videos import VideoFacts, VideoSpec, cover_and_crop, decode_with_facts, upright_frames
from alignkit.moment import end_if_unreadable

VIDEO_MASKS = (".mp4", ".mov", ".webm", ".mkv")
MASK_SUFFIXES = (*VIDEO_MASKS, ".png", ".npy", ".json")
OTHER_PICTURES = (".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def find_mask(folder: str | Path, clip_name: str, video: Path | None = None) -> Path | None:
    """The mask of a clip in a folder of masks, None if it has none there.

    The mask of "sub/a.mp4" is folder/sub/a with one of `MASK_SUFFIXES`, in small or capital letters, or a folder of
    that name that holds .png files; never `video`, the clip itself, so that masks may lie beside their videos. Raises
    DataError if there is more than one of them.
    """
    folder = Path(folder)
    stem = located(folder / Path(clip_name).with_suffix(""))
    spelt = [stem.name + suffix for lower in MASK_SUFFIXES for suffix in (lower, lower.upper())]
    files = [located(stem.with_name(name)) for name in spelt]
    found = [file for file in files if file.is_file() and not (video and file.samefile(video))]
    if any(stem.glob("*.[pP][nN][gG]")):
        found.append(stem)
    if len(found) > 1:
        names = ", ".join(file.relative_to(folder).as_posix() for file in found)
        raise DataError(f"mask folder {folder}: {clip_name} has more than one mask: {names}; keep one")
    return found[0] if found else None


def mask_digest(path: Path | None) -> str | None:
    """What tells a mask's file, or folder of .png files, from another; None without a mask."""
    if path is None:
        return None
    digest = hashlib.sha256()
    for file in _pngs(path) if path.is_dir() else [path]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def read_mask(path: str | Path, video: str | Path | VideoFacts, spec: VideoSpec) -> Tensor:
    """Bool [num_frames, height, width], True inside: pixel for pixel over what `decode_clip` makes of the video.

    video: the video that the mask belongs to, or its facts where `decode_with_facts` has been at it for the same
    `spec`. The mask holds as many frames as that file (those that are used of the video are used of the mask),
    or exactly spec.num_frames (those used), or one (for all). Its size is that of the upright video (it is
    resized and cropped as the video is, then cut at half coverage) or exactly the spec's.

    Raises DataError, in one line that starts with the mask's path, if it is missing, unreadable, of another
    number of frames or size, the video itself, or empty in the frames that are used; and what `decode_clip`
    raises for the video.
    """
    path = Path(path)
    facts = video if isinstance(video, VideoFacts) else decode_with_facts(video, spec)[1]
    if not os.path.exists(path):  # False, where Path.exists raises, for names that no file can have
        raise DataError(f"{path}: no such mask")
    if path.samefile(facts.path):
        raise DataError(f"{path}: is the video itself, not a mask of it")
    wanted = {*facts.chosen, *range(spec.num_frames)}
    frames: dict[int, np.ndarray] = {}
    count = 0
    for frame in _frames(path, facts):
        if count in wanted:
            frames[count] = _placed(frame, path, facts, spec)
        count += 1
    mask = np.stack([frames[number] for number in _order(count, path, facts, spec)])
    if not mask.any():
        raise DataError(f"{path}: is empty: nothing of what is used of {facts.path.name} lies inside the mask")
    return torch.from_numpy(mask)


def _order(count: int, path: Path, facts: VideoFacts, spec: VideoSpec) -> tuple[int, ...]:
    """Which of the mask's frames lies over each frame used of the video."""
    if count == facts.frames or (count > facts.frames and not facts.whole):
        return facts.chosen
    if count == spec.num_frames:
        return tuple(range(count))
    if count == 1:
        return (0,) * spec.num_frames
    raise DataError(
        f"{path}: has {count} frames, but {facts.path.name} has {facts.frames}: give a mask for each of them, "
        f"or for each of the {spec.num_frames} that are used, or a single one"
    )


def _placed(frame: np.ndarray, path: Path, facts: VideoFacts, spec: VideoSpec) -> np.ndarray:
    if frame.shape == (facts.height, facts.width):
        grey = frame.astype(np.uint8) * 255
        return cover_and_crop(grey, spec.height, spec.width, facts.stretch) >= 128
    if frame.shape == (spec.height, spec.width):
        return frame
    raise DataError(
        f"{path}: is {frame.shape[0]}x{frame.shape[1]} (height x width), but {facts.path.name} is "
        f"{facts.height}x{facts.width}: give it that size, or the {spec.height}x{spec.width} of data.height and width"
    )


def mask_on_grid(mask: Tensor, latent_grid: tuple[int, int, int]) -> Tensor:
    """Uint8 [F, H, W] on the latent grid, 1 where the video is to be regenerated.

    mask: bool [num_frames, height, width], as from `read_mask`; latent_grid: (F, H, W).

    Latent frame 0 stands for frame 0, latent frame j for the next (num_frames − 1)/(F − 1) frames each. A cell is
    regenerated if the mask covers at least half of its pixels in at least one of its frames; other cells stay.

    Raises DataError if the grid does not divide the mask's shape, or no cell at all would be regenerated.
    """
    frames, rows, columns = latent_grid
    count, height, width = mask.shape
    each = max(1, (count - 1) // max(1, frames - 1))
    if count != 1 + (frames - 1) * each or height % rows or width % columns:
        raise DataError(f"a mask of {list(mask.shape)} does not fit a latent grid of {list(latent_grid)}")
    cells = mask.reshape(count, rows, height // rows, columns, width // columns).sum(dim=(2, 4))
    half = 2 * cells >= (height // rows) * (width // columns)
    later = half[1:].reshape(frames - 1, each, rows, columns).any(dim=1)
    on_grid = torch.cat((half[:1], later)).to(torch.uint8)
    if not on_grid.any():
        raise DataError(
            f"the mask is too small: it covers half of no cell of the latent grid ({height // rows}x"
            f"{width // columns} pixels each); make it larger"
        )
    return on_grid


# --- formats: each yields bool [H, W], True inside ----------------------------------------------------------


def _frames(path: Path, facts: VideoFacts) -> Iterator[np.ndarray]:
    suffix = path.suffix.lower()
    if path.is_dir():
        files = _pngs(path)
        if not files:
            raise DataError(f"{path}: holds no .png file")
        _refuse_other_kinds(path, files)
        return _png_frames(files)
    if suffix in VIDEO_MASKS:
        return (_bright(picture) for picture in upright_frames(path))
    if suffix == ".png":
        return _png_frames([path])
    if suffix == ".npy":
        return _npy(path)
    if suffix == ".json":
        return _boxes(path, facts.height, facts.width)
    raise DataError(f"{path}: a mask is a folder of .png files or one of {', '.join(MASK_SUFFIXES)}")


def _pngs(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith(".")]
    return sorted(files, key=_natural)


def _refuse_other_kinds(folder: Path, pngs: list[Path]) -> None:
    """A frame7.jpg among frame1.png to frame6.png: frames that would be missed. One beside frame1.png is none."""
    stems = {file.stem for file in pngs}
    series = {re.sub("[0-9]+", "", stem) for stem in stems}
    for file in sorted(folder.iterdir()):
        alike = file.stem not in stems and re.sub("[0-9]+", "", file.stem) in series
        if alike and file.suffix.lower() in OTHER_PICTURES:
            raise DataError(f"{folder}: {file.name} lies among .png files; save all frames as .png, or remove it")


def _natural(file: Path) -> list[int | str]:
    """ "frame10" after "frame9"."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]+)", file.name))]


def _bright(rgb: np.ndarray) -> np.ndarray:
    return rgb.sum(axis=-1, dtype=np.uint16) >= 3 * 128


def _png_frames(files: list[Path]) -> Iterator[np.ndarray]:
    """Whether 1 or 255 means inside is read off the whole sequence: some of its frames may be empty."""
    brightest = max((_png(file) for file in files), key=np.max)
    in_16_bits = brightest.itemsize > 1 and brightest.max() >= 1 << 15
    half = 1 << 15 if in_16_bits else _half(brightest, files[0])
    return (_png(file) >= half for file in files)


def _png(file: Path) -> np.ndarray:
    """[H, W]: grey values to 255 or, in 16 bits, to 65535; 255 for what is not black in a palette image."""
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{file}: is an animation; save each of its frames as a .png of its own, in a folder")
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise DataError(f"{file}: is transparent in places; save the mask as black and white, without alpha")
            if image.mode == "P":
                return np.where(np.asarray(image.convert("RGB")).any(axis=-1), np.uint8(255), np.uint8(0))
            values = np.asarray(image if image.mode in ("1", "L", "I;16", "I") else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        end_if_unreadable(file, error)
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: cannot be read as a picture ({error})") from error
    if values.ndim == 2:
        return values * np.uint8(255) if values.dtype == bool else values
    if (values != values[..., :1]).any():
        raise DataError(f"{file}: is in colour; save the mask as black and white, or with a palette (black is outside)")
    return values[..., 0]


def _npy(path: Path) -> Iterator[np.ndarray]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        end_if_unreadable(path, error)
        raise DataError(f"{path}: cannot be read as a NumPy array ({error})") from error
    if not isinstance(values, np.ndarray) or values.ndim not in (2, 3) or 0 in values.shape:
        raise DataError(f"{path}: expected an array [F, H, W] or [H, W], got {getattr(values, 'shape', 'an archive')}")
    if values.dtype.kind not in "buif":
        raise DataError(f"{path}: holds {values.dtype}; a mask is bool, integers or floats")
    half = _half(values, path)
    for frame in values if values.ndim == 3 else values[None]:
        yield np.asarray(frame >= half)


def _half(values: np.ndarray, path: Path) -> float:
    """From which value on a pixel lies inside."""
    kind, low, high = values.dtype.kind, values.min(), values.max()
    if kind in "bui" and low >= 0 and high <= 1:
        return 1
    if kind in "ui" and low >= 0 and 128 <= high <= 255:
        return 128
    if kind in "ui" and low >= 0 and high < 128:
        raise DataError(f"{path}: holds values up to {high}, as labels would; a mask holds 0 and 1, or 0 to 255")
    if kind == "f" and low >= 0 and high <= 1:
        return 0.5
    raise DataError(
        f"{path}: holds {values.dtype} from {low} to {high}; a mask is bool, integers 0 and 1 or 0 to 255, "
        "or floats from 0 to 1"
    )


def _boxes(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
    try:
        content = read_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        end_if_unreadable(path, error)
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    keys = set(content) if isinstance(content, dict) else set()
    if keys not in ({"boxes"}, {"static"}):
        raise DataError(
            f'{path}: expected {{"boxes": [[[x0, y0, x1, y1], …], …]}} or {{"static": [[x0, y0, x1, y1], …]}}'
        )
    frames = content["boxes"] if "boxes" in content else [content["static"]]
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{path}: boxes is not a list with a list of boxes for each frame")
    for number, boxes in enumerate(frames):
        frame = np.zeros((height, width), dtype=bool)
        for box in boxes if isinstance(boxes, list) else [boxes]:
            if not _is_box(box):
                raise DataError(
                    f"{path}: frame {number}: expected [x0, y0, x1, y1] with x0 < x1, y0 < y1, got {box!r:.60}"
                )
            if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
                raise DataError(f"{path}: frame {number}: {box} lies outside the video's {width} x {height} pixels")
            x0, y0, x1, y1 = (max(0, math.ceil(edge - 0.5)) for edge in box)  # pixel i has its centre at i + 0.5
            frame[y0:y1, x0:x1] = True
        yield frame


def _is_box(box: object) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(type(edge) in (int, float) and abs(edge) < 1e9 for edge in box):  # NaN is not
        return False
    return box[0] < box[2] and box[1] < box[3]
