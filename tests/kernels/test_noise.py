"""Keyed noise: independent of everything but its key, independent between keys, and normal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkit_kernels import NoiseKey, PathState, Stream, add_keyed_noise, dispatch, keyed_rand, keyed_randn
from alignkit_kernels.noise import reference
from alignkit_kernels.philox import normals
from alignkit_kernels.sources import key_rows

SHAPE = (4, 3, 2, 5, 7)  # 210 elements a sample: no multiple of 4
ALIGNED = (4, 3, 2, 5, 8)

if dispatch.HAVE_TRITON:
    import triton
    import triton.language as tl

    from alignkit_kernels.noise.device import normal_pair

    @triton.jit
    def normals_of_words(words_ptr, out_ptr, pairs, BLOCK: tl.constexpr):
        pair = tl.arange(0, BLOCK)
        inside = pair < pairs
        first = tl.load(words_ptr + 2 * pair, mask=inside, other=0).to(tl.uint32)
        second = tl.load(words_ptr + 2 * pair + 1, mask=inside, other=0).to(tl.uint32)
        cosine, sine = normal_pair(first, second)
        tl.store(out_ptr + 2 * pair, cosine, mask=inside)
        tl.store(out_ptr + 2 * pair + 1, sine, mask=inside)


pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture
def key(device):
    return NoiseKey(1234, torch.tensor([8, 0, 77, 3], device=device), 6)


def test_a_samples_noise_ignores_batch_order_and_size(key):
    whole = keyed_randn(SHAPE, key)
    for rows in ([3, 1, 0, 2], [2], [1, 3]):
        part = keyed_randn((len(rows), *SHAPE[1:]), replace(key, sample_ids=key.sample_ids[rows]))
        assert torch.equal(part, whole[rows])


def test_a_large_samples_noise_ignores_batch_size(path, device):
    """Vectorised transcendentals must not treat an element by its place in the batch."""
    ids, size = torch.arange(5, device=device), 100_003 if path == "reference" else 1_003
    whole = keyed_randn((5, size), NoiseKey(7, ids, 0))
    for b in range(5):
        assert torch.equal(keyed_randn((1, size), NoiseKey(7, ids[b : b + 1], 0)), whole[b : b + 1])


@pytest.mark.parametrize("shape", [SHAPE, ALIGNED, (4, 1500), (4, 1504)])
def test_every_way_to_the_noise_gives_the_same_noise(key, launched, shape):
    """Odd and aligned samples, one tile and several: integers equal the contract's, normals to 4 ulp."""
    keys = key_rows(key, 4, torch.device("cpu"))
    with launched("keyed_kernel"):
        normal = keyed_randn(shape, key).cpu()
    exact = reference.keyed_normal(list(shape), keys, torch.float32)
    assert ((normal - exact).abs() <= 4 * 2.0**-23 * exact.abs()).all()
    with launched("keyed_kernel"):
        uniform = keyed_rand(shape, key)
    assert torch.equal(uniform.cpu(), reference.keyed_uniform(list(shape), keys, torch.float32))


def test_the_kernels_normals_are_exact_where_the_circle_is_reduced(path, device):
    """Angles at and beside every eighth of a turn, radii from 0 to the largest: words chosen, not drawn."""
    angles = [q * 2**28 + d for q in range(8) for d in (-256, -1, 0, 1, 256)]
    words = torch.tensor([(w, a % 2**32) for w in (0, 1, 215, 2**20, 2**31 - 1, 2**31, 2**32 - 1) for a in angles])
    exact = normals(words.flatten()).double()
    assert exact.isfinite().all() and exact.abs().max() <= 5.68
    if path == "triton":
        got = torch.empty(exact.shape, device=device)
        normals_of_words[(1,)](words.flatten().to(device), got, len(words), BLOCK=512)
        # fp64 cos of a rounded quarter turn is 6e-17 where the kernel says 0
        assert ((got.cpu() - exact).abs() <= 4 * 2.0**-23 * exact.abs() + 1e-15).all()


