"""Picture-level measures that need no downloaded network.

The three that look at videos take uint8 RGB [B, F, H, W, 3], sum in integers, and answer in levels: steps of
1/255 of the full range, averaged over pixels and the three channels. Channels and not luma, so that a blue
shape on black counts as much as a green one. The numbers depend on picture size and frame rate: compare only
clips of one shape.
"""

import torch
from torch import Tensor

from alignkit.errors import DataError


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, [N, D] and [M, D], N, M ≥ 2.

        |μa − μb|² + tr(Σa) + tr(Σb) − 2·tr((Σa·Σb)^½)            (arXiv 1706.08500; unbiased covariances)

    In the squared unit of the features, computed in fp64. With centred data A = X/√(N−1), Σ = AᵀA, the last
    trace is the sum of the singular values of A·Bᵀ: no matrix square root is taken, so equal sets give 0 to
    rounding even where N < D and the covariances are singular. Biased upwards by few samples: compare only
    distances from equal numbers of samples. Raises DataError for other shapes and non-finite features.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] != features_a.shape[1]:
            shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
            raise DataError(f"Fréchet distance: expected [N, D] and [M, D] with N, M ≥ 2, got {shapes}")
        if not torch.isfinite(features).all():
            raise DataError("Fréchet distance: a feature is not finite")
    a, b = features_a.double(), features_b.double()
    means = a.mean(0), b.mean(0)
    a, b = (_root_of_covariance(x - mean) for x, mean in zip((a, b), means, strict=True))
    trace = torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * trace
    return max(float(distance), 0.0)


def _root_of_covariance(centred: Tensor) -> Tensor:
    """A with AᵀA = the unbiased covariance, [min(N, D), D]."""
    root = centred / (centred.shape[0] - 1) ** 0.5
    return torch.linalg.qr(root, mode="r").R if root.shape[0] > root.shape[1] else root


def motion_amount(frames: Tensor) -> Tensor:
    """How much changes from frame to frame: mean |x_t − x_{t−1}|, in levels, fp64 [B]; F ≥ 2.

    (VBench, arXiv 2311.17982, measures flicker of still scenes this way.) 0 for a still picture; a shape of
    s pixels width and height, moving v ≤ s pixels a frame along an axis over a background that differs by c
    levels, gives 2·v·s·c/(H·W).
    """
    x = _levels(frames, "motion", frames_needed=2)
    return _mean((x[:, 1:] - x[:, :-1]).abs())


def temporal_flicker(frames: Tensor) -> Tensor:
    """What appears for one frame and is gone: mean |x_t − median(x_{t−1}, x_t, x_{t+1})|, in levels.

    fp64 [B]; F ≥ 3. Our own definition. 0 for still pictures, fades, and edges passing by, since a value
    between its neighbours in time is their median; full amplitude for a pixel that is different in every
    other frame. Details narrower than twice their motion a frame are on a pixel once only: they count.
    """
    x = _levels(frames, "flicker", frames_needed=3)
    before, now, after = x[:, :-2], x[:, 1:-1], x[:, 2:]
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    median = torch.maximum(low, torch.minimum(high, now))
    return _mean((now - median).abs())


def edge_energy(frames: Tensor) -> Tensor:
    """How much fine detail there is: mean |x − mean of its 4 neighbours|, in levels, fp64 [B]; H, W ≥ 3.

    The 5-point Laplacian over 4, without the border pixels. Our own definition, a watch for high frequencies
    that alignment adds: 0 for even areas and straight ramps, largest for a pattern of single pixels.
    """
    x = _levels(frames, "edge energy", size_needed=3)
    inside = 4 * x[:, :, 1:-1, 1:-1]
    around = x[:, :, :-2, 1:-1] + x[:, :, 2:, 1:-1] + x[:, :, 1:-1, :-2] + x[:, :, 1:-1, 2:]
    return _mean((inside - around).abs()) / 4


def _levels(frames: Tensor, measure: str, frames_needed: int = 1, size_needed: int = 1) -> Tensor:
    """The frames as int16, wide enough for 8 times a level; DataError if the shape or dtype is another."""
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or 0 in frames.shape:
        given = f"{frames.dtype} {list(frames.shape)}"
        raise DataError(f"{measure}: expected uint8 frames [B, F, H, W, 3], got {given}")
    if frames.shape[1] < frames_needed or min(frames.shape[2:4]) < size_needed:
        needed = f"{frames_needed} frames of {size_needed}x{size_needed} pixels"
        raise DataError(f"{measure}: at least {needed} are needed, got {list(frames.shape)}")
    return frames.to(torch.int16)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, dtype=torch.int64).double() / values[0].numel()
