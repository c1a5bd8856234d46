"""What a head reads, and checks of it. Host numbers and host tensors are looked at; device tensors are not."""

import math

import torch
from torch import Tensor

from ..checks import InputError, check_like, describe, is_number

# What each head reads of its own; every head takes beta and the terms weight_sft and weight_region_sft too.
HEADS: dict[str, tuple[str, ...]] = {
    "local_dpo": ("strength", "weight_region", "weight_global"),
    "dpo": ("label_smoothing",),
    "robust_dpo": ("label_smoothing",),
    "ipo": (),
    "hinge": (),
    "poly_dpo": ("alpha",),
    "winner_guarded": ("guard_weight",),
    "region_dpo": ("label_smoothing", "num_regions"),
    "segment_dpo": ("preference", "num_regions"),
    "sft": (),
}
UNSET = {"strength": None, "weight_region": 1.0, "weight_global": 1.0, "label_smoothing": 0.0, "alpha": 0.0,
         "guard_weight": 1.0, "preference": None, "num_regions": None}  # fmt: skip


def check_head(head: str, weight_region_sft: float, own: dict[str, object]) -> None:
    """`head` is known, and nothing is set that it does not read."""
    if head not in HEADS:
        raise InputError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
    for name, value in own.items():
        unset = value is None if UNSET[name] is None else not isinstance(value, Tensor) and value == UNSET[name]
        read = name in HEADS[head] or (name == "strength" and weight_region_sft)
        if not read and not unset:
            readers = ", ".join(other for other, names in HEADS.items() if name in names)
            raise InputError(f"{name} is set, but head {head!r} does not read it; {readers} does")
    if head == "segment_dpo" and own["preference"] is None:
        raise InputError("head 'segment_dpo' needs preference, [B, R] of -1, 0 and 1")
    number("label_smoothing", own["label_smoothing"], 0, 0.5, below=True)
    number("alpha", own["alpha"], -1)
    for name in ("weight_region", "weight_global"):
        number(name, own[name])
    if not isinstance(own["guard_weight"], Tensor):
        number("guard_weight", own["guard_weight"], 0)


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf, below: bool = False) -> float:
    """A finite number of low to high (`below` high)."""
    if not is_number(value):
        raise InputError(f"{name} must be a number, got {describe(value)}")
    if not math.isfinite(value) or not low <= value <= high or (below and value == high):
        bounds = f"of {low} and above" if math.isinf(high) else f"of {low} to {'below ' * below}{high}"
        raise InputError(f"{name} is {value}, expected a finite number" + (f" {bounds}" if low > -math.inf else ""))
    return float(value)


def host_beta(beta: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A number for the kernel, or a tensor of one element on the device, which nobody looks at."""
    if isinstance(beta, Tensor):
        if beta.numel() != 1 or not beta.is_floating_point():
            raise InputError(f"beta must be a number or a floating-point tensor of one element, got {describe(beta)}")
        if beta.device.type != "cpu" or device.type == "cpu":
            return 1.0, beta.to(device)
        beta = beta.item()
    if not is_number(beta):
        raise InputError(f"beta must be a number or a tensor of one element, got {describe(beta)}")
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta}, expected a finite number above 0")
    return float(beta), None


def check_references(
    head: str,
    predictions: tuple[Tensor | None, Tensor | None],
    stored: tuple[Tensor | None, Tensor | None],
    like: Tensor,
    num_regions: int,
) -> None:
    """The reference's predictions, or its stored errors, both sides of one; neither for `sft`."""
    given = [x is not None for x in (*predictions, *stored)]
    if head != "sft" and given not in ([True, True, False, False], [False, False, True, True]):
        raise InputError(
            "pass either the reference's predictions (reference_w and reference_l) or its stored errors "
            "(reference_error_w and reference_error_l)"
        )
    if head == "sft" and any(given):
        raise InputError("head 'sft' compares with no reference; leave reference_* out")
    for side, prediction, error in zip("wl", predictions, stored, strict=True):
        if prediction is not None:
            check_like(f"reference_{side}", prediction, "pred_w", like)
        expected = [like.shape[0], num_regions]
        fits = isinstance(error, Tensor) and error.dtype == torch.float64 and list(error.shape) == expected
        if error is not None and not fits:
            raise InputError(
                f"reference_error_{side} is {describe(error)}, expected float64 {expected}: "
                "the sums that region_errors returned"
            )


def per_pair(name: str, x: object, batch: int, device: torch.device) -> Tensor | None:
    """One number a pair on the device; those that the host holds are 0 and above and finite."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point() or list(x.shape) != [batch]:
        raise InputError(f"{name} must be a floating-point tensor [{batch}], one number a pair, got {describe(x)}")
    host = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if host and not all(0 <= value < math.inf for value in x.tolist()):
        raise InputError(f"{name} must hold finite numbers of 0 and above, got {x.tolist()}")
    return x.to(device, non_blocking=True).contiguous()
