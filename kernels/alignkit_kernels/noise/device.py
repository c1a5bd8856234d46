"""Keyed noise as device functions: the counter contract of `philox`, regenerated in registers where needed."""

import triton
import triton.language as tl

ROUND_A, ROUND_B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_A, KEY_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
UNIFORM_SCALE = tl.constexpr(4.6566127342e-10)
SMALLEST_UNIFORM = tl.constexpr(1.0e-7)


@triton.jit
def load_key(keys_ptr, row, SOURCE: tl.constexpr):
    """Seed, sample id, draw and stream from one sample's row; zeros where the noise is not keyed."""
    if SOURCE == "keyed":
        row = keys_ptr + row
        seed = tl.load(row)
        return seed, tl.load(row + 1).to(tl.uint32), tl.load(row + 2).to(tl.uint32), tl.load(row + 3).to(tl.uint32)
    else:
        return 0, 0, 0, 0


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four words of each counter. One 64-bit product a word pair: triton.language.philox multiplies twice, for the high
    word and for the low one."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * ROUND_A, c2.to(tl.uint64) * ROUND_B
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 += KEY_A
        k1 += KEY_B
    return c0, c1, c2, c3


@triton.jit
def folded_uniform(word):
    """triton.language.rand's mapping of a word to fp32 in [0, 1)."""
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * UNIFORM_SCALE


@triton.jit
def circle(turns):
    """cos and sin of 2 pi turns, fp32, turns in [0, 1).

    The angle is reduced to an eighth of a turn exactly, in turns, before pi enters: tl.cos would reduce it
    through local memory and lose the accuracy near zeros. Then Cephes' polynomials, good to an ulp.
    """
    quarters = tl.floor(4.0 * turns + 0.5)
    x = (4.0 * turns - quarters) * 1.5707963267948966
    z = x * x
    sine = tl.fma(tl.fma(tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1) * z, x, x)
    cosine = tl.fma(
        tl.fma(tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2),
        z * z,
        tl.fma(z, -0.5, 1.0),
    )
    quadrant = quarters.to(tl.int32)
    swapped = quadrant & 1 == 1
    along, across = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where((quadrant + 1) & 2 == 2, -along, along), tl.where(quadrant & 2 == 2, -across, across)


@triton.jit
def normal_pair(first, second):
    """Box-Muller of two words."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(folded_uniform(first), SMALLEST_UNIFORM)))
    cosine, sine = circle(folded_uniform(second))
    return radius * cosine, radius * sine


@triton.jit
def top_bits(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def adjacent(a, b, c, d):
    """Four values of each counter, side by side."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def keyed_values(seed, sample, draw, stream, start, TILE: tl.constexpr, ALIGNED: tl.constexpr, UNIFORM: tl.constexpr):
    """Noise of elements start ... start + TILE - 1 of a sample. Aligned: start is a multiple of 4."""
    if ALIGNED:
        counter = (start // 4).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)
        a, b, c, d = philox(seed, counter, sample, draw, stream)
        if UNIFORM:
            values = adjacent(top_bits(a), top_bits(b), top_bits(c), top_bits(d))
        else:
            n0, n1 = normal_pair(a, b)
            n2, n3 = normal_pair(c, d)
            values = adjacent(n0, n1, n2, n3)
    else:
        values = keyed_at(seed, sample, draw, stream, start + tl.arange(0, TILE), UNIFORM)
    return values


@triton.jit
def keyed_at(seed, sample, draw, stream, element, UNIFORM: tl.constexpr):
    """Noise of any elements of a sample, each by a counter of its own."""
    a, b, c, d = philox(seed, (element // 4).to(tl.uint32), sample, draw, stream)
    late, odd = element & 2 == 2, element & 1 == 1
    first, second = tl.where(late, c, a), tl.where(late, d, b)
    if UNIFORM:
        values = top_bits(tl.where(odd, second, first))
    else:
        cosine, sine = normal_pair(first, second)
        values = tl.where(odd, sine, cosine)
    return values
