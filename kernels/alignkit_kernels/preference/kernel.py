"""The head of a preference loss in Triton: from sums by region to the loss, every number of a pair, and what the
backward kernel multiplies residuals with. One program; lanes are pairs. `reference.py` beside this says the same in
torch."""

import triton
import triton.language as tl

RUNTIME_INTEGERS = "batch", "num_regions", "elements"
# fp64 as the integers of its bits: triton passes a Python float as fp32
SETTINGS = (
    "beta", "low", "high", "weight_region", "weight_global", "weight_sft", "weight_region_sft", "shape", "guard", "mu"
)  # fmt: skip
POINTERS = (
    "sums_ptr", "reference_w_ptr", "reference_l_ptr", "beta_ptr", "strength_ptr", "importance_ptr", "guard_ptr",
    "preference_ptr", "loss_ptr", "per_pair_ptr", "numbers_ptr", "weights_ptr",
)  # fmt: skip


@triton.jit
def as_double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), its relative error that of the arithmetic where the result is small too."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    rest = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + rest


# Each head that is a function of one logit: its loss and the loss's slope.


@triton.jit
def dpo(z, smoothing):
    loss = (1.0 - smoothing) * softplus(-z) + smoothing * softplus(z)
    return loss, smoothing * sigmoid(z) - (1.0 - smoothing) * sigmoid(-z)


@triton.jit
def robust_dpo(z, smoothing):
    loss = (1.0 - smoothing) * softplus(-z) - smoothing * softplus(z)
    slope = -(1.0 - smoothing) * sigmoid(-z) - smoothing * sigmoid(z)
    return loss / (1.0 - 2.0 * smoothing), slope / (1.0 - 2.0 * smoothing)


@triton.jit
def ipo(z):
    return (z - 0.5) * (z - 0.5), 2.0 * (z - 0.5)


@triton.jit
def hinge(z):
    return tl.maximum(1.0 - z, 0.0), tl.where(z < 1.0, -1.0, 0.0)


@triton.jit
def poly_dpo(z, alpha):
    return softplus(-z) + alpha * sigmoid(-z), -sigmoid(-z) * (1.0 + alpha * sigmoid(z))


@triton.jit
def winner_guarded(z, guard):
    """log(1 + exp(-z) + exp(guard)), and its slopes by z and by the guard."""
    top = tl.maximum(tl.maximum(-z, guard), 0.0)
    one, by_z, by_guard = tl.exp(-top), tl.exp(-z - top), tl.exp(guard - top)
    total = one + by_z + by_guard
    return top + tl.log(total), -by_z / total, by_guard / total


@triton.jit
def sum_of(sums_ptr, quantity, pair, k, batch, num_regions, inside):
    return tl.load(sums_ptr + (quantity * batch + pair) * num_regions + k, mask=inside, other=0.0)


@triton.jit
def region_sums(sums_ptr, reference_w_ptr, reference_l_ptr, pair, k, batch, num_regions, inside):
    """count, error_w, error_l, gap_w, gap_l of region k; gaps from the reference's stored errors where it has them."""
    count = sum_of(sums_ptr, 0, pair, k, batch, num_regions, inside)
    error_w = sum_of(sums_ptr, 1, pair, k, batch, num_regions, inside)
    error_l = sum_of(sums_ptr, 2, pair, k, batch, num_regions, inside)
    if reference_w_ptr is not None:
        gap_w = error_w - tl.load(reference_w_ptr + pair * num_regions + k, mask=inside, other=0.0)
        gap_l = error_l - tl.load(reference_l_ptr + pair * num_regions + k, mask=inside, other=0.0)
    else:
        gap_w = sum_of(sums_ptr, 3, pair, k, batch, num_regions, inside)
        gap_l = sum_of(sums_ptr, 4, pair, k, batch, num_regions, inside)
    return count, error_w, error_l, gap_w, gap_l


@triton.jit
def slopes(
    k, count, gap_w, gap_l, by_error, by_region_error, by_gap, by_region_gap, share, scale, shape, num_regions,
    preference_ptr, pair, inside, HEAD: tl.constexpr,
):  # fmt: skip
    """The loss's slopes by the sums error_w and gap_w of region k; that by its gap_l is minus the second."""
    inside_mask = (k == 1) & (num_regions == 2)
    error = by_error + tl.where(inside_mask, by_region_error, 0.0)
    if HEAD == "region_dpo":
        per_gap = scale / tl.maximum(count, 1.0)
        _, slope = dpo(per_gap * (gap_w - gap_l), shape)
        gap = tl.where(count > 0, slope * per_gap * share, 0.0)
    elif HEAD == "segment_dpo":
        gap = by_gap * tl.load(preference_ptr + pair * num_regions + k, mask=inside, other=0).to(tl.float64)
    else:
        gap = by_gap + tl.where(inside_mask, by_region_gap, 0.0)
    return error, gap


