"""Schedules as path coefficients: the tables that samplers visit, and the one-step solver on them."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from alignkit.models.cogvideox import CogVideoXModel
from alignkit.schedules import flow_coefficients, flow_shift, one_step, split_prediction, v_coefficients

# σ and network timestep at steps 0, 1, 2, 10, 25, 40, 48, 49 of 50, read off diffusers 0.42.1
STEPS = [0, 1, 2, 10, 25, 40, 48, 49]
TABLE = {
    3.0: (
        [0.999999, 0.993250, 0.986315, 0.923166, 0.750375, 0.429795, 0.113576, 0.060405],
        [999, 993, 986, 923, 750, 429, 113, 60],
    ),
    5.0: (
        [0.999999, 0.995939, 0.991744, 0.952438, 0.833611, 0.556788, 0.175969, 0.096778],
        [999, 995, 991, 952, 833, 556, 175, 96],
    ),
}


# ᾱ of CogVideoX at these timesteps, by its shift of the signal-to-noise ratio (3: 2B, 1: 5B)
COGVIDEOX_TIMESTEPS = [999, 979, 959, 499, 19, 0]
COGVIDEOX_TABLE = {
    3.0: [0, 2.7e-5, 1.19e-4, 0.09597, 0.946573, 0.997454],
    1.0: [0, 8.6e-5, 3.75e-4, 0.242359, 0.98101, 0.99915],
}


def cogvideox_scheduler(kind=CogVideoXDDIMScheduler, shift=3.0):
    return kind(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=shift,
    )


def cogvideox(shift=3.0):
    return CogVideoXModel("", 226, cogvideox_scheduler(shift=shift))


def flow_unipc(shift=3.0, steps=None):
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", TABLE)
def test_wan_visits_the_states_of_the_table(wan, shift):
    scheduler = UniPCMultistepScheduler.from_config(wan.scheduler.config, flow_shift=shift)
    schedule = type(wan)(wan.path, 64, scheduler).schedule(50)
    sigmas, timesteps = TABLE[shift]
    half_digit = 0.5e-6 + 2**-24  # the table's last digit, and the scheduler's own fp32
    assert (schedule.coefficients[STEPS, 1] - torch.tensor(sigmas, dtype=torch.float64)).abs().max() <= half_digit
    assert schedule.timesteps[STEPS].tolist() == timesteps
    assert schedule.coefficients[-1].tolist() == [1.0, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("shift", COGVIDEOX_TABLE)
def test_cogvideox_visits_the_states_of_the_table(shift):
    schedule = cogvideox(shift).schedule(50)
    assert schedule.timesteps.tolist() == list(range(999, 0, -20))
    assert schedule.coefficients[-1].tolist() == [1.0, 0.0, 1.0, 0.0]
    for timestep, alpha in zip(COGVIDEOX_TIMESTEPS, COGVIDEOX_TABLE[shift], strict=True):
        rows, told = cogvideox(shift).training_path(torch.tensor([(timestep + 0.5) / 1000], dtype=torch.float64))
        a, s, c, d = rows[0].tolist()
        assert told.tolist() == [timestep]
        assert a**2 == pytest.approx(alpha, abs=1e-5) and (c, d) == (a, -s)
        assert a**2 + s**2 == pytest.approx(1, abs=1e-15)
        for row in schedule.coefficients[:-1][schedule.timesteps == timestep]:
            assert row.tolist() == rows[0].tolist()


@pytest.mark.parametrize("shift", COGVIDEOX_TABLE)
def test_cogvideox_shifts_the_signal_to_noise_ratio_then_ends_at_none(shift):
    """ᾱ ← ᾱ/(z + (1−z)·ᾱ), then √ᾱ is stretched to end at 0 (arXiv 2305.08891, algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    root = (alphas / (shift + (1 - shift) * alphas)).sqrt()
    stretched = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rows, _ = cogvideox(shift).training_path((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    torch.testing.assert_close(rows[:, 0], stretched, rtol=0, atol=1e-14)


def test_training_timesteps_are_the_whole_numbers_0_to_999_equally_often():
    u = torch.arange(10_000, dtype=torch.float64) / 10_000
    _, timesteps = cogvideox().training_path(u)
    assert timesteps.long().bincount().tolist() == [10] * 1000
    assert cogvideox().training_path(torch.ones(1, dtype=torch.float64))[1].tolist() == [999]


@pytest.mark.parametrize("shift", COGVIDEOX_TABLE)
def test_one_step_is_ddim_for_v(shift):
    """From pure noise to the clean end, where the number of steps divides 1000."""
    generator = torch.Generator().manual_seed(0)
    scheduler, schedule = cogvideox_scheduler(shift=shift), cogvideox(shift).schedule(20)
    scheduler.set_timesteps(20)
    theirs = ours = torch.randn(4, 64, dtype=torch.float64, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn(4, 64, dtype=torch.float64, generator=generator)
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
        ours = one_step(ours, v, schedule.coefficients[i], schedule.coefficients[i + 1])
        # DDIM divides by √(1 − ᾱ) ≥ 0.05 (z = 3) or 0.13 (z = 1); a dozen roundings of 2⁻⁵³ of values up to 5
        assert (ours - theirs).abs().max() < 12 * 5 * 2**-53 / 0.05 * (i + 1)


def test_ddim_leaves_its_own_grid_where_the_steps_do_not_divide_1000():
    """It steps down by 1000 // N: with N = 16 by 62, while its timesteps lie 62 or 63 apart."""
    scheduler = cogvideox_scheduler()
    scheduler.set_timesteps(16)
    reached = scheduler.timesteps - 1000 // 16
    assert (scheduler.timesteps[1:] - reached[:-1]).abs().max() == 1
    assert reached[-1] < 0  # and yet the last step ends at the clean latents


def test_v_and_clean_space_errors_differ_by_the_noise_share_alone():
    """(1 − ᾱ)⁻¹·|x̂0 − x0|² = |v̂ − v|²: which of the two a loss uses changes no logit."""
    generator = torch.Generator().manual_seed(1)
    clean, noise, error = torch.randn(3, 1000, dtype=torch.float64, generator=generator)
    for alpha in (2.7e-5, 0.09597, 0.946573):
        row = v_coefficients(torch.tensor(alpha, dtype=torch.float64))
        a, s, c, d = row.tolist()
        state, v = a * clean + s * noise, c * noise + d * clean
        guess, _ = split_prediction(state, v + error, row)
        ratio = (guess - clean).square().sum() / (1 - alpha) / error.square().sum()
        assert ratio.item() == pytest.approx(1, abs=1e-12)


def test_schedule_is_the_shifted_straight_line():
    i = torch.arange(50, dtype=torch.float64)
    for shift in TABLE:
        expected = flow_shift(1 - 0.999 * i / 50, shift)
        # σ_0 is moved by 1e-6 on purpose
        assert (flow_unipc(shift, 50).sigmas[:-1].double() - expected).abs().max() < 1.1e-6


def test_the_grid_of_older_diffusers_and_of_wans_own_code_is_another():
    """S(0.999·(1 − i/N)), up to diffusers 0.36: pairs made on one grid must not be trained on the other."""
    i = torch.arange(50, dtype=torch.float64)
    for shift in TABLE:
        new, old = flow_shift(1 - 0.999 * i / 50, shift), flow_shift(0.999 * (1 - i / 50), shift)
        assert (flow_unipc(shift, 50).sigmas[:-1].double() - new).abs().max() < 1.1e-6
        # At the start 1 − 0.999 apart, times S'(1) = 1/k; most near the end.
        assert (new - old)[0].item() == pytest.approx(0.001 / shift, rel=0.01)
        assert (new - old).max() > 3e-4 and (new - old).min() > 0


def test_most_of_wans_steps_are_loud():
    """28 of 50 steps at k = 5 have σ > 0.8: uniform over steps is heavy on high noise."""
    assert (flow_unipc(5.0, 50).sigmas > 0.8).sum() == 28


def test_unipcs_corrected_sample_is_not_what_the_network_saw():
    """From the second step on the solver rewrites the sample it is given; states to train on are the network's."""
    scheduler = flow_unipc(3.0, 10)
    generator = torch.Generator().manual_seed(0)
    sample, weights = torch.randn(2, 1, 256, generator=generator)
    apart = []
    for t in scheduler.timesteps:
        seen = sample
        sample = scheduler.step(torch.tanh(weights * seen), t, seen, return_dict=False)[0]
        apart.append((scheduler.last_sample - seen).abs().max().item())
    assert apart[0] == 0
    assert min(apart[1:]) > 1e-4  # rounding would leave about 1e-7


def test_unipcs_add_noise_is_wrong_before_set_timesteps():
    """Its sigmas still are those of the variance-exploding form: a state must come from the coefficients."""
    one, none = torch.ones(1), torch.zeros(1)
    scale = flow_unipc().add_noise(one, none, torch.tensor([0])).item()
    assert scale == pytest.approx(-156, abs=1)
    a, s, _, _ = flow_coefficients(torch.tensor([0.001], dtype=torch.float64))[0].tolist()
    assert (a, s) == (0.999, 0.001)


def test_cogvideox_dpm_throws_the_starting_noise_away():
    """Its first step multiplies the sample by 0, so two starts with one generator end the same; DDIM's do not."""
    first, second, v = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dpm, ddim = cogvideox_scheduler(CogVideoXDPMScheduler), cogvideox_scheduler()
    dpm.set_timesteps(50), ddim.set_timesteps(50)
    ends = [
        dpm.step(v, None, dpm.timesteps[0], None, sample, generator=torch.Generator().manual_seed(1))[0]
        for sample in (first, second)
    ]
    assert torch.equal(*ends)
    kept = [ddim.step(v, ddim.timesteps[0], sample)[0] for sample in (first, second)]
    assert (kept[0] - kept[1]).abs().max() > 0.9 * (first - second).abs().max()


def test_other_schedulers_grids_are_not_ours():
    """FlowMatchEuler applies the shift twice: its grid must never be mixed with UniPC's."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.857692, 0.602151, 0.008929, 0], abs=1e-6)


def test_fingerprint_tells_schedules_apart(wan):
    assert wan.schedule(20).fingerprint == wan.schedule(20).fingerprint
    assert wan.schedule(20).fingerprint != wan.schedule(21).fingerprint


@pytest.mark.parametrize(
    "row", [[0.3, 0.7, 1.0, -1.0], [0.6, 0.8, 0.6, -0.8], [0.6, 0.8, 1.0, 0.0], [0.6, 0.8, 0.0, 1.0]]
)
def test_state_and_prediction_determine_clean_and_noise(row):
    """For flow, v, ε and x0 predictions alike."""
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    a, s, c, d = row
    got = split_prediction(a * clean + s * noise, c * noise + d * clean, torch.tensor(row, dtype=torch.float64))
    for value, wanted in zip(got, (clean, noise), strict=True):
        # inputs carry a relative rounding of 2⁻⁵³ each; |det| ≥ 0.6 and four products
        assert (value - wanted).abs().max() <= 16 * 2**-53 * (clean.abs().max() + noise.abs().max()) / 0.6


def test_one_step_is_euler_for_flow():
    rows = flow_coefficients(torch.tensor([0.8, 0.5]))
    state, velocity = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    step = one_step(state, velocity, rows[0], rows[1])
    sigma = rows[:, 1]
    torch.testing.assert_close(step, state + (sigma[1] - sigma[0]) * velocity, rtol=0, atol=1e-14)