@pytest.mark.parametrize("seed", [0, 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_key_is_rows_of_int64_whatever_its_words_are(key, device, seed):
    """So a new seed compiles nothing, and it keeps all its 64 bits."""
    rows = key_rows(replace(key, seed=seed), 4, device)
    assert rows.dtype == torch.int64 and rows.shape == (4, 4) and rows.device.type == device.type
    assert rows[:, 0].tolist() == [seed - 2**64 if seed >= 2**63 else seed] * 4


def test_a_longer_sample_starts_with_the_shorter_one(key):
    assert torch.equal(keyed_randn((4, 210), key), keyed_randn((4, 333), key)[:, :210])


@pytest.mark.parametrize("change", [{"seed": 1235}, {"seed": 1234 + 2**32}, {"draw": 7}, {"stream": Stream.MASK}])
def test_every_word_of_the_key_matters(key, change):
    assert not torch.equal(keyed_randn(SHAPE, key), keyed_randn(SHAPE, replace(key, **change)))
    assert not torch.equal(keyed_rand(SHAPE, key), keyed_rand(SHAPE, replace(key, **change)))


def test_words_may_be_tensors(key):
    tensors = replace(key, seed=torch.tensor(1234), draw=torch.tensor([6, 6, 6, 6], device=key.sample_ids.device))
    assert torch.equal(keyed_randn(SHAPE, tensors), keyed_randn(SHAPE, key))
    other_draw = replace(key, draw=torch.tensor([6, 6, 5, 6]))
    same = (keyed_randn(SHAPE, other_draw) == keyed_randn(SHAPE, key)).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True]


def test_winner_and_loser_of_a_pair_share_noise_by_the_pairs_id(device):
    pair = torch.tensor([4, 9], device=device)
    both = keyed_randn((4, 50), NoiseKey(1, torch.cat((pair, pair)), 0))
    assert torch.equal(both[:2], both[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_made_in_fp32_and_rounded_once(key, path, launched, dtype):
    with launched("keyed_kernel", "keyed_kernel"):
        noise, expected = keyed_randn(SHAPE, key, dtype=dtype), keyed_randn(SHAPE, key).to(dtype)
    assert noise.dtype == dtype
    # the interpreter truncates what it stores as bf16: one ulp, in this dtype alone
    truncated = dispatch.INTERPRETED and path == "triton" and dtype == torch.bfloat16
    slack = torch.finfo(dtype).eps * expected.abs() if truncated else 0
    assert ((noise - expected).abs() <= slack).all()


def test_scalars_for_each_sample(key):
    assert keyed_rand((4,), key).shape == (4,)
    assert keyed_randn((4,), key).tolist() == keyed_randn((4, 9), key)[:, 0].tolist()


def surprise(values: np.ndarray, cdf) -> float:
    """Kolmogorov and Smirnov's statistic, sqrt(n) times the largest distance from the distribution function."""
    u, n = np.sort(cdf(values.ravel())), values.size
    grid = np.arange(n + 1) / n
    return float(np.sqrt(n) * max((grid[1:] - u).max(), (u - grid[:-1]).max()))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(x)).numpy()


# 2 exp(-2 x**2) is the chance of a larger statistic: here 1e-4
UNUSUAL = 2.2253


def test_the_noise_is_normal_and_independent(path, device, launched):
    """1.6 million numbers of neighbouring keys, fewer under the interpreter. The seed is fixed, so this is one draw:
    a bound that chance passes once in ten thousand was tested once, not at every run."""
    count = 8_000 if path == "triton" and dispatch.INTERPRETED else 100_000
    ids = torch.arange(8, device=device).repeat(2)
    draws = torch.arange(2, device=device).repeat_interleave(8)
    with launched("keyed_kernel"):
        x = keyed_randn((16, count), NoiseKey(20261120, ids, draws)).double().cpu().numpy()
    assert surprise(x[:4], normal_cdf) < UNUSUAL
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


def test_uniforms_are_uniform(path, device):
    count = 8_000 if path == "triton" and dispatch.INTERPRETED else 50_000
    u = keyed_rand((8, count), NoiseKey(99, torch.arange(8, device=device), 0)).double().cpu().numpy()
    assert surprise(u, lambda x: x) < UNUSUAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source", ["key", "tensor", "path"])
@pytest.mark.parametrize("shape", [SHAPE, ALIGNED])
def test_add_keyed_noise_is_the_path_formula(key, device, launched, dtype, source, shape):
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows = [[0.9, 0.1, 1, -1], [0.5, 0.5, 1, -1], [0, 1, 1, -1], [0.3, 0.95, 0.3, -0.95]]
    coefficients = torch.tensor(rows, device=device)
    exact = reference.keyed_normal(list(shape), key_rows(key, 4, torch.device("cpu")), torch.float32)
    noise = exact.to(device, torch.promote_types(dtype, torch.float32))
    a, s = (coefficients[:, i].to(noise.dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
    expected = a * clean + s * noise
    given = {"key": key, "tensor": noise, "path": PathState(expected)}[source]
    with launched("add_noise_kernel"):
        got = add_keyed_noise(clean, coefficients, given)
    assert got.dtype == dtype
    # two products and a sum, here and there, and for a path state another three and a division good to 2 ulp: 14
    # roundings; a kernel's normals are fp32's to 4 ulp; then one rounding to dtype, which the interpreter truncates
    bound = 7 * torch.finfo(noise.dtype).eps * (abs(a * clean) + abs(s * noise))
    bound = bound + torch.finfo(dtype).eps * expected.abs() + (4 * 2.0**-23 * abs(s * noise) if source == "key" else 0)
    assert ((got - expected).abs() <= bound).all()


def test_keyed_noise_added_is_the_noise_that_is_drawn(key, device):
    """x_t from `add_keyed_noise` holds bit for bit the noise that the other functions use."""
    clean = torch.zeros(ALIGNED, device=device)
    rows = torch.tensor([[0.0, 1.0, 1.0, -1.0]] * 4, device=device)
    assert torch.equal(add_keyed_noise(clean, rows, key), keyed_randn(ALIGNED, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [1, 2, 3, 4])
def test_noise_of_a_part_is_that_part_of_the_wholes(path, device, launched, axis, dtype):
    """Cut along any axis of either layout, at both ends and between."""
    shape = (2, 3, 4, 5, 6)
    key = NoiseKey(9, torch.tensor([3, 2**31], device=device), torch.tensor([1, 2**32 - 1], device=device))
    whole = keyed_randn(shape, key, dtype=dtype)
    rows = torch.tensor([[0.3, 0.7, 1.0, -1.0], [0.6, 0.4, 0.8, -0.6]], device=device)
    clean = torch.ones(shape, device=device)
    noisy = add_keyed_noise(clean, rows, key)
    for start, size in ((0, 1), (1, 2), (shape[axis] - 1, 1), (0, shape[axis])):
        part = [size if i == axis else x for i, x in enumerate(shape)]
        shard = axis, start, shape[axis]
        with launched("keyed_part_kernel"):
            got = keyed_randn(part, key, dtype=dtype, shard=shard)
        assert torch.equal(got, whole.narrow(axis, start, size))
        added = add_keyed_noise(clean.narrow(axis, start, size), rows, key, shard=shard)
        assert torch.equal(added, noisy.narrow(axis, start, size))


@pytest.mark.parametrize("make", [reference.keyed_normal, reference.keyed_uniform], ids=lambda make: make.__name__)
def test_noise_drawn_part_by_part_is_that_drawn_at_once(make, key, device, monkeypatch):
    """In plain torch, which draws as much at a time as a cache holds; 3 counters a sample here, and one left over."""
    keys = key_rows(key, SHAPE[0], device)
    whole = make(list(SHAPE), keys, torch.float32)
    monkeypatch.setattr(reference, "PART", 3 * SHAPE[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(make(list(SHAPE), keys, torch.float32), whole)
