"""Training of the clip classifiers, on clips and on clips that went through a VAE."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from alignkit.tiny.classifier import WIDTHS, ClipClassifier
from alignkit.tiny.clips import ATTRIBUTES
from alignkit.tiny.muon import Muon
from alignkit.tiny.stages import Ema, RunningLog, schedule, step_rng, torch_generator, train_steps
from alignkit.tiny.vae import to_unit

STAGE = 4
BATCH = 32
LABEL_SMOOTHING = 0.05


def label_columns(attributes: list[dict[str, str]]) -> torch.Tensor:
    """int64 [N, 4]: the number of each attribute's value, in the order of ``ATTRIBUTES``."""
    rows = [[values.index(entry[name]) for name, values in ATTRIBUTES.items()] for entry in attributes]
    return torch.tensor(rows)


def train_classifier(
    clips: np.ndarray,
    round_trips: np.ndarray,
    attributes: list[dict[str, str]],
    folder: Path,
    *,
    steps: int,
    peak_rate: float,
    seed: int,
    width: int = WIDTHS["judge"],
    vaes: int = 1,
) -> ClipClassifier:
    """Train on uint8 clips [N, F, H, W, 3]; ``round_trips`` [vaes·M, …] are the first M of them after each VAE."""
    torch.manual_seed(seed)
    model = ClipClassifier(width)
    labels = label_columns(attributes)
    matrices = [module.weight for module in model.body if isinstance(module, torch.nn.Conv3d)][1:]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = Muon(matrices, others, matrix_rate=peak_rate, other_rate=0.1 * peak_rate)
    ema = Ema(model, 0.995)
    running = RunningLog("classifier", steps)
    for step in train_steps("classifier", folder, model, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        real = rng.integers(len(clips), size=BATCH // 2)
        passed = rng.integers(len(round_trips), size=BATCH // 2)
        video = to_unit(np.concatenate([clips[real], round_trips[passed]]))
        rows = torch.from_numpy(np.concatenate([real, passed % (len(round_trips) // vaes)]))
        optimizer.scale_rates(schedule(step, steps))
        _, logits = model(disturbed(video, torch_generator(rng)))
        loss: Any = 0.0
        right: dict[str, float] = {}
        for column, name in enumerate(ATTRIBUTES):
            target = labels[rows, column]
            loss = loss + F.cross_entropy(logits[name], target, label_smoothing=LABEL_SMOOTHING)
            right[name] = (logits[name].argmax(-1) == target).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.add(step, loss=loss.item(), **right)
    model.load_state_dict(ema.values)
    return model.eval()


def disturbed(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, blur, contrast and brightness, each of a random amount, clip by clip."""
    count = video.shape[0]

    def amount(limit: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, 1, generator=generator) * limit

    blurred = F.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    video = torch.lerp(video, blurred, amount(0.5))
    video = video * (0.85 + amount(0.3)) + amount(0.2) - 0.1
    noise = torch.randn(video.shape, generator=generator)
    return (video + amount(0.1) * noise).clamp(-1, 1)
