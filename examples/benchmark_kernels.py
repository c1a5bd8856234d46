"""The fused loss against the same loss in eager fp32 (and torch.compile of it, on a GPU), on this machine, in seconds.

    python examples/benchmark_kernels.py        the numbers are compared before they are timed

On a GPU the kernels run, without one their reference in plain torch; on Wan2.1 480p latents. `make
bench` is the whole benchmark: every op, shape and dtype, gradients verified against fp64, L2 cold.
"""

from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import softplus

from alignkit_kernels import NoiseKey, count_launches, flow_coefficients, keyed_randn, local_dpo_loss

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SHAPE = (1, 16, 21, 60, 104)  # Wan2.1 at 480p, 81 frames
BETA, SIGMA, ROUNDS = 50.0, 0.6, 20


def inputs() -> dict[str, Tensor]:
    """Predictions near their reference's, a mask of a tenth of the latent, noise that is given as a tensor."""
    draws = torch.Generator(DEVICE).manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(SHAPE, generator=draws, device=DEVICE)

    noise = keyed_randn(SHAPE, NoiseKey(0, torch.arange(SHAPE[0]), 0), device=DEVICE)
    x = {"noise_w": noise}
    for side in "wl":
        clean = normal(1.0)
        reference = noise - clean + normal(0.3)
        x |= {f"clean_{side}": clean, f"reference_{side}": reference, f"pred_{side}": reference + normal(0.03)}
    x = {name: value.to(DTYPE) for name, value in x.items()}
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=draws, device=DEVICE) < 0.1
    rows = flow_coefficients(torch.full(SHAPE[:1], SIGMA, device=DEVICE))
    return x | {"regions": mask.to(torch.uint8), "coefficients": rows}


def eager(x: dict[str, Tensor]) -> Tensor:
    """LocalDPO as one would write it in fp32, all pairs as strong as can be (eta = 0 without a strength)."""
    inside = x["regions"].float().expand(SHAPE)
    gaps, errors = {}, {}
    for side in "wl":
        pred, reference, clean = (x[f"{name}_{side}"].float() for name in ("pred", "reference", "clean"))
        target = x["noise_w"].float() - clean
        error, gap = (pred - target) ** 2, (pred - target) ** 2 - (reference - target) ** 2
        errors[side] = error.mean(dim=(1, 2, 3, 4))
        gaps[side] = gap.mean(dim=(1, 2, 3, 4)), (gap * inside).sum(dim=(1, 2, 3, 4)) / inside.sum(dim=(1, 2, 3, 4))
    everywhere, within = (-BETA / 2 * (w - l) for w, l in zip(gaps["w"], gaps["l"], strict=True))
    return (softplus(-within) + softplus(-everywhere) + 0.1 * errors["w"]).mean()


def fused(x: dict[str, Tensor]) -> Tensor:
    x = dict(x)
    return local_dpo_loss(x.pop("pred_w"), x.pop("pred_l"), **x, beta=BETA).loss


def once(loss, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward."""
    wanted = [x[name].requires_grad_() for name in ("pred_w", "pred_l")]
    value = loss(x)
    return value.detach(), list(torch.autograd.grad(value, wanted))


def seconds(loss, x: dict[str, Tensor]) -> float:
    found = []
    for _ in range(ROUNDS + 3):
        if GPU:
            torch.cuda.synchronize()
        start = perf_counter()
        once(loss, x)
        if GPU:
            torch.cuda.synchronize()
        found.append(perf_counter() - start)
    return median(found[3:])


if __name__ == "__main__":
    x = inputs()
    losses = {"fused": fused, "eager fp32": eager} | ({"torch.compile": torch.compile(eager)} if GPU else {})
    value, gradients = once(fused, x)
    for name, loss in losses.items():
        other, others = once(loss, x)
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, others, strict=True))
        assert abs(float(value - other)) < 1e-4 and off < (2**-6 if GPU else 1e-4), f"{name}: another loss or gradient"
    with count_launches() as launched:
        once(fused, x)
    path = "kernels" if launched else "their reference in torch"
    device, dtype = torch.cuda.get_device_name() if GPU else "CPU", str(DTYPE).removeprefix("torch.")
    print(f"{device}, {list(SHAPE)} {dtype}, fused: {path}")
    print(f"loss {value:.6f}, equal in all; forward and backward, median of {ROUNDS}:")
    for name, loss in losses.items():
        print(f"  {name:14} {1000 * seconds(loss, x):8.3f} ms")
