"""The optimizer of the tiny models: orthogonalised momentum for matrices, Adam for the rest.

Muon (Jordan et al., 2024; Newton-Schulz iteration as in arXiv 2502.16982). With plain Adam the tiny VAE
learned brightness first and then stood still for a thousand steps before it learned colour.
"""

from collections.abc import Iterable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Two parameter groups: ``matrices`` (two or more axes, all but the first flattened) and ``others``.

    The training loop sets each group's ``lr`` to its ``peak`` times a schedule.
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        others: Iterable[torch.Tensor],
        *,
        matrix_rate: float,
        other_rate: float,
        weight_decay: float = 0.01,
    ):
        groups = [
            {"params": list(matrices), "orthogonal": True, "lr": matrix_rate, "peak": matrix_rate},
            {"params": list(others), "orthogonal": False, "lr": other_rate, "peak": other_rate},
        ]
        super().__init__(groups, {"weight_decay": weight_decay, "momentum": 0.95, "betas": (0.9, 0.99)})

    def scale_rates(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak"]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self._orthogonal(p, group) if group["orthogonal"] else self._adam(p, group)
                if p.ndim > 1:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"])

    def _orthogonal(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p.grad)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        direction = p.grad.lerp(state["momentum"], group["momentum"]).reshape(p.shape[0], -1)
        rows, columns = direction.shape
        return orthogonalised(direction).reshape(p.shape) * max(1.0, rows / columns) ** 0.5

    def _adam(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(p.grad, 1 - first)
        state["square"].lerp_(p.grad.square(), 1 - second)
        count = state["step"].item()
        square = state["square"] / (1 - second**count)
        return state["mean"] / (1 - first**count) / (square.sqrt() + 1e-8)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U·Vᵀ of the matrix's U·S·Vᵀ: five Newton-Schulz steps bring all singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
