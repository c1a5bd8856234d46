"""A small network that names the shape, colour, motion and background of a clip, and its features."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from alignkit.errors import ModelError
from alignkit.tiny.clips import ATTRIBUTES, FRAMES, SIZE

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
FEATURES = 32
NAMED = ("shape", "colour", "motion")
"""The attributes that a good sample must get right."""


class ClipClassifier(nn.Module):
    """3-D convolutions over a clip of 17 frames of 48x48 pixels, pooled over place; 0.14 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 16, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv3d(16, 24, 3, stride=(2, 1, 1), padding=1),
            nn.GroupNorm(4, 24),
            nn.SiLU(),
            nn.Conv3d(24, 48, 3, stride=2, padding=1),
            nn.GroupNorm(4, 48),
            nn.SiLU(),
            nn.Conv3d(48, 64, 3, stride=(1, 2, 2), padding=1),
            nn.GroupNorm(4, 64),
            nn.SiLU(),
        )
        self.features = nn.Linear(2 * 64, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(v)) for name, v in ATTRIBUTES.items()})

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """float [B, 3, 17, 48, 48] in [-1, 1] to features [B, 32] and logits by attribute."""
        hidden = self.body(video)
        pooled = torch.cat([hidden.mean(dim=(2, 3, 4)), hidden.amax(dim=(2, 3, 4))], dim=1)
        features = self.features(pooled)
        active = nn.functional.silu(features)
        return features, {name: head(active) for name, head in self.heads.items()}


@lru_cache(maxsize=1)
def load_classifier() -> ClipClassifier:
    """The shipped classifier, in eval mode on the CPU. Raises ModelError when its weights are missing."""
    if not WEIGHTS.exists():
        raise ModelError(f"{WEIGHTS}: the classifier's weights are missing; reinstall alignkit")
    model = ClipClassifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def classify(frames: np.ndarray) -> dict[str, list[str]]:
    """Name what uint8 clips [B, 17, 48, 48, 3] show: for each attribute, B names."""
    _, logits = _forward(load_classifier(), frames)
    return {name: [ATTRIBUTES[name][i] for i in logits[name].argmax(-1).tolist()] for name in ATTRIBUTES}


def features(frames: np.ndarray) -> np.ndarray:
    """The classifier's features of uint8 clips [B, 17, 48, 48, 3]: float32 [B, 32]."""
    return _forward(load_classifier(), frames)[0].numpy()


def log_probability(frames: np.ndarray, attributes: list[dict[str, str]]) -> np.ndarray:
    """How likely uint8 clips [B, 17, 48, 48, 3] show the named shape, colour and motion: sum of logs, float64 [B]."""
    _, logits = _forward(load_classifier(), frames)
    total = torch.zeros(len(attributes), dtype=torch.float64)
    for name in NAMED:
        wanted = torch.tensor([ATTRIBUTES[name].index(entry[name]) for entry in attributes])
        total += logits[name].double().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    return total.numpy()


@torch.no_grad()
def _forward(
    model: ClipClassifier, frames: np.ndarray, batch: int = 32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape[1:] != (FRAMES, SIZE, SIZE, 3):
        raise ModelError(
            f"the tiny classifier takes uint8 clips [B, {FRAMES}, {SIZE}, {SIZE}, 3], "
            f"not {frames.dtype} {list(frames.shape)}"
        )
    parts = []
    for first in range(0, len(frames), batch):
        video = torch.from_numpy(np.ascontiguousarray(frames[first : first + batch]))
        parts.append(model(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0))
    logits = {name: torch.cat([part[1][name] for part in parts]) for name in ATTRIBUTES}
    return torch.cat([part[0] for part in parts]), logits
