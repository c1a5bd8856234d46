"""Schedules as path coefficients: the tables that samplers visit, and the one-step solver on them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from alignkit.schedules import flow_coefficients, flow_shift, one_step, split_prediction

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


@pytest.mark.parametrize("shift", TABLE)
def test_wan_visits_the_states_of_the_table(wan, shift):
    class Shifted(type(wan)):
        pass

    model = Shifted(
        wan.path, 64, UniPCMultistepScheduler.from_config(wan.scheduler.config, flow_shift=shift), None, None
    )
    schedule = model.schedule(50)
    sigmas, timesteps = TABLE[shift]
    half_digit = 0.5e-6 + 2**-24  # the table's last digit, and the scheduler's own fp32
    assert (schedule.coefficients[STEPS, 1] - torch.tensor(sigmas, dtype=torch.float64)).abs().max() <= half_digit
    assert schedule.timesteps[STEPS].tolist() == timesteps
    assert schedule.coefficients[-1].tolist() == [1.0, 0.0, 1.0, -1.0]


def test_schedule_is_the_shifted_straight_line():
    i = torch.arange(50, dtype=torch.float64)
    expected = flow_shift(1 - 0.999 * i / 50, 3.0)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(50)
    assert (scheduler.sigmas[:-1].double() - expected).abs().max() < 1.1e-6  # σ_0 is moved by 1e-6 on purpose


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
