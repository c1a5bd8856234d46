"""The counter contract: words against Random123, normals against an independent Box-Muller."""

import math

import numpy as np
import pytest
import torch

from alignkit_kernels import NoiseKey, Stream, dispatch, keyed_rand, keyed_randn
from alignkit_kernels.philox import philox, uniforms

if dispatch.HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def words_kernel(seed_ptr, counter_ptr, out_ptr):
        c0 = tl.load(counter_ptr).to(tl.uint32) + tl.zeros([1], tl.uint32)
        c1, c2, c3 = (
            tl.load(counter_ptr + 1).to(tl.uint32),
            tl.load(counter_ptr + 2).to(tl.uint32),
            tl.load(counter_ptr + 3).to(tl.uint32),
        )
        a, b, c, d = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
        place = tl.arange(0, 1)
        tl.store(out_ptr + place, a.to(tl.int64))
        tl.store(out_ptr + 1 + place, b.to(tl.int64))
        tl.store(out_ptr + 2 + place, c.to(tl.int64))
        tl.store(out_ptr + 3 + place, d.to(tl.int64))


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


pytestmark = pytest.mark.usefixtures("path")


def words_of(counter: list[int], seed: int) -> list[int]:
    signed = (seed + 2**63) % 2**64 - 2**63
    columns = [torch.tensor([c]) for c in counter]
    return [int(w) for w in philox(torch.tensor([signed]), *columns)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_are_random123s(path, device, counter, key, expected):
    seed = key[0] | key[1] << 32
    assert words_of(counter, seed) == expected
    if path == "triton":  # the generator that the kernels call, with all 64 bits of a seed
        got = torch.zeros(4, dtype=torch.int64, device=device)
        signed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)
        words_kernel[(1,)](signed, torch.tensor(counter, device=device), got)
        assert got.tolist() == expected


def test_normals_follow_the_contract_element_by_element(device):
    """Element i of sample b at draw d uses counter (i // 4, id, d, stream), words 0 1 and 2 3 in pairs."""
    seed, ids, draw, stream = 0xFEDCBA9876543210, [5, 2**32 - 1], 9, Stream.CORRUPTION
    got = keyed_randn((2, 3, 7), NoiseKey(seed, torch.tensor(ids, device=device), draw, stream))
    for b, sample in enumerate(ids):
        for i in range(21):
            words = words_of([i // 4, sample, draw, stream], seed)
            u, v = (
                float(np.float32(min(w, 0xFFFFFFFF - w)) * np.float32(4.6566127342e-10))
                for w in words[i % 4 // 2 * 2 :][:2]
            )
            radius = math.sqrt(-2 * math.log(max(u, 1e-7)))
            expected = radius * (math.cos, math.sin)[i % 2](2 * math.pi * v)
            assert float(got[b].flatten()[i]) == pytest.approx(expected, rel=4 * 2**-23, abs=1e-30)


def test_uniforms_are_the_top_bits_of_the_same_words(device):
    seed, sample, draw = 11, 4, 1
    got = keyed_rand((1, 6), NoiseKey(seed, torch.tensor([sample], device=device), draw, Stream.TIMESTEP))[0]
    expected = [words_of([i // 4, sample, draw, Stream.TIMESTEP], seed)[i % 4] >> 8 for i in range(6)]
    assert got.tolist() == [w / 2**24 for w in expected]


def test_uniforms_never_reach_one():
    assert float(uniforms(torch.tensor([0xFFFFFFFF]))) == 1 - 2**-24
    assert float(uniforms(torch.tensor([0]))) == 0.0
