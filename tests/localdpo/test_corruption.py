"""Regenerated losers: outside the mask the winner bit for bit, in the result and in the state the solver carries."""

import pytest
import torch

from alignkit.localdpo.corruption import regenerate
from alignkit.schedules import Schedule, flow_coefficients, flow_shift
from alignkit_kernels import NoiseKey, Stream, add_keyed_noise

N = 8


def flow_schedule():
    sigmas = torch.cat([flow_shift(1 - 0.999 * torch.arange(N).double() / N, 3.0), torch.zeros(1).double()])
    return Schedule(flow_coefficients(sigmas), (1000 * sigmas[:-1]).floor())


def v_schedule():
    abar = torch.linspace(0.0, 0.99, N + 1).double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    rows = torch.stack((a, s, a, -s), dim=1)
    rows[-1] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return Schedule(rows, torch.arange(N, 0, -1).double())


CASES = {
    "wan": (flow_schedule(), (2, 4, 3, 6, 8), (2, 1, 3, 6, 8)),
    "cogvideox": (v_schedule(), (2, 3, 4, 6, 8), (2, 3, 1, 6, 8)),
}


def setup(family):
    schedule, shape, mask_shape = CASES[family]
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(shape, generator=generator)
    mask = (torch.rand(mask_shape, generator=generator) < 0.3).to(torch.uint8)
    key = NoiseKey(7, torch.tensor([3, 4]), 0, Stream.CORRUPTION)
    return schedule, clean, mask, key


def network(state, timesteps):
    """Anything nonlinear that would ruin what is pasted if it could."""
    return torch.sin(3 * state) + timesteps.view(-1, 1, 1, 1, 1) / 1000


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("steps", [1, 3, N])
def test_outside_the_mask_nothing_changes(family, steps):
    schedule, clean, mask, key = setup(family)
    loser = regenerate(clean, mask, network, schedule, key, steps)
    inside = mask.bool().expand_as(clean)
    assert torch.equal(loser[~inside], clean[~inside])
    assert not torch.equal(loser[inside], clean[inside])


@pytest.mark.parametrize("family", CASES)
def test_the_carried_state_is_the_renoised_clean_latent_outside_the_mask(family):
    schedule, clean, mask, key = setup(family)
    outside = ~mask.bool().expand_as(clean)
    seen = []

    def watch(i, state):
        seen.append(i)
        row = schedule.coefficients[i].expand(2, 4)
        wanted = clean if i == N else add_keyed_noise(clean, row, key)
        assert torch.equal(state[outside], wanted[outside])

    regenerate(clean, mask, network, schedule, key, 5, watch)
    assert seen == list(range(N - 5, N + 1))


def test_a_network_that_knows_the_truth_gives_the_clean_latent_back():
    """With the exact velocity ε − x0 every solver state stays on the clean latent's own path."""
    schedule, clean, mask, key = setup("wan")
    noise = add_keyed_noise(torch.zeros_like(clean), torch.tensor([[0.0, 1.0, 1.0, -1.0]]).expand(2, 4), key)
    loser = regenerate(clean, mask, lambda state, t: noise - clean, schedule, key, N)
    # N steps, each rounding a state of size |x| + |ε| a few times in fp32
    assert (loser - clean).abs().max() <= 8 * N * 2**-24 * (clean.abs() + noise.abs()).max()


def test_noise_is_the_pairs_own_whatever_the_batch():
    schedule, clean, mask, key = setup("wan")
    both = regenerate(clean, mask, network, schedule, key, 4)
    alone = NoiseKey(7, torch.tensor([4]), 0, Stream.CORRUPTION)
    assert torch.equal(regenerate(clean[1:], mask[1:], network, schedule, alone, 4), both[1:])


@pytest.mark.parametrize("steps", [0, N + 1])
def test_impossible_step_counts_are_refused(steps):
    schedule, clean, mask, key = setup("wan")
    with pytest.raises(ValueError, match=f"between 1 and {N}, got {steps}"):
        regenerate(clean, mask, network, schedule, key, steps)
