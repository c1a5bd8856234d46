"""Whether an alignment is reached, from the numbers that `alignkit eval` measured."""

from typing import Any

import numpy as np
import torch

from alignkit.evaluation.intervals import difference

ACCURACY_WANTED = 0.70
WINNER_ERROR_ALLOWED = 0.01
MOTION_NEAR, MOTION_FAR = 0.10, 0.25
FEW_FAULTS = 0.05
"""Where the base has fewer there is nothing to halve."""


def relative_change(after: dict[str, Any], side: str) -> dict[str, float]:
    """The error of side "w" or "l" before and after, and by what share it changed."""
    reference, trained = after[f"error_{side}_before"], after[f"error_{side}_after"]
    return {"before": reference, "after": trained, "relative_change": trained / reference - 1}


def verdict(checks: list[dict[str, Any]], unjudged: list[str]) -> str:
    """The word for a run: reached, not reached, or cannot be judged, where numbers mean nothing, good or bad."""
    if unjudged:
        return "cannot be judged"
    return "reached" if all(check["reached"] for check in checks) else "not reached"


def criteria(after: dict[str, Any], pictures: dict[str, Any], few_step: bool = False) -> list[dict[str, Any]]:
    """All must hold at once for an alignment to be called reached; accuracy alone is no success.

    few_step: of a student that is trained at its own few steps, errors at others say nothing: its samples alone count.
    """
    checks = [] if few_step else _pair_checks(after)
    checks += [_frechet_check(pictures["frechet"]), _motion_check(pictures["motion"])]
    if pictures["fault_rate"]:
        checks.append(_fault_check(pictures["fault_rate"]))
        checks.append(_prompt_check(pictures["prompt_following"]))
    return checks


def _pair_checks(after: dict[str, Any]) -> list[dict[str, Any]]:
    accuracy = after["region_accuracy"]
    change = relative_change(after, "w")["relative_change"]
    return [
        _check(
            "accuracy",
            accuracy,
            ACCURACY_WANTED,
            accuracy >= ACCURACY_WANTED,
            f"the real region is preferred in {accuracy:.1%} of {after['comparisons']} held-out comparisons "
            f"({ACCURACY_WANTED:.0%} wanted)",
        ),
        _check(
            "winner error",
            change,
            WINNER_ERROR_ALLOWED,
            change <= WINNER_ERROR_ALLOWED,
            f"the error on real held-out videos changed by {change:+.2%} (at most {WINNER_ERROR_ALLOWED:+.0%} allowed)",
        ),
    ]


def change_of(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Shares of N samples in which something is so, with the base and aligned, and the change's 95 % interval."""
    found = difference("", before, after)
    return {"base": found.first, "aligned": found.second, "interval": [found.low, found.high]}


def _frechet_check(frechet: dict[str, list[float]] | None) -> dict[str, Any]:
    if frechet is None:
        text = "the distance of samples to real clips cannot be measured with fewer than two held-out clips"
        return _check("Fréchet distance", None, None, False, text)
    base, aligned = (torch.tensor(frechet[name], dtype=torch.float64) for name in ("base", "aligned"))
    spread = (base.max() - base.min()).item()
    limit = base.mean().item() + spread
    return _check(
        "Fréchet distance",
        aligned.mean().item(),
        limit,
        aligned.mean().item() <= limit,
        f"samples lie {aligned.mean():.3g} from real clips (Fréchet distance), the base's {base.mean():.3g}, which "
        f"spreads over {spread:.2g} between seeds",
    )


def _motion_check(motion: dict[str, float]) -> dict[str, Any]:
    # the VAE's own flicker counts as motion and no training of the network can take it away
    off, off_before = (abs(motion[name] / motion["real_through_vae"] - 1) for name in ("aligned", "base"))
    limit = min(max(MOTION_NEAR, off_before), MOTION_FAR)
    return _check(
        "motion",
        off,
        limit,
        off <= limit,
        f"samples change by {motion['aligned']:.2f} levels a frame, real clips after the VAE by "
        f"{motion['real_through_vae']:.2f} (as filmed {motion['real']:.2f}), the base's samples by "
        f"{motion['base']:.2f} (wanted: within {MOTION_NEAR:.0%} of clips after the VAE, or within {MOTION_FAR:.0%} "
        "and no further from them than the base)",
    )


def _fault_check(rate: dict[str, Any]) -> dict[str, Any]:
    limit = max(rate["base"] / 2, FEW_FAULTS)
    return _check(
        "faults",
        rate["aligned"],
        limit,
        rate["aligned"] <= limit,
        f"a fault is seen in {rate['aligned']:.1%} of {rate['samples']} samples, of the base's in {rate['base']:.1%} "
        f"({_points(rate)}; at most half, or {FEW_FAULTS:.0%}, wanted)",
    )


def _prompt_check(rate: dict[str, Any]) -> dict[str, Any]:
    return _check(
        "prompt followed",
        rate["aligned"],
        rate["base"],
        rate["aligned"] >= rate["base"],
        f"shape, colour and direction are as prompted in {rate['aligned']:.1%} of {rate['samples']} samples, of the "
        f"base's in {rate['base']:.1%} ({_points(rate)}; no fewer wanted)",
    )


def _points(rate: dict[str, Any]) -> str:
    low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in rate["interval"])
    return f"95 % interval of the change {low} to {high} points"


def _check(name: str, value: float | None, limit: float | None, reached: bool, text: str) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "reached": bool(reached), "text": text}
