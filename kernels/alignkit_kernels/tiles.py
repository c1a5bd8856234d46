"""What the error kernels share: finding a program's tile, reading it, its labels and its noise."""

import triton
import triton.language as tl

from .noise.device import keyed_values

# Sizes, strides and addresses differ from call to call and must not compile anew. Alignment is a constexpr instead.
RUNTIME_INTEGERS = (
    "loop", "split", "inner", "batch", "num_regions", "programs", "elements", "highest", "row", "before", "gap",
    "label_batch", "label_slab", "plane", "line", "step_plane", "step_line", "step",
    "pred_row", "reference_row", "clean_row", "noise_row", "dpred_row",
    "pred_w_row", "pred_l_row", "reference_w_row", "reference_l_row",
    "clean_w_row", "clean_l_row", "noise_w_row", "noise_l_row",
)  # fmt: skip
POINTERS = (
    "pred_ptr", "reference_ptr", "clean_ptr", "noise_ptr", "coefficients_ptr", "labels_ptr",
    "pred_w_ptr", "pred_l_ptr", "reference_w_ptr", "reference_l_ptr",
    "clean_w_ptr", "clean_l_ptr", "noise_w_ptr", "noise_l_ptr",
    "grad_ptr", "weights_ptr", "dpred_ptr", "dpred_w_ptr", "dpred_l_ptr", "partial_ptr", "sums_ptr", "out_ptr",
    "keys_ptr", "by_loss_ptr", "importance_ptr", "by_pair_ptr",
)  # fmt: skip


@triton.jit
def locate(TILE: tl.constexpr):
    """This program's sample, and its first position along inner."""
    return tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * TILE


@triton.jit
def locate_part(loop, split):
    """This program's slab, and the part of the loop that it walks: first step and the one after its last."""
    part = tl.program_id(1) % split
    steps = tl.cdiv(loop, split)
    first = part * steps
    return (tl.program_id(1) // split).to(tl.int64), first, tl.maximum(first, tl.minimum(first + steps, loop))


@triton.jit
def places(inner, start, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Positions within a tile, and which of them exist. Whole vectors exist or not when aligned."""
    left = inner - start
    if ALIGNED:
        left = tl.multiple_of(left, 8)
    place = tl.arange(0, TILE)
    return place, place < left


@triton.jit
def read(ptr, row, element, place, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a sample that starts `row` elements into the tensor, upcast at once."""
    first = ptr + row + element
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return tl.load(first + place, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def write(ptr, row, element, place, inside, values, ALIGNED: tl.constexpr):
    first = ptr + row + element
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    tl.store(first + place, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_labels(
    labels_ptr, sample, slab, start, place, inside,
    label_batch, label_slab, plane, line, step_plane, step_line, step, highest,
    LABELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """int32 labels of a tile, shared by the whole loop; -1 past the end. Labels above `highest` become it: 1 makes a
    mask of them."""
    if LABELS == "none":
        labels = tl.zeros_like(place)
    else:
        first = labels_ptr + sample * label_batch + slab * label_slab
        if LABELS == "dense":
            first += start
            if ALIGNED:
                first = tl.multiple_of(first, 8)
            offset = place
        else:
            i = start + place
            offset = i // plane * step_plane + i % plane // line * step_line + i % line * step
        labels = tl.load(first + offset, mask=inside, other=0).to(tl.int32)
        labels = tl.minimum(labels, highest)
    return tl.where(inside, labels, -1)


@triton.jit
def by_label(weights_ptr, first, second, labels, held, num_regions, DTYPE: tl.constexpr, TWICE: tl.constexpr):
    """A region's weight for each label; TWICE: twice the sum of two. Read once a program for up to two regions, and
    gathered for more."""
    if num_regions <= 2:
        last = num_regions - 1
        low, high = tl.load(weights_ptr + first).to(DTYPE), tl.load(weights_ptr + first + last).to(DTYPE)
        if TWICE:
            low = 2 * (low + tl.load(weights_ptr + second).to(DTYPE))
            high = 2 * (high + tl.load(weights_ptr + second + last).to(DTYPE))
        weights = tl.where(labels == 0, low, high)
    else:
        weights = tl.load(weights_ptr + first + labels, mask=held, other=0.0).to(DTYPE)
        if TWICE:
            weights = 2 * (weights + tl.load(weights_ptr + second + labels, mask=held, other=0.0).to(DTYPE))
    return weights


@triton.jit
def upstream(by_loss_ptr, importance_ptr, by_pair_ptr, sample, batch, DTYPE: tl.constexpr):
    """What a pair's weights are multiplied by: the gradient of the batch's mean, of which the pair has its share, and
    that of the pair's own loss."""
    factor = tl.zeros([], DTYPE)
    if by_loss_ptr is not None:
        share = tl.load(by_loss_ptr).to(DTYPE) / batch.to(DTYPE)
        if importance_ptr is not None:
            share *= tl.load(importance_ptr + sample).to(DTYPE)
        factor += share
    if by_pair_ptr is not None:
        factor += tl.load(by_pair_ptr + sample).to(DTYPE)
    return factor


@triton.jit
def load_coefficients(coefficients_ptr, sample, DTYPE: tl.constexpr):
    """a, 1/s, c, d of one sample."""
    row = coefficients_ptr + sample * 4
    a, s = tl.load(row).to(DTYPE), tl.load(row + 1).to(DTYPE)
    return a, 1.0 / s, tl.load(row + 2).to(DTYPE), tl.load(row + 3).to(DTYPE)


@triton.jit
def tile_noise(
    noise_ptr, row, element, place, inside, clean, a, inverse_s, key,
    SOURCE: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The noise of a tile: read, regenerated from its key, or implied by a state of the path."""
    if SOURCE == "keyed":
        seed, sample_id, draw, stream = key
        noise = keyed_values(seed, sample_id, draw, stream, element, TILE, ALIGNED, False).to(DTYPE)
    else:
        noise = read(noise_ptr, row, element, place, inside, DTYPE, ALIGNED)
        if SOURCE == "path":
            noise = (noise - a * clean) * inverse_s
    return noise


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def sum_tiles_kernel(partial_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """One number a program: the fp64 sum of its row of partial sums."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        part = tl.load(partial_ptr + row * programs + start + place, mask=start + place < programs, other=0.0)
        total += part.to(tl.float64)
    tl.store(sums_ptr + row, tl.sum(total))
