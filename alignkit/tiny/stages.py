"""What the training stages share: the batch order, the learning rate, and checkpoints that resume."""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from alignkit.files import put_in_place

log = logging.getLogger("alignkit.tiny")
CHECKPOINT_SECONDS = 60.0
LOG_STEPS = 50


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """The random numbers of one step: a function of where it is, so a resumed run draws the same ones."""
    return np.random.default_rng([seed, stage, step])


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A torch generator that continues where ``rng`` stands."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def schedule(step: int, steps: int, warmup: int = 100, hold: float = 0.0) -> float:
    """A share of the peak: linear warm-up, a plateau up to the share ``hold``, a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    done = min(1.0, max(0.0, (step - start) / max(1.0, steps - start)))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


class Ema:
    """Exponential moving average of a module's parameters; the decay is lower in the first steps."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.values[name].lerp_(p.detach(), 1 - decay)


def train_steps(
    name: str, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, steps: int
) -> Iterator[int]:
    """Yield the steps that are left to do; save the state every minute and after the last one.

    The caller trains in the loop's body. A run that was stopped goes on from the last saved state.
    """
    path = folder / f"{name}.checkpoint.pt"
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.values = state["ema"]
        first = state["step"]
        log.info("%s: goes on from step %d of %d", name, first, steps)
    saved = time.monotonic()
    for step in range(first, steps):
        yield step
        ema.update(model, step)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.values,
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".part"))
            put_in_place(path.with_suffix(".part"), path)
            saved = time.monotonic()


class RunningLog:
    """Averages figures and logs one line every ``LOG_STEPS`` steps, with the seconds a step takes."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.monotonic()

    def add(self, step: int, **figures: float) -> None:
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        self.count += 1
        if (step + 1) % LOG_STEPS == 0 or step + 1 == self.steps:
            means = "  ".join(f"{key} {value / self.count:.4f}" for key, value in self.sums.items())
            seconds = (time.monotonic() - self.started) / self.count
            log.info("%s: step %d of %d  %s  %.3f s a step", self.name, step + 1, self.steps, means, seconds)
            self.sums, self.count, self.started = {}, 0, time.monotonic()
