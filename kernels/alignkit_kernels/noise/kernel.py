"""Kernels that write noise, or latents with noise added."""

import triton
import triton.language as tl

from ..tiles import POINTERS, RUNTIME_INTEGERS, load_coefficients, locate, places, read, tile_noise, write
from .device import keyed_at, keyed_values, load_key


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def keyed_kernel(
    out_ptr, keys_ptr, elements, UNIFORM: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Normals, or uniforms, of contiguous samples."""
    sample, start = locate(TILE)
    seed, sample_id, draw, stream = load_key(keys_ptr, sample * 4, "keyed")
    values = keyed_values(seed, sample_id, draw, stream, start, TILE, ALIGNED, UNIFORM)
    place, inside = places(elements, start, TILE, ALIGNED)
    write(out_ptr, sample * elements, start, place, inside, values, ALIGNED)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def keyed_part_kernel(out_ptr, keys_ptr, elements, row, before, gap, TILE: tl.constexpr):
    """Normals of parts of samples: `before` elements of the whole come first, and `gap` lie between rows of `row`."""
    sample, start = locate(TILE)
    seed, sample_id, draw, stream = load_key(keys_ptr, sample * 4, "keyed")
    place, inside = places(elements, start, TILE, False)
    element = start + place
    values = keyed_at(seed, sample_id, draw, stream, element + before + element // row * gap, False)
    write(out_ptr, sample * elements, start, place, inside, values, False)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)
def add_noise_kernel(
    clean_ptr, noise_ptr, coefficients_ptr, out_ptr, clean_row, noise_row, elements,
    SOURCE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = a * clean + s * noise."""
    sample, start = locate(TILE)
    place, inside = places(elements, start, TILE, ALIGNED)
    a, inverse_s, _, _ = load_coefficients(coefficients_ptr, sample, DTYPE)
    s = tl.load(coefficients_ptr + sample * 4 + 1).to(DTYPE)
    key = load_key(noise_ptr, sample * noise_row, SOURCE)
    clean = read(clean_ptr, sample * clean_row, start, place, inside, DTYPE, ALIGNED)
    noise = tile_noise(
        noise_ptr, sample * noise_row, start, place, inside, clean, a, inverse_s, key, SOURCE, TILE, DTYPE, ALIGNED
    )
    write(out_ptr, sample * elements, start, place, inside, a * clean + s * noise, ALIGNED)
