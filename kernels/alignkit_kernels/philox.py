"""The counter contract: which random words belong to which element, in plain torch.

Philox4x32-10 (Salmon et al., SC 2011) with

    key     = the 64-bit seed, low word first
    counter = (element index // 4 within the sample, sample id, draw, stream)

Word j of a counter belongs to element 4 * c0 + j. Nothing else enters: not the batch, the rank, the step, or
the block size of a kernel. The Triton kernels compute the same words; integers agree bit for bit.

Words are uint32 values held in int64 tensors, because torch has no full set of uint32 operations.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# The largest fp32 that keeps (2**31 - 1) * scale below 1 after rounding; triton.language.rand uses the same.
UNIFORM_SCALE = 4.6566127342e-10
SMALLEST_UNIFORM = 1.0e-7  # bounds the logarithm: normals stay within 5.68


def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product (int64 wraps, its bits stay right)."""
    product = a * b
    return (product >> 32).bitwise_and_(WORD), product.bitwise_and_(WORD)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Four words for each counter. Arguments are int64 tensors that broadcast; `seed` may be negative."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high_a, low_a = multiply(ROUND_A, c0)
        high_b, low_b = multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return c0, c1, c2, c3


def sample_words(elements: int, keys: Tensor, first: int = 0) -> Tensor:
    """Words of `elements` elements of every sample, from element 4 * first on, [B, elements rounded up to a multiple
    of 4].

    keys: int64 [B, 4], rows (seed, sample id, draw, stream).
    """
    counter = torch.arange(first, first - (-elements // 4), device=keys.device)
    seed, sample, draw, stream = keys.unsqueeze(-1).unbind(1)
    return torch.stack(philox(seed, counter, sample & WORD, draw & WORD, stream & WORD), dim=-1).flatten(1)


def uniforms(words: Tensor) -> Tensor:
    """[0, 1) in fp32, the top 24 bits of each word: exact, and never 1."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def normals(words: Tensor) -> Tensor:
    """Standard normals in fp32 by Box-Muller, with the mapping of triton.language.randn4x.

    The words' last axis is a multiple of 4 long; words (0, 1) make normals (0, 1) and words (2, 3) normals
    (2, 3). The uniforms are fp32, as on the GPU; what follows is fp64 rounded once, so these are the values
    that a kernel's fp32 arithmetic is measured against.
    """
    folded = torch.minimum(words, WORD - words).to(torch.float32) * UNIFORM_SCALE
    u, angle = folded.to(torch.float64).unflatten(-1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u.clamp(min=SMALLEST_UNIFORM)))
    turn = 2.0 * torch.pi * angle
    pair = torch.stack((radius * torch.cos(turn), radius * torch.sin(turn)), dim=-1)
    return pair.flatten(-2).to(torch.float32)
