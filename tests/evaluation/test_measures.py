import math

import numpy as np
import pytest
import scipy.linalg
import torch

from alignkit.errors import DataError
from alignkit.evaluation.measures import edge_energy, frechet_distance, motion_amount, temporal_flicker


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: torch.Tensor, root: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n samples whose sample mean and unbiased sample covariance are exactly `mean` and rootᵀ·root."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.qr(x).Q * (n - 1) ** 0.5
    return white @ root + mean


@pytest.mark.parametrize("n, d", [(50, 8), (8, 50), (2, 3)])
def test_frechet_distance_of_a_set_to_itself_is_zero(n, d):
    x = 1000 + normal(n, d)
    # traces of size d, computed to eps times a small multiple of their size
    assert frechet_distance(x, x) <= 1e-11 * d
    assert frechet_distance(x, x.flip(0)) <= 1e-11 * d


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 2.0, 1.5]).double()
    a = with_moments(mean_a, torch.diag(std_a), 40, seed=1)
    b = with_moments(mean_b, torch.diag(std_b), 70, seed=2)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    a, b = normal(60, 6, seed=3) @ normal(6, 6, seed=4), normal(80, 6, seed=5) @ normal(6, 6, seed=6) + 0.3
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    traces = sum(np.trace(c) for c in covariances) - 2 * np.trace(root)
    expected = (a.mean(0) - b.mean(0)).square().sum() + traces
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_frechet_distance_does_not_lose_a_small_difference_in_float32_features():
    x = normal(64, 4).float() + 100
    moved = x + 1e-3
    expected = 4 * float((moved.double() - x.double()).mean(0).square().mean())
    assert frechet_distance(x, moved) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "a, b",
    [
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.zeros(5), torch.zeros(5)),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3)),
    ],
)
def test_frechet_distance_refuses_what_has_none(a, b):
    with pytest.raises(DataError, match="Fréchet distance"):
        frechet_distance(a, b)


def moving_square(step: int, *, level: int = 200, background: int = 50, size: int = 8) -> torch.Tensor:
    video = torch.full((6, 40, 60, 3), background, dtype=torch.uint8)
    for t in range(6):
        video[t, 10 : 10 + size, 5 + step * t : 5 + step * t + size] = level
    return video


@pytest.mark.parametrize("step", [0, 1, 3, 8])
def test_motion_is_that_of_a_known_translation(step):
    motion = motion_amount(moving_square(step)[None])
    assert motion.dtype == torch.float64
    assert motion.item() == pytest.approx(2 * step * 8 * (200 - 50) / (40 * 60), rel=1e-12)


def test_motion_sees_every_channel_alike_and_no_wrap_around():
    video = torch.zeros(3, 2, 4, 4, 3, dtype=torch.uint8)
    for channel in range(3):
        video[channel, 1, ..., channel] = 255
    assert torch.equal(motion_amount(video), torch.full((3,), 85.0, dtype=torch.float64))
    assert torch.equal(motion_amount(video.flip(1)), motion_amount(video)), "255 → 0 is as much as 0 → 255"


def test_flicker_is_zero_for_stills_fades_and_passing_edges():
    fade = (torch.arange(6) * 20).to(torch.uint8)[:, None, None, None].expand(6, 40, 60, 3)
    videos = torch.stack([moving_square(0), fade, moving_square(2), moving_square(4)])
    assert temporal_flicker(videos).tolist() == [0, 0, 0, 0]
    assert (motion_amount(videos)[1:] > 0).all()
    blinking = temporal_flicker(moving_square(8)[None])  # on every pixel for one frame only
    assert blinking.item() == pytest.approx(8 * 8 * (200 - 50) / (40 * 60), rel=1e-12)


def test_flicker_is_the_amplitude_of_what_blinks():
    video = torch.full((1, 7, 4, 4, 3), 100, dtype=torch.uint8)
    video[:, 1::2] = 130
    assert temporal_flicker(video).item() == 30
    video[..., 2:, :] = 100  # half of the picture stands still
    assert temporal_flicker(video).item() == 15


def test_edge_energy_of_known_patterns():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    flat = torch.full((16, 16), 77)
    ramp = 5 * x + 3 * y
    single_pixels = (x + y) % 2 * 200
    stripes = x % 2 * 200
    pictures = torch.stack([flat, ramp, single_pixels, stripes]).to(torch.uint8)
    energy = edge_energy(pictures[:, None, :, :, None].expand(4, 2, 16, 16, 3))
    assert energy.tolist() == [0, 0, 200, 100]


def test_edge_energy_grows_with_noise_as_it_should():
    sigma = 10.0
    noise = (128 + sigma * normal(1, 4, 128, 128, 3)).round().clamp(0, 255).to(torch.uint8)
    # |N(0, σ²·(1 + 1/4))| has the mean √(2/π)·σ·√1.25; rounding adds 1/12 to the variance; ~2e5 samples
    expected = math.sqrt(2 / math.pi) * math.sqrt((sigma**2 + 1 / 12) * 1.25)
    assert edge_energy(noise).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("measure", [motion_amount, temporal_flicker, edge_energy])
def test_each_clip_is_measured_alone(measure):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (3, 5, 9, 7, 3), dtype=torch.uint8, generator=generator)
    assert torch.equal(measure(video), torch.cat([measure(clip[None]) for clip in video]))


@pytest.mark.parametrize("measure", [motion_amount, temporal_flicker, edge_energy])
def test_other_shapes_are_refused_in_words(measure):
    good = torch.zeros(1, 5, 8, 8, 3, dtype=torch.uint8)
    for bad in (good.float(), good[0], good[..., :1], good[:0]):
        with pytest.raises(DataError, match="expected uint8 frames"):
            measure(bad)
    too_small = good[:, :, :2] if measure is edge_energy else good[:, :1]
    with pytest.raises(DataError, match="at least"):
        measure(too_small)
