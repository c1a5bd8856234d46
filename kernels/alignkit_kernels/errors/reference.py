"""Errors and gaps by region in plain torch: the meaning of the kernel beside it.

Terms are computed in fp32 (fp64 when an input is), products of differences so that equal predictions give
exactly 0; they are summed over a tree fixed by the sample's size alone, along the channels in their own precision and
then in fp64. So a sample's numbers depend on neither its batch nor the number of threads.

Whole latents are overwritten where they are not needed again: a new one's pages cost more than the arithmetic.
"""

import torch
from torch import Tensor

from ..noise.reference import coefficient_columns, noise_of

CHUNK = 1024
MOST_STEPS = 64  # of fp32 in a row; latents have 16 channels


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def target_of(clean: Tensor, coefficients: Tensor, source: str, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """y = c * noise + d * clean, what the network should have predicted."""
    columns = coefficient_columns(coefficients, dtype, clean.dim())
    _, _, c, d = columns
    clean = clean.to(dtype)
    return (c * noise_of(source, noise, clean, columns)).add_(d * clean)


def gap_terms(pred: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """(p - y)**2 - (r - y)**2 without cancellation, as (p - r) * (p + r - 2 * y)."""
    return (pred + reference).sub_(target, alpha=2).mul_(pred - reference)  # 2 * y is exact


def tree_sum(x: Tensor) -> Tensor:
    """[B, N] to [B, 1]: sums of CHUNK neighbours, then of those by folding halves. Each sum of a chunk is one thread's,
    whatever the number of threads and of rows: the same bits for any of them."""
    batch, size = x.shape
    whole = size // CHUNK * CHUNK
    parts = [x[:, :whole].reshape(batch, -1, CHUNK).sum(2), x[:, whole:].sum(1, keepdim=True)]
    x = torch.cat(parts, 1)
    while (size := x.shape[1]) > 1:
        half = size // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((folded, x[:, 2 * half :]), 1) if size % 2 else folded
    return x


def region_sums(terms: Tensor, regions: Tensor | None, num_regions: int) -> Tensor:
    """fp64 [B, R]: the sum of `terms` over each region; labels of `num_regions` and above go nowhere.

    Along the first axis that labels share, the channels, terms are added in their own precision, as a kernel's tile
    does; everything after that is fp64.
    """
    shared = [1] if regions is None else [i for i in range(1, terms.dim()) if regions.shape[i] == 1]
    for number, dim in enumerate(shared):
        short = number == 0 and terms.shape[dim] <= MOST_STEPS
        terms = terms.sum(dim, keepdim=True, dtype=None if short else torch.float64)
    sums = terms.to(torch.float64)
    if regions is None:
        return tree_sum(sums.flatten(1))
    return torch.cat([tree_sum(torch.where(regions == k, sums, 0.0).flatten(1)) for k in range(num_regions)], dim=1)


def region_counts(like: Tensor, regions: Tensor | None, num_regions: int) -> Tensor:
    """fp64 [B, R]: elements in each region, those along broadcast axes included."""
    batch, elements = like.shape[0], like[0].numel()
    if regions is None:
        return torch.full((batch, 1), float(elements), dtype=torch.float64, device=like.device)
    labels = regions.flatten(1)
    counts = torch.stack([(labels == k).sum(1) for k in range(num_regions)], dim=1).to(torch.float64)
    return (counts * (elements // labels.shape[1])).expand(batch, num_regions)


def scaled_by_region(values: Tensor, weights: Tensor, regions: Tensor | None, highest: int = 255) -> Tensor:
    """values * weights[b, region], in place; 0 where the label has no weight, whatever the value is. No label is above
    `highest`."""
    weights = weights.to(values.dtype)
    if regions is None:
        return values.mul_(weights.reshape(-1, *[1] * (values.dim() - 1)))
    num_regions, batch = weights.shape[1], values.shape[0]
    labels = regions.flatten(1).long().expand(batch, -1)
    weight = weights.gather(1, labels.clamp(max=num_regions - 1)).reshape(batch, *regions.shape[1:])
    values.mul_(weight)
    return values if highest < num_regions else values.masked_fill_(regions >= num_regions, 0.0)


def forward(
    pred: Tensor,
    reference: Tensor | None,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
    num_regions: int,
) -> Tensor:
    """fp64 [3, B, R]: count, error, gap (0 without a reference)."""
    dtype = compute_dtype(pred, reference, clean)
    target = target_of(clean, coefficients, source, noise, dtype)
    p = pred.to(dtype)
    count = region_counts(pred, regions, num_regions)
    error = region_sums((p - target).square_(), regions, num_regions)
    if reference is None:
        return torch.stack((count, error, torch.zeros_like(error)))
    gap = region_sums(gap_terms(p, reference.to(dtype), target), regions, num_regions)
    return torch.stack((count, error, gap))


def backward(
    grad: Tensor,
    pred: Tensor,
    clean: Tensor,
    coefficients: Tensor,
    source: str,
    noise: Tensor,
    regions: Tensor | None,
) -> Tensor:
    """d(loss)/d(pred) = 2 * g[region] * (pred - y), with g the gradients of error and gap together."""
    dtype = compute_dtype(pred, clean)
    target = target_of(clean, coefficients, source, noise, dtype)
    residual = torch.sub(pred.to(dtype), target, out=target)
    return scaled_by_region(residual, 2 * (grad[1] + grad[2]), regions).to(pred.dtype).contiguous()
