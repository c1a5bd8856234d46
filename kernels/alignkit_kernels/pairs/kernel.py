"""`pair_region_errors` in Triton: both sides in one pass, shared noise read or regenerated once."""

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
    upstream,
    write,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def pair_region_errors_kernel(
    pred_w_ptr, pred_l_ptr, reference_w_ptr, reference_l_ptr, clean_w_ptr, clean_l_ptr,
    noise_w_ptr, noise_l_ptr, coefficients_ptr, labels_ptr, partial_ptr,
    pred_w_row, pred_l_row, reference_w_row, reference_l_row, clean_w_row, clean_l_row, noise_w_row, noise_l_row,
    batch, loop, split, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step, highest,
    SOURCE_W: tl.constexpr, SOURCE_L: tl.constexpr, SHARED: tl.constexpr,
    LABELS: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial count, error_w, error_l, gap_w, gap_l, cross to partial[6, batch, num_regions, programs]."""
    sample, start = locate(TILE)
    slab, begin, end = locate_part(loop, split)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, highest, LABELS, ALIGNED,
    )  # fmt: skip
    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)
    key_w = load_key(noise_w_ptr, sample * noise_w_row, SOURCE_W)
    if not SHARED:
        key_l = load_key(noise_l_ptr, sample * noise_l_row, SOURCE_L)

    error_w = tl.zeros([TILE], DTYPE)
    error_l = tl.zeros([TILE], DTYPE)
    gap_w = tl.zeros([TILE], DTYPE)
    gap_l = tl.zeros([TILE], DTYPE)
    cross = tl.zeros([TILE], DTYPE)
    for i in tl.range(begin, end, num_stages=STAGES):
        element = (slab * loop + i) * inner + start
        clean_w = read(clean_w_ptr, sample * clean_w_row, element, place, inside, DTYPE, ALIGNED)
        clean_l = read(clean_l_ptr, sample * clean_l_row, element, place, inside, DTYPE, ALIGNED)
        noise_w = tile_noise(
            noise_w_ptr, sample * noise_w_row, element, place, inside, clean_w, a, inverse_s, key_w,
            SOURCE_W, TILE, DTYPE, ALIGNED,
        )  # fmt: skip
        if SHARED:
            noise_l = noise_w
        else:
            noise_l = tile_noise(
                noise_l_ptr, sample * noise_l_row, element, place, inside, clean_l, a, inverse_s, key_l,
                SOURCE_L, TILE, DTYPE, ALIGNED,
            )  # fmt: skip
        target_w = c * noise_w + d * clean_w
        target_l = c * noise_l + d * clean_l
        pred_w = read(pred_w_ptr, sample * pred_w_row, element, place, inside, DTYPE, ALIGNED)
        pred_l = read(pred_l_ptr, sample * pred_l_row, element, place, inside, DTYPE, ALIGNED)
        error_w += (pred_w - target_w) * (pred_w - target_w)
        error_l += (pred_l - target_l) * (pred_l - target_l)
        cross += (pred_w - target_w) * (pred_l - target_l)
        if HAS_REFERENCE:
            ref_w = read(reference_w_ptr, sample * reference_w_row, element, place, inside, DTYPE, ALIGNED)
            ref_l = read(reference_l_ptr, sample * reference_l_row, element, place, inside, DTYPE, ALIGNED)
            gap_w += (pred_w - ref_w) * (pred_w + ref_w - 2 * target_w)
            gap_l += (pred_l - ref_l) * (pred_l + ref_l - 2 * target_l)

    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    quantity = batch * num_regions * programs
    for k in range(num_regions):
        held = labels == k
        partial = partial_ptr + (sample * num_regions + k) * programs + program
        tl.store(partial, (tl.sum(held.to(tl.int32)) * (end - begin)).to(DTYPE))
        tl.store(partial + quantity, tl.sum(tl.where(held, error_w, 0.0)))
        tl.store(partial + 2 * quantity, tl.sum(tl.where(held, error_l, 0.0)))
        tl.store(partial + 3 * quantity, tl.sum(tl.where(held, gap_w, 0.0)))
        tl.store(partial + 4 * quantity, tl.sum(tl.where(held, gap_l, 0.0)))
        tl.store(partial + 5 * quantity, tl.sum(tl.where(held, cross, 0.0)))


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def pair_region_errors_backward_kernel(
    weights_ptr, by_loss_ptr, importance_ptr, by_pair_ptr, pred_w_ptr, pred_l_ptr, clean_w_ptr, clean_l_ptr,
    noise_w_ptr, noise_l_ptr, coefficients_ptr, labels_ptr, dpred_w_ptr, dpred_l_ptr,
    pred_w_row, pred_l_row, clean_w_row, clean_l_row, noise_w_row, noise_l_row, dpred_row,
    batch, loop, split, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step, highest,
    SOURCE_W: tl.constexpr, SOURCE_L: tl.constexpr, SHARED: tl.constexpr, LABELS: tl.constexpr,
    GRADS: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dpred of each side: weight[region] * (its residual) + weight_cross[region] * (the other's residual).

    GRADS: from the gradients [6, batch, num_regions] of the sums, 2 * (of error + of gap) and of cross. Else from
    weights [2, batch, num_regions] of winner and loser alone, times what the pair's loss is multiplied by further on.
    """
    sample, start = locate(TILE)
    slab, begin, end = locate_part(loop, split)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, highest, LABELS, ALIGNED,
    )  # fmt: skip
    held = (labels >= 0) & (labels < num_regions)
    row, quantity = sample * num_regions, batch * num_regions
    if GRADS:
        error, gap = row + quantity, row + 3 * quantity
        weight_w = by_label(weights_ptr, error, gap, labels, held, num_regions, DTYPE, True)
        error, gap = error + quantity, gap + quantity
        weight_l = by_label(weights_ptr, error, gap, labels, held, num_regions, DTYPE, True)
        cross = row + 5 * quantity
        weight_cross = by_label(weights_ptr, cross, cross, labels, held, num_regions, DTYPE, False)
    else:
        factor = upstream(by_loss_ptr, importance_ptr, by_pair_ptr, sample, batch, DTYPE)
        weight_w = factor * by_label(weights_ptr, row, row, labels, held, num_regions, DTYPE, False)
        row += quantity
        weight_l = factor * by_label(weights_ptr, row, row, labels, held, num_regions, DTYPE, False)
    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)
    key_w = load_key(noise_w_ptr, sample * noise_w_row, SOURCE_W)
    if not SHARED:
        key_l = load_key(noise_l_ptr, sample * noise_l_row, SOURCE_L)

    for i in tl.range(begin, end, num_stages=STAGES):
        element = (slab * loop + i) * inner + start
        clean_w = read(clean_w_ptr, sample * clean_w_row, element, place, inside, DTYPE, ALIGNED)
        clean_l = read(clean_l_ptr, sample * clean_l_row, element, place, inside, DTYPE, ALIGNED)
        noise_w = tile_noise(
            noise_w_ptr, sample * noise_w_row, element, place, inside, clean_w, a, inverse_s, key_w,
            SOURCE_W, TILE, DTYPE, ALIGNED,
        )  # fmt: skip
        if SHARED:
            noise_l = noise_w
        else:
            noise_l = tile_noise(
                noise_l_ptr, sample * noise_l_row, element, place, inside, clean_l, a, inverse_s, key_l,
                SOURCE_L, TILE, DTYPE, ALIGNED,
            )  # fmt: skip
        pred_w = read(pred_w_ptr, sample * pred_w_row, element, place, inside, DTYPE, ALIGNED)
        pred_l = read(pred_l_ptr, sample * pred_l_row, element, place, inside, DTYPE, ALIGNED)
        residual_w = pred_w - (c * noise_w + d * clean_w)
        residual_l = pred_l - (c * noise_l + d * clean_l)
        dpred_w, dpred_l = weight_w * residual_w, weight_l * residual_l
        if GRADS:
            dpred_w += weight_cross * residual_l
            dpred_l += weight_cross * residual_w
        dpred_w, dpred_l = tl.where(held, dpred_w, 0.0), tl.where(held, dpred_l, 0.0)
        out_row = sample * dpred_row
        write(dpred_w_ptr, out_row, element, place, inside, dpred_w, ALIGNED)
        write(dpred_l_ptr, out_row, element, place, inside, dpred_l, ALIGNED)
