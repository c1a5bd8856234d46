"""`pair_region_errors` in Triton: both sides in one pass, shared noise read or regenerated once."""

import triton
import triton.language as tl

from ..noise.device import load_key
from ..tiles import (
    POINTERS,
    RUNTIME_INTEGERS,
    load_coefficients,
    locate,
    places,
    read,
    tile_labels,
    tile_noise,
    write,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def pair_region_errors_kernel(
    pred_w_ptr, pred_l_ptr, reference_w_ptr, reference_l_ptr, clean_w_ptr, clean_l_ptr,
    noise_w_ptr, noise_l_ptr, coefficients_ptr, labels_ptr, partial_ptr,
    pred_w_row, pred_l_row, reference_w_row, reference_l_row, clean_w_row, clean_l_row, noise_w_row, noise_l_row,
    batch, slabs, loop, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step,
    SOURCE_W: tl.constexpr, SOURCE_L: tl.constexpr, SHARED: tl.constexpr,
    LABELS: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Partial count, error_w, error_l, gap_w, gap_l, cross to partial[6, batch, num_regions, tiles]."""
    sample, slab, start = locate(slabs, inner, TILE)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, LABELS, ALIGNED,
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
    for i in tl.range(0, loop, loop_unroll_factor=UNROLL):
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

    tiles = slabs * tl.cdiv(inner, TILE)
    quantity = batch.to(tl.int64) * num_regions * tiles
    for k in range(num_regions):
        held = labels == k
        partial = partial_ptr + (sample * num_regions + k) * tiles + slab * tl.cdiv(inner, TILE) + start // TILE
        tl.store(partial, (tl.sum(held.to(tl.int32)) * loop).to(DTYPE))
        tl.store(partial + quantity, tl.sum(tl.where(held, error_w, 0.0)))
        tl.store(partial + 2 * quantity, tl.sum(tl.where(held, error_l, 0.0)))
        tl.store(partial + 3 * quantity, tl.sum(tl.where(held, gap_w, 0.0)))
        tl.store(partial + 4 * quantity, tl.sum(tl.where(held, gap_l, 0.0)))
        tl.store(partial + 5 * quantity, tl.sum(tl.where(held, cross, 0.0)))


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def pair_region_errors_backward_kernel(
    grad_ptr, pred_w_ptr, pred_l_ptr, clean_w_ptr, clean_l_ptr, noise_w_ptr, noise_l_ptr,
    coefficients_ptr, labels_ptr, dpred_w_ptr, dpred_l_ptr,
    pred_w_row, pred_l_row, clean_w_row, clean_l_row, noise_w_row, noise_l_row,
    batch, slabs, loop, inner, num_regions,
    label_batch, label_slab, plane, line, step_plane, step_line, step,
    SOURCE_W: tl.constexpr, SOURCE_L: tl.constexpr, SHARED: tl.constexpr, LABELS: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dpred of each side: 2 * g[region] * (its residual) + g_cross[region] * (the other's residual)."""
    sample, slab, start = locate(slabs, inner, TILE)
    place, inside = places(inner, start, TILE, ALIGNED)
    labels = tile_labels(
        labels_ptr, sample, slab, start, place, inside,
        label_batch, label_slab, plane, line, step_plane, step_line, step, LABELS, ALIGNED,
    )  # fmt: skip
    held = (labels >= 0) & (labels < num_regions)
    quantity = batch * num_regions
    grads = grad_ptr + sample * num_regions + labels
    by_error_w = tl.load(grads + quantity, mask=held, other=0.0)
    by_error_l = tl.load(grads + 2 * quantity, mask=held, other=0.0)
    by_gap_w = tl.load(grads + 3 * quantity, mask=held, other=0.0)
    by_gap_l = tl.load(grads + 4 * quantity, mask=held, other=0.0)
    weight_w = (2 * (by_error_w + by_gap_w)).to(DTYPE)
    weight_l = (2 * (by_error_l + by_gap_l)).to(DTYPE)
    weight_cross = tl.load(grads + 5 * quantity, mask=held, other=0.0).to(DTYPE)
    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)
    key_w = load_key(noise_w_ptr, sample * noise_w_row, SOURCE_W)
    if not SHARED:
        key_l = load_key(noise_l_ptr, sample * noise_l_row, SOURCE_L)

    for i in tl.range(0, loop, loop_unroll_factor=UNROLL):
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
        dpred_w = tl.where(held, weight_w * residual_w + weight_cross * residual_l, 0.0)
        dpred_l = tl.where(held, weight_l * residual_l + weight_cross * residual_w, 0.0)
        out_row = sample * slabs * loop * inner
        write(dpred_w_ptr, out_row, element, place, inside, dpred_w, ALIGNED)
        write(dpred_l_ptr, out_row, element, place, inside, dpred_l, ALIGNED)
