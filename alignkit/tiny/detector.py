"""A small network that says where and when a clip of moving shapes has a local fault."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.tiny.classifier import Role, unit_batches, with_weights

FILES: dict[Role, Path] = {
    "judge": Path(__file__).with_name("detector.safetensors"),
    "ranker": Path(__file__).with_name("ranker_detector.safetensors"),
}
WIDTHS: dict[Role, int] = {"judge": 16, "ranker": 12}
FAULTY = 0.5
"""A clip that is given a higher probability has a fault."""
CELL = 4  # pixels a side, and frames, of a cell of the map
STRONGEST = 4  # cells whose mean is the clip's score: a fault is never one cell alone


class FaultDetector(nn.Module):
    """3-D convolutions over a clip of 17 frames of 48x48 pixels, down to a map of 5x12x12 cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide, wider = 2 * width, 3 * width

        def block(
            before: int, after: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
        ) -> list[nn.Module]:
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            return [nn.Conv3d(before, after, kernel, stride, padding), nn.GroupNorm(4, after), nn.SiLU()]

        self.fine = nn.Sequential(
            *block(3, width, (1, 3, 3), (1, 2, 2)),
            *block(width, wide, (3, 3, 3), (2, 1, 1)),
            *block(wide, wider, (3, 3, 3), (2, 2, 2)),
        )
        # What the whole clip looks like: a shape is a ghost only beside another.
        self.coarse = nn.Sequential(
            *block(wider, wider, (3, 3, 3), (1, 2, 2)),
            *block(wider, wider, (3, 3, 3), (1, 1, 1)),
        )
        self.joined = nn.Sequential(*block(2 * wider, wider, (3, 3, 3), (1, 1, 1)), nn.Conv3d(wider, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        """float [B, 3, 17, 48, 48] in [-1, 1] to logits by cell, [B, 5, 12, 12]; cell t looks at frames 4·t ± 2."""
        fine = self.fine(video)
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[2:], mode="nearest")
        return self.joined(torch.cat([fine, coarse], dim=1))[:, 0]


def clip_logit(cells: Tensor) -> Tensor:
    """[B, 5, 12, 12] to [B]: the mean of the strongest cells."""
    return cells.flatten(1).topk(STRONGEST).values.mean(1)


@lru_cache(maxsize=2)
def load_detector(role: Role = "judge") -> FaultDetector:
    """The shipped detector, in eval mode on the CPU. Raises ModelError when its weights are missing."""
    return with_weights(FaultDetector(WIDTHS[role]), FILES[role], "fault detector")


@torch.no_grad()
def fault_maps(frames: np.ndarray, role: Role = "judge") -> Tensor:
    """Probability of a fault by cell of uint8 clips [B, 17, 48, 48, 3]: float32 [B, 5, 12, 12]."""
    model = load_detector(role)
    return torch.cat([model(video) for video in unit_batches(frames)]).sigmoid()


@torch.no_grad()
def fault_scores(frames: np.ndarray, role: Role = "judge") -> np.ndarray:
    """Probability that a clip has a fault, of uint8 clips [B, 17, 48, 48, 3]: float64 [B]."""
    model = load_detector(role)
    return torch.cat([clip_logit(model(video)) for video in unit_batches(frames)]).double().sigmoid().numpy()
