"""What the manifold experiment is made of: the surface, its winners and losers, the score, the arms and the sizes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

X_REACH, Y_REACH = 5.0, 1.0  # the surface; points are drawn from three pieces of it
WINNERS, RADIUS = 3.0, 1.0  # winners lie within RADIUS of x = ±WINNERS, losers within RADIUS of 0
ON_SURFACE = 0.15
COORDINATES = 3


@dataclass(frozen=True)
class Arm:
    """One row of the table. `beta` is theirs, of summed errors without a half; `tau` is the guarded loss's.

    sft: the weight of the winner's summed error. published: StrictScore in the paper's table 2.
    """

    name: str
    title: str
    published: float | None
    beta: float | None = None
    sft: float = 0.0
    tau: float | None = None

    @property
    def trained(self) -> bool:
        return bool(self.beta or self.sft or self.tau)


ARMS = (
    Arm("base", "base", None),
    Arm("dpo-1", "FlowDPO, β = 1", 0.0, beta=1),
    Arm("dpo-10", "FlowDPO, β = 10", 0.033, beta=10),
    Arm("dpo-100", "FlowDPO, β = 100", 0.629, beta=100),
    Arm("sft", "fine-tuning on winners", 0.858, sft=1),
    Arm("dpo-sft-1", "FlowDPO + fine-tuning, β = 1", 0.857, beta=1, sft=1),
    Arm("dpo-sft-100", "FlowDPO + fine-tuning, β = 100", 0.676, beta=100, sft=1),
    Arm("guarded", "winner-guarded, w = (1 − t)², τ = 1", 0.899, tau=1),
)


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment, the paper's but for the seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    pretraining: int = 10_000
    fine_tuning: int = 10_000
    batch: int = 512
    pretraining_rate: float = 1e-3
    rate: float = 1e-4
    clip: float = 1.0
    samples: int = 10_000
    euler: int = 100


SMOKE = Plan(seeds=(0,), pretraining=40, fine_tuning=20, samples=500, euler=20)


def result_file(out: Path, arm: str, seed: int) -> Path:
    return out / f"seed-{seed}" / f"{arm}.json"


def samples_file(out: Path, arm: str, seed: int) -> Path:
    return out / f"seed-{seed}" / "samples" / f"{arm}.safetensors"


def height(x: Tensor, y: Tensor) -> Tensor:
    """The surface's z over (x, y)."""
    hills = 1.2 * torch.exp(-((x - 3) ** 2)) + 1.2 * torch.exp(-((x + 3) ** 2)) - 0.9 * torch.exp(-(x**2))
    return hills * (1 - 0.15 * y**2)


def surface_points(x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, 1, 1], the kernels' shape of an image, from [B] each."""
    return torch.stack((x, y, height(x, y)), dim=1)[..., None, None]


def points_of(uniforms: Tensor, side: str) -> Tensor:
    """Points [B, 3, 1, 1] from uniform numbers [B, 2], uniform in y and, within their side, in x.

    side: "winners", "losers", or "pairs": the two hills and the valley, each as often.
    """
    x, y = (2 * uniforms - 1).unbind(1)
    if side == "pairs":
        third = torch.floor(3 * uniforms[:, 0])
        x = (third - 1) * WINNERS + RADIUS * (2 * (3 * uniforms[:, 0] - third) - 1)
    elif side == "losers":
        x = RADIUS * x
    else:  # the lower half of the numbers goes to the left hill
        x = torch.where(x < 0, -WINNERS, WINNERS) + RADIUS * (2 * x.abs() - 1)
    return surface_points(x, Y_REACH * y)


def score(points: Tensor) -> dict[str, float]:
    """Shares of points [B, 3]: on the surface, where winners are, and both (StrictScore)."""
    x, y, z = points.double().unbind(1)
    on_surface = (z - height(x, y)).abs() <= ON_SURFACE
    in_range = (x.abs() - WINNERS).abs() < RADIUS
    return {
        "strict": (on_surface & in_range).double().mean().item(),
        "on_surface": on_surface.double().mean().item(),
        "in_range": in_range.double().mean().item(),
    }
