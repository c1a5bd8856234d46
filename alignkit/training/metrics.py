"""Metrics of a run: JSON Lines that a resumed run continues without a gap or a repeat, TensorBoard, and Weights &
Biases where it is asked for."""

import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from alignkit.files import write_atomically
from alignkit.media.videos import write_video

VALIDATION = "validation.jsonl"
PREVIEW_SIDE = 256  # pixels, of a video in TensorBoard, which keeps every one of them whole


class MetricsLog:
    """Appends one JSON object a step. What two runs with one seed must agree on goes to `metrics.jsonl`, and to
    `validation.jsonl` what looks at held-out pairs find; seconds and memory, which they cannot, go to `timings.jsonl`.
    """

    def __init__(self, folder: Path, resumed_step: int):
        """Open for writing after `resumed_step`: lines of later steps, left by a run that was killed, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._streams = {}
        for name in ("metrics", "timings", "validation"):
            file = folder / f"{name}.jsonl"
            if file.exists():
                write_atomically(file, _lines_until(file, resumed_step or -1))  # a look before step 1 is of step 0
            if name != "validation":
                self._streams[name] = file.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=resumed_step + 1)
        self._wandb = _weights_and_biases(folder)

    def write(self, step: int, metrics: dict[str, Any], timings: dict[str, float]) -> None:
        for name, values in (("metrics", metrics), ("timings", timings)):
            self._append(name, step, values)
        if self._wandb:
            self._wandb.log(_flat(metrics | timings), step=step)

    def write_validation(self, step: int, numbers: dict[str, Any], videos: list[Tensor], fps: float) -> None:
        """What a look after `step` found. videos: uint8 [F, H, W, 3] each, kept as validation/step-N-I.mp4 too."""
        if "validation" not in self._streams:
            self._streams["validation"] = (self._folder / VALIDATION).open("a")
        files = [self._folder / "validation" / f"step-{step:08d}-{i}.mp4" for i in range(len(videos))]
        for i, (file, video) in enumerate(zip(files, videos, strict=True)):
            write_video(file, video, fps)
            self._show(f"samples/{i}", video, fps, step)
        if self._wandb:
            import wandb

            shown = {f"samples/{i}": wandb.Video(str(file), format="mp4") for i, file in enumerate(files)}
            self._wandb.log(_flat({f"heldout/{name}": value for name, value in numbers.items()}) | shown, step=step)
        self._append("validation", step, numbers, "heldout/")  # last: a look is there whole or will be done again

    def _append(self, name: str, step: int, values: dict[str, Any], group: str = "") -> None:
        self._streams[name].write(json.dumps({"step": step, **values}) + "\n")
        self._streams[name].flush()
        for key, number in _flat(values).items():
            self._board.add_scalar(f"{group}{key}", number, step)

    def _show(self, name: str, video: Tensor, fps: float, step: int) -> None:
        """As an animated GIF: TensorBoard's own kind of video, which torch writes with a package that is not kept."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        pictures = [Image.fromarray(frame) for frame in video.numpy()]
        for picture in pictures:
            picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        stream = io.BytesIO()
        pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
        width, height = pictures[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=stream.getvalue())
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._board._get_file_writer().add_summary(summary, step)

    def flush_to_disk(self) -> None:
        """Before a checkpoint is made, so that it never knows of steps that this file does not."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """A number of each, those of lists by their places, without those that are not there."""
    flat = {}
    for key, value in values.items():
        for i, number in enumerate(value if isinstance(value, list) else [value]):
            if number is not None:
                flat[f"{key}/{i}" if isinstance(value, list) else key] = number
    return flat


def _weights_and_biases(folder: Path) -> Any:
    """A run of W&B's, taken up again with the training; None unless WANDB_PROJECT, its own variable, names a project
    and its package is installed."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        import wandb
    except ImportError:
        return None
    file = folder / "wandb-id"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:16].encode())
    return wandb.init(id=file.read_text(), resume="allow", dir=str(folder))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _lines_until(file: Path, step: int) -> bytes:
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # the one that was being written when the run was killed
            continue
    return b"".join(kept)
