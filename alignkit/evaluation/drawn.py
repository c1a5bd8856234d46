"""What the shipped judges see in samples of drawn clips: whether the prompt is followed, and where a fault is.

Videos of other things have no such judge; `judge` says so by None.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from alignkit.tiny.classifier import Role, attributes_in, classify, features
from alignkit.tiny.clips import FRAMES, SIZE
from alignkit.tiny.detector import FAULTY, fault_maps, fault_scores


@dataclass(frozen=True)
class Judged:
    """Of B clips: followed bool [B], the prompt's shape, colour and direction are there; fault float64 [B], the
    probability of a fault; cells float32 [B, 5, 12, 12], the same by place and time."""

    followed: np.ndarray
    fault: np.ndarray
    cells: np.ndarray

    @property
    def faulty(self) -> np.ndarray:
        """bool [B]"""
        return self.fault > FAULTY

    @property
    def good(self) -> np.ndarray:
        """bool [B]: the prompt is followed, and nothing is wrong."""
        return self.followed & ~self.faulty


def judge(prompts: list[str], frames: Tensor, role: Role = "judge") -> Judged | None:
    """Judge uint8 clips [B, F, H, W, 3] that were sampled for B prompts; None for prompts that no drawn clip has."""
    wanted = [attributes_in(prompt) for prompt in prompts]
    known = [names for names in wanted if names]
    if len(known) < len(wanted):
        return None
    clips = thumbnails(frames)
    seen = classify(clips, role)
    followed = [all(seen[key][i] == value for key, value in names.items()) for i, names in enumerate(known)]
    return Judged(np.array(followed), fault_scores(clips, role), fault_maps(clips, role).numpy())


def clip_features(frames: Tensor) -> Tensor:
    """The judge's features of uint8 clips [B, F, H, W, 3] of any size: float32 [B, D]."""
    return torch.from_numpy(features(thumbnails(frames)))


def thumbnails(frames: Tensor) -> np.ndarray:
    """uint8 [B, F, H, W, 3] of any size to what the shipped judges look at."""
    if frames.shape[1:4] != (FRAMES, SIZE, SIZE):
        times = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
        pictures = rearrange(frames[:, times], "b f h w c -> (b f) c h w").float()
        small = torch.nn.functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        frames = rearrange(small.round().to(torch.uint8), "(b f) c h w -> b f h w c", f=FRAMES)
    return frames.numpy()