@triton.jit(do_not_specialize=RUNTIME_INTEGERS + SETTINGS, do_not_specialize_on_alignment=POINTERS)
def preference_head_kernel(
    sums_ptr, reference_w_ptr, reference_l_ptr, beta_ptr, strength_ptr, importance_ptr, guard_ptr, preference_ptr,
    loss_ptr, per_pair_ptr, numbers_ptr, weights_ptr, batch, num_regions, elements,
    beta: tl.int64, low: tl.int64, high: tl.int64, weight_region: tl.int64, weight_global: tl.int64,
    weight_sft: tl.int64, weight_region_sft: tl.int64, shape: tl.int64, guard: tl.int64, mu: tl.int64,
    HEAD: tl.constexpr, SAFEGUARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss, per_pair [B] and numbers [12, B] (`reference.NUMBERS`) in fp64, and the weights [2, B, R] of the winner's
    and the loser's residuals."""
    beta_now = as_double(beta)
    if beta_ptr is not None:
        beta_now = tl.load(beta_ptr).to(tl.float64)
    low, high, shape = as_double(low), as_double(high), as_double(shape)
    region_weight, global_weight = as_double(weight_region), as_double(weight_global)
    sft_weight, region_sft_weight = as_double(weight_sft), as_double(weight_region_sft)
    scale = -0.5 * beta_now
    size = elements.to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, batch, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < batch
        pair = pair.to(tl.int64)
        count = tl.zeros([BLOCK], tl.float64)
        error_w, error_l, gap_w, gap_l, held = count, count, count, count, count
        region_error_w, region_gap_w, region_gap_l = count, count, count
        labelled, preferred, regions_held, region_loss = count, count, count, count
        for k in range(num_regions):
            n, ew, el, gw, gl = region_sums(
                sums_ptr, reference_w_ptr, reference_l_ptr, pair, k, batch, num_regions, inside
            )
            count, error_w, error_l, gap_w, gap_l = count + n, error_w + ew, error_l + el, gap_w + gw, gap_l + gl
            if (k == 1) & (num_regions == 2):
                held, region_error_w, region_gap_w, region_gap_l = n, ew, gw, gl
            if HEAD == "region_dpo":
                found, _ = dpo(scale / tl.maximum(n, 1.0) * (gw - gl), shape)
                region_loss += tl.where(n > 0, found, 0.0)
                regions_held += tl.where(n > 0, 1.0, 0.0)
            if HEAD == "segment_dpo":
                sign = tl.load(preference_ptr + pair * num_regions + k, mask=inside, other=0).to(tl.float64)
                labelled += tl.abs(sign) * n
                preferred += sign * (gw - gl)

        some, some_held = tl.maximum(count, 1.0), tl.maximum(held, 1.0)
        all_held = some
        error_w, error_l, gap_w, gap_l = error_w / some, error_l / some, gap_w / some, gap_l / some
        region_error_w, region_gap_w = region_error_w / some_held, region_gap_w / some_held
        region_gap_l = region_gap_l / some_held
        factor = tl.full([BLOCK], 1.0, tl.float64)
        if strength_ptr is not None:
            alpha = tl.load(strength_ptr + pair, mask=inside, other=0.0).to(tl.float64)
            eta = tl.where(high > low, (alpha - low) / tl.where(high > low, high - low, 1.0), 0.0)
            factor += tl.minimum(tl.maximum(eta, 0.0), 1.0)
        z = scale * (gap_w - gap_l)
        z_region = scale * (region_gap_w - region_gap_l)

        by_error, by_gap, by_region_gap = tl.zeros_like(count), tl.zeros_like(count), tl.zeros_like(count)
        share = by_error
        if HEAD == "local_dpo":
            whole, by_gap = dpo(z, 0.0)
            z_region = factor * z_region
            region, by_region_gap = dpo(z_region, 0.0)
            loss = global_weight * whole + tl.where(held > 0, region_weight * region, 0.0)
            by_gap = global_weight * by_gap
            by_region_gap = tl.where(held > 0, region_weight * factor * by_region_gap, 0.0)
        elif HEAD == "dpo":
            loss, by_gap = dpo(z, shape)
        elif HEAD == "robust_dpo":
            loss, by_gap = robust_dpo(z, shape)
        elif HEAD == "ipo":
            loss, by_gap = ipo(z)
        elif HEAD == "hinge":
            loss, by_gap = hinge(z)
        elif HEAD == "poly_dpo":
            loss, by_gap = poly_dpo(z, shape)
        elif HEAD == "winner_guarded":
            if guard_ptr is not None:
                slope = tl.load(guard_ptr + pair, mask=inside, other=0.0).to(tl.float64)
            else:
                slope = tl.zeros_like(count) + as_double(guard)
            slope = -scale * slope
            loss, by_gap, by_error = winner_guarded(z, slope * error_w)
            by_error = slope * by_error
        elif HEAD == "region_dpo":
            share = 1.0 / tl.maximum(regions_held, 1.0)
            loss = region_loss * share
        elif HEAD == "segment_dpo":
            some = tl.where(labelled > 0, labelled, 1.0)  # the elements of labelled segments alone
            loss, by_gap = dpo(scale * preferred / some, 0.0)
            loss, by_gap = tl.where(labelled > 0, loss, 0.0), tl.where(labelled > 0, by_gap, 0.0)
        else:
            tl.static_assert(HEAD == "sft")
            loss = error_w
            by_error += 1.0
        loss += sft_weight * error_w + region_sft_weight * factor * region_error_w
        by_error, by_region_error = (by_error + sft_weight) / all_held, region_sft_weight * factor / some_held
        by_gap, by_region_gap = by_gap * scale / some, by_region_gap * scale / some_held

        kept = tl.full([BLOCK], 1.0, tl.float64)
        if SAFEGUARD:
            own, shared = tl.zeros_like(count), tl.zeros_like(count)
            for k in range(num_regions):
                n, ew, el, gw, gl = region_sums(
                    sums_ptr, reference_w_ptr, reference_l_ptr, pair, k, batch, num_regions, inside
                )
                by_e, by_g = slopes(
                    k, n, gw, gl, by_error, by_region_error, by_gap, by_region_gap, share, scale, shape,
                    num_regions, preference_ptr, pair, inside, HEAD,
                )  # fmt: skip
                own += tl.maximum(by_e + by_g, 0.0) * ew
                shared += tl.maximum(by_g, 0.0) * sum_of(sums_ptr, 5, pair, k, batch, num_regions, inside)
            ratio = (1.0 - as_double(mu)) * own / tl.where(shared > 0, shared, 1.0)
            kept = tl.where(shared > 0, tl.minimum(tl.maximum(ratio, 0.0), 1.0), 1.0)
        for k in range(num_regions):
            n, ew, el, gw, gl = region_sums(
                sums_ptr, reference_w_ptr, reference_l_ptr, pair, k, batch, num_regions, inside
            )
            by_e, by_g = slopes(
                k, n, gw, gl, by_error, by_region_error, by_gap, by_region_gap, share, scale, shape,
                num_regions, preference_ptr, pair, inside, HEAD,
            )  # fmt: skip
            at = weights_ptr + pair * num_regions + k
            tl.store(at, (2.0 * (by_e + by_g)).to(weights_ptr.dtype.element_ty), mask=inside)
            at += batch * num_regions
            tl.store(at, (-2.0 * kept * by_g).to(weights_ptr.dtype.element_ty), mask=inside)

        tl.store(per_pair_ptr + pair, loss, mask=inside)
        row = numbers_ptr + pair
        tl.store(row, z_region, mask=inside)
        tl.store(row + batch, z, mask=inside)
        tl.store(row + 2 * batch, error_w, mask=inside)
        tl.store(row + 3 * batch, error_l, mask=inside)
        tl.store(row + 4 * batch, gap_w, mask=inside)
        tl.store(row + 5 * batch, gap_l, mask=inside)
        tl.store(row + 6 * batch, region_error_w, mask=inside)
        tl.store(row + 7 * batch, region_gap_w, mask=inside)
        tl.store(row + 8 * batch, region_gap_l, mask=inside)
        tl.store(row + 9 * batch, held, mask=inside)
        tl.store(row + 10 * batch, kept, mask=inside)
        tl.store(row + 11 * batch, size - count, mask=inside)
        if importance_ptr is not None:
            loss = loss * tl.load(importance_ptr + pair, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, loss, 0.0)
    tl.store(loss_ptr, tl.sum(total) / batch.to(tl.float64))
