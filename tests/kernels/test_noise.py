"""Keyed noise: independent of everything but its key, independent between keys, and normal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from alignkit_kernels import NoiseKey, PathState, Stream, add_keyed_noise, keyed_rand, keyed_randn
from scipy import stats

SHAPE = (4, 3, 2, 5, 7)  # 210 elements a sample: no multiple of 4


@pytest.fixture
def key():
    return NoiseKey(1234, torch.tensor([8, 0, 77, 3]), 6)


def test_a_samples_noise_ignores_batch_order_and_size(key):
    whole = keyed_randn(SHAPE, key)
    for rows in ([3, 1, 0, 2], [2], [1, 3]):
        part = keyed_randn((len(rows), *SHAPE[1:]), replace(key, sample_ids=key.sample_ids[rows]))
        assert torch.equal(part, whole[rows])


def test_a_large_samples_noise_ignores_batch_size_and_threads():
    """Vectorised transcendentals must not treat an element by its place in the batch."""
    ids = torch.arange(5)
    whole = keyed_randn((5, 100_003), NoiseKey(7, ids, 0))
    for b in range(5):
        assert torch.equal(keyed_randn((1, 100_003), NoiseKey(7, ids[b : b + 1], 0)), whole[b : b + 1])


def test_a_longer_sample_starts_with_the_shorter_one(key):
    assert torch.equal(keyed_randn((4, 210), key), keyed_randn((4, 333), key)[:, :210])


@pytest.mark.parametrize(
    "change", [{"seed": 1235}, {"seed": 1234 + 2**32}, {"draw": 7}, {"stream": Stream.MASK}]
)
def test_every_word_of_the_key_matters(key, change):
    assert not torch.equal(keyed_randn(SHAPE, key), keyed_randn(SHAPE, replace(key, **change)))
    assert not torch.equal(keyed_rand(SHAPE, key), keyed_rand(SHAPE, replace(key, **change)))


def test_words_may_be_tensors(key):
    tensors = replace(key, seed=torch.tensor(1234), draw=torch.tensor([6, 6, 6, 6]))
    assert torch.equal(keyed_randn(SHAPE, tensors), keyed_randn(SHAPE, key))
    other_draw = replace(key, draw=torch.tensor([6, 6, 5, 6]))
    same = (keyed_randn(SHAPE, other_draw) == keyed_randn(SHAPE, key)).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True]


def test_winner_and_loser_of_a_pair_share_noise_by_the_pairs_id():
    pair = torch.tensor([4, 9])
    both = keyed_randn((4, 50), NoiseKey(1, torch.cat((pair, pair)), 0))
    assert torch.equal(both[:2], both[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_made_in_fp32_and_rounded_once(key, dtype):
    noise = keyed_randn(SHAPE, key, dtype=dtype)
    assert noise.dtype == dtype
    assert torch.equal(noise, keyed_randn(SHAPE, key).to(dtype))


def test_scalars_for_each_sample(key):
    assert keyed_rand((4,), key).shape == (4,)
    assert keyed_randn((4,), key).tolist() == keyed_randn((4, 9), key)[:, 0].tolist()


def test_the_noise_is_normal_and_independent():
    """1.6 million numbers of neighbouring keys. The seed is fixed, so this is one draw: a bound that chance
    passes once in ten thousand was tested once, not at every run."""
    count = 100_000
    ids = torch.arange(8).repeat(2)
    draws = torch.arange(2).repeat_interleave(8)
    x = keyed_randn((16, count), NoiseKey(20261120, ids, draws)).double().numpy()
    assert stats.kstest(x[:4].ravel(), "norm").pvalue > 1e-4
    n = x.size
    assert abs(x.mean()) < 4 / np.sqrt(n)
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96 / n)
    # between samples and draws, between elements of one counter, and of their squares (Box-Muller's radius)
    for values in (x, x**2):
        correlation = np.corrcoef(values) - np.eye(16)
        assert np.abs(correlation).max() < 5 / np.sqrt(count)
        words = np.corrcoef(values.reshape(-1, 4).T) - np.eye(4)
        assert np.abs(words).max() < 5 / np.sqrt(n / 4)
        assert abs(np.corrcoef(values[0, :-4], values[0, 4:])[0, 1]) < 5 / np.sqrt(count)


def test_uniforms_are_uniform():
    u = keyed_rand((8, 50_000), NoiseKey(99, torch.arange(8), 0)).double().numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source", ["key", "tensor", "path"])
def test_add_keyed_noise_is_the_path_formula(key, dtype, source):
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    coefficients = torch.tensor(
        [[0.9, 0.1, 1, -1], [0.5, 0.5, 1, -1], [0, 1, 1, -1], [0.3, 0.95, 0.3, -0.95]]
    )
    noise = keyed_randn(SHAPE, key).to(torch.promote_types(dtype, torch.float32))
    a, s = (coefficients[:, i].to(noise.dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
    expected = a * clean + s * noise
    given = {"key": key, "tensor": noise, "path": PathState(expected)}[source]
    got = add_keyed_noise(clean, coefficients, given)
    assert got.dtype == dtype
    # two products and a sum, then one rounding to dtype; a path state gains a division and comes back
    bound = 6 * torch.finfo(noise.dtype).eps * (abs(a * clean) + abs(s * noise))
    bound = bound + torch.finfo(dtype).eps * expected.abs()
    assert ((got - expected).abs() <= bound).all()
