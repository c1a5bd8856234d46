"""`region_errors` in Triton: every input read once, noise regenerated in registers."""

import triton
import triton.language as tl

from ..noise.device import load_key
from ..tiles import (
    POINTERS,
    RUNTIME_INTEGERS,
    by_label,
    load_coefficients,
    locate,
    locate_part,
    places,
    read,
    tile_labels,
    tile_noise,
    write,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def region_errors_kernel(
    pred_ptr, reference_ptr, clean_ptr, noise_ptr, coefficients_ptr, labels_ptr, partial_ptr,
    pred_row, reference_row, clean_row, noise_row,
    batch, loop, split, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step, highest,
    SOURCE: tl.constexpr, LABELS: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial count, error and gap of one tile by region, to partial[3, batch, num_regions, programs]."""
    sample, start = locate(TILE)
    slab, begin, end = locate_part(loop, split)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, highest, LABELS, ALIGNED,
    )  # fmt: skip
    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)
    key = load_key(noise_ptr, sample * noise_row, SOURCE)

    error = tl.zeros([TILE], DTYPE)
    gap = tl.zeros([TILE], DTYPE)
    for i in tl.range(begin, end, num_stages=STAGES):
        element = (slab * loop + i) * inner + start
        clean = read(clean_ptr, sample * clean_row, element, place, inside, DTYPE, ALIGNED)
        noise = tile_noise(
            noise_ptr, sample * noise_row, element, place, inside, clean, a, inverse_s, key,
            SOURCE, TILE, DTYPE, ALIGNED,
        )  # fmt: skip
        target = c * noise + d * clean
        pred = read(pred_ptr, sample * pred_row, element, place, inside, DTYPE, ALIGNED)
        error += (pred - target) * (pred - target)
        if HAS_REFERENCE:
            reference = read(reference_ptr, sample * reference_row, element, place, inside, DTYPE, ALIGNED)
            gap += (pred - reference) * (pred + reference - 2 * target)

    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    quantity = batch * num_regions * programs
    for k in range(num_regions):
        held = labels == k
        partial = partial_ptr + (sample * num_regions + k) * programs + program
        tl.store(partial, (tl.sum(held.to(tl.int32)) * (end - begin)).to(DTYPE))
        tl.store(partial + quantity, tl.sum(tl.where(held, error, 0.0)))
        tl.store(partial + 2 * quantity, tl.sum(tl.where(held, gap, 0.0)))


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def region_errors_backward_kernel(
    grad_ptr, pred_ptr, clean_ptr, noise_ptr, coefficients_ptr, labels_ptr, dpred_ptr,
    pred_row, clean_row, noise_row, dpred_row,
    batch, loop, split, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step, highest,
    SOURCE: tl.constexpr, LABELS: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dpred = 2 * (grad of error + grad of gap)[region] * (pred - target), from grad[3, batch, num_regions]."""
    sample, start = locate(TILE)
    slab, begin, end = locate_part(loop, split)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, highest, LABELS, ALIGNED,
    )  # fmt: skip
    held = (labels >= 0) & (labels < num_regions)
    by_error = (batch + sample) * num_regions
    weight = by_label(grad_ptr, by_error, by_error + batch * num_regions, labels, held, num_regions, DTYPE, True)
    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)
    key = load_key(noise_ptr, sample * noise_row, SOURCE)

    for i in tl.range(begin, end, num_stages=STAGES):
        element = (slab * loop + i) * inner + start
        clean = read(clean_ptr, sample * clean_row, element, place, inside, DTYPE, ALIGNED)
        noise = tile_noise(
            noise_ptr, sample * noise_row, element, place, inside, clean, a, inverse_s, key,
            SOURCE, TILE, DTYPE, ALIGNED,
        )  # fmt: skip
        pred = read(pred_ptr, sample * pred_row, element, place, inside, DTYPE, ALIGNED)
        dpred = tl.where(held, weight * (pred - (c * noise + d * clean)), 0.0)
        write(dpred_ptr, sample * dpred_row, element, place, inside, dpred, ALIGNED)
