"""A small network that names the shape, colour, motion and background of a clip, and its features."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from alignkit.errors import ModelError
from alignkit.tiny.clips import ATTRIBUTES, FRAMES, SIZE

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
Network = TypeVar("Network", bound=nn.Module)
Role = Literal["judge", "ranker"]
"""What ranks never judges: the two are trained on other clips, from another seed and at another width."""
FILES: dict[Role, Path] = {"judge": WEIGHTS, "ranker": WEIGHTS.with_name("ranker_classifier.safetensors")}
WIDTHS: dict[Role, int] = {"judge": 16, "ranker": 8}
FEATURES = 32
NAMED = ("shape", "colour", "motion")
"""The attributes that a good sample must get right."""


class ClipClassifier(nn.Module):
    """3-D convolutions over a clip of 17 frames of 48x48 pixels, pooled over place; 0.14 M parameters at width 16."""

    def __init__(self, width: int = WIDTHS["judge"]) -> None:
        super().__init__()
        a, b, c, d = width, 3 * width // 2, 3 * width, 4 * width
        self.body = nn.Sequential(
            nn.Conv3d(3, a, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.GroupNorm(4, a),
            nn.SiLU(),
            nn.Conv3d(a, b, 3, stride=(2, 1, 1), padding=1),
            nn.GroupNorm(4, b),
            nn.SiLU(),
            nn.Conv3d(b, c, 3, stride=2, padding=1),
            nn.GroupNorm(4, c),
            nn.SiLU(),
            nn.Conv3d(c, d, 3, stride=(1, 2, 2), padding=1),
            nn.GroupNorm(4, d),
            nn.SiLU(),
        )
        self.features = nn.Linear(2 * d, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(v)) for name, v in ATTRIBUTES.items()})

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """float [B, 3, 17, 48, 48] in [-1, 1] to features [B, 32] and logits by attribute."""
        hidden = self.body(video)
        pooled = torch.cat([hidden.mean(dim=(2, 3, 4)), hidden.amax(dim=(2, 3, 4))], dim=1)
        features = self.features(pooled)
        active = nn.functional.silu(features)
        return features, {name: head(active) for name, head in self.heads.items()}


@lru_cache(maxsize=2)
def load_classifier(role: Role = "judge") -> ClipClassifier:
    """The shipped classifier, in eval mode on the CPU. Raises ModelError when its weights are missing."""
    return with_weights(ClipClassifier(WIDTHS[role]), FILES[role], "classifier")


def with_weights(model: Network, file: Path, title: str) -> Network:
    """``model`` with the weights of ``file``, in eval mode. Raises ModelError where it is missing."""
    if not file.exists():
        raise ModelError(f"{file}: the {title}'s weights are missing; reinstall alignkit")
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


def classify(frames: np.ndarray, role: Role = "judge") -> dict[str, list[str]]:
    """Name what uint8 clips [B, 17, 48, 48, 3] show: for each attribute, B names."""
    _, logits = _forward(load_classifier(role), frames)
    return {name: [ATTRIBUTES[name][i] for i in logits[name].argmax(-1).tolist()] for name in ATTRIBUTES}


@torch.no_grad()
def features(frames: np.ndarray) -> np.ndarray:
    """The judge's features of uint8 clips [B, 17, 48, 48, 3]: float32 [B, 304].

    Mean and deviation over place and time of every channel of its four layers: the first ones see colour, edges and
    flicker, which the last ones, made to name shapes, look past.
    """
    model = load_classifier()
    parts = []
    for hidden in unit_batches(frames):
        part = []
        for layer in model.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.SiLU):
                part += [hidden.mean(dim=(2, 3, 4)), hidden.std(dim=(2, 3, 4))]
        parts.append(torch.cat(part, dim=1))
    return torch.cat(parts).numpy()


def log_probability(frames: np.ndarray, attributes: list[dict[str, str]], role: Role = "judge") -> np.ndarray:
    """How likely uint8 clips [B, 17, 48, 48, 3] show the named shape, colour and motion: sum of logs, float64 [B]."""
    _, logits = _forward(load_classifier(role), frames)
    total = torch.zeros(len(attributes), dtype=torch.float64)
    for name in NAMED:
        wanted = torch.tensor([ATTRIBUTES[name].index(entry[name]) for entry in attributes])
        total += logits[name].double().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    return total.numpy()


def attributes_in(prompt: str) -> dict[str, str] | None:
    """Shape, colour and motion that a drawn clip's caption names; None if it does not name one of each."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found = {name: [value for value in ATTRIBUTES[name] if value in words] for name in NAMED}
    return {name: values[0] for name, values in found.items()} if all(map(len, found.values())) else None


def unit_batches(frames: np.ndarray, batch: int = 32) -> Iterator[torch.Tensor]:
    """uint8 clips [B, 17, 48, 48, 3], ``batch`` at a time, as float32 [b, 3, 17, 48, 48] in [-1, 1].

    Raises ModelError for clips of another shape or dtype.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape[1:] != (FRAMES, SIZE, SIZE, 3):
        raise ModelError(
            f"the tiny networks take uint8 clips [B, {FRAMES}, {SIZE}, {SIZE}, 3], "
            f"not {frames.dtype} {list(frames.shape)}"
        )
    for first in range(0, len(frames), batch):
        video = torch.from_numpy(np.ascontiguousarray(frames[first : first + batch]))
        yield video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


@torch.no_grad()
def _forward(model: ClipClassifier, frames: np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parts = [model(video) for video in unit_batches(frames)]
    logits = {name: torch.cat([part[1][name] for part in parts]) for name in ATTRIBUTES}
    return torch.cat([part[0] for part in parts]), logits
