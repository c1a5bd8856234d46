"""Timestep laws: bounded, held to the sampler's steps where states are stored there, and unbiased when they adapt."""

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.models import load_model
from alignkit.objectives.laws import SIGNAL, start_law, stored_rows
from alignkit_kernels import NoiseKey, Stream, keyed_rand, keyed_randn

MANY = 20_000
FAMILIES = ("wan", "cogvideox")
LAWS = ("logit_normal", "uniform", "schedule", "adaptive")


@pytest.fixture(scope="module")
def models(config_file):
    files = {family: config_file.with_name(f"{family}-tiny-localdpo.yaml") for family in FAMILIES}
    return {
        family: (file, load_model(load_config(file).model, with_transformer=False, with_encoders=False))
        for family, file in files.items()
    }


@pytest.fixture(params=FAMILIES)
def law(request, models):
    """`law("uniform", "noise.interval=high_noise")` and the model it is of."""
    file, model = models[request.param]

    def make(name, *more):
        steps = "rollout.num_inference_steps=20"
        return start_law(load_config(file, [f"noise.timesteps={name}", steps, *more]), model)

    make.model = model
    return make


def draw(law, count=MANY, **more):
    return law.draw(torch.arange(count), torch.zeros(count, dtype=torch.int64), **more)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("interval", "low", "high"), [("high_noise", 0.75, 0.95), ("[0.2,0.5]", 0.2, 0.5)])
def test_an_interval_bounds_every_law_and_leaves_its_shape(law, name, interval, low, high):
    bounded, free = law(name, f"noise.interval={interval}"), law(name)
    share = draw(bounded).timesteps / 1000
    assert share.min() >= low and share.max() <= high
    all_shares = draw(free).timesteps / 1000
    inside = all_shares[(all_shares >= low) & (all_shares <= high)]
    # what the plain law draws there, by mean and spread: both are samples, of four standard errors each
    error = 4 * (share.var() / len(share) + inside.var() / len(inside)).sqrt()
    assert abs(share.mean() - inside.mean()) < error
    assert share.std() == pytest.approx(inside.std().item(), rel=0.1)
    noisiest = bounded.noisiest[1]
    assert (draw(bounded).coefficients[:, 1] <= noisiest).all()


@pytest.mark.parametrize("name", LAWS)
def test_a_laws_rows_are_as_likely_as_its_points_near_them(law, name):
    made = law(name)
    timesteps, drawn = made.schedule.timesteps, draw(made).timesteps
    nearest = (drawn[:, None] - timesteps).abs().argmin(dim=1)
    seen = torch.bincount(nearest, minlength=len(timesteps)) / MANY
    spread = 4.5 * (made.masses * (1 - made.masses) / MANY).sqrt() + 2e-3  # of the nearest row at a tie
    assert made.masses.sum() == pytest.approx(1) and ((seen - made.masses).abs() < spread).all()


def test_an_interval_that_holds_nothing_is_refused(law):
    with pytest.raises(ConfigError, match=r"noise.interval.*none of the sampler's 20 steps"):
        law("schedule", "noise.interval=[0.0,0.01]")
    with pytest.raises(ConfigError, match=r"noise.interval.*none of the sampler's 20 steps"):
        _ = law("uniform", "noise.interval=[0.0,0.01]").masses


def test_without_an_interval_the_numbers_are_those_of_before(models):
    file, model = models["wan"]
    ids, epochs = torch.arange(4), torch.full((4,), 5)
    key = NoiseKey(0, ids, epochs, Stream.TIMESTEP)
    uniform = keyed_rand((4, 1), key, device="cpu", dtype=torch.float64)[:, 0]
    normal = keyed_randn((4, 1), key, device="cpu", dtype=torch.float64)[:, 0]
    drawn = {
        name: start_law(load_config(file, [f"noise.timesteps={name}"]), model).draw(ids, epochs) for name in LAWS[:3]
    }
    assert torch.equal(drawn["logit_normal"].timesteps, model.training_path(torch.sigmoid(normal))[1])
    assert torch.equal(drawn["uniform"].timesteps, model.training_path(uniform)[1])
    assert torch.equal(drawn["schedule"].rows, (uniform * 12).long())


# --- states stored at rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_stored_rows_are_different_ascending_and_the_laws(law, name):
    made = law(name)
    rows = [stored_rows(made, 4, 3, prompt, 1) for prompt in range(500)]
    assert all(len(set(one)) == 4 and list(one) == sorted(one) for one in rows)
    assert rows == [stored_rows(made, 4, 3, prompt, 1) for prompt in range(500)]
    often = torch.bincount(torch.tensor(rows).flatten(), minlength=20).double()
    likely, unlikely = made.masses.argmax(), made.masses.argmin()
    assert often[likely] >= often[unlikely] and len({*rows}) > 300


def test_more_stored_rows_than_steps_are_refused(law):
    with pytest.raises(ConfigError, match=r"noise.path_steps: 19, but only"):
        stored_rows(law("schedule", "noise.interval=[0.3,0.9]"), 19, 3, 0, 1)


@pytest.mark.parametrize("name", LAWS)
def test_among_stored_rows_each_is_as_likely(law, name):
    among = torch.tensor([[1, 4, 9, 15], [0, 2, 3, 19]]).repeat(MANY // 2, 1)
    points = draw(law(name), among=among)
    assert (points.rows[:, None] == among).any(dim=1).all()
    place = (points.rows[:, None] == among).long().argmax(dim=1)
    seen = torch.bincount(place, minlength=4) / MANY
    assert ((seen - 0.25).abs() < 4 * (0.25 * 0.75 / MANY) ** 0.5).all()
    assert torch.equal(points.coefficients, law(name).schedule.coefficients[points.rows])


# --- adaptive ------------------------------------------------------------------------------------------------


def observed(made, *, steps=30):
    """A law that has seen that noisy rows teach ten times as much as the others, and nothing of row 19."""
    for step in range(steps):
        counts = torch.zeros(20, dtype=torch.float64)
        counts[(step * 3) % 19] = 4.0
        counts[(step * 5) % 19] += 4.0
        size = torch.where(torch.arange(20) < 5, 10.0, 1.0).double()
        made.observe({SIGNAL: torch.stack([counts * size, counts])})
    return made


def loss_at(points):
    """Some loss that depends on the row: what an estimate must come out at, whatever the law draws."""
    return 1 + points.rows.double().sin() * 3 + points.rows.double()


@pytest.mark.parametrize("stored", [False, True], ids=["all rows", "stored rows"])
def test_adaptive_weights_keep_the_loss_unbiased_and_without_them_it_is_not(law, stored):
    count = 100_000
    made, plain = observed(law("adaptive")), law("schedule")
    among = torch.tensor([[0, 3, 11, 17]]).expand(count, -1) if stored else None
    points = draw(made, count, among=among)
    wanted = loss_at(draw(plain, count, among=among))
    loss = loss_at(points)
    for values, near in ((points.weight * loss, True), (loss, False)):
        error = (values.var() / count + wanted.var() / count).sqrt()
        assert (abs(values.mean() - wanted.mean()) < 3 * error) == near
    assert points.weight.mean() == pytest.approx(1, abs=3 * (points.weight.var() / count).sqrt().item())
    assert points.weight.max() <= 10 + 1e-9, "a tenth of the draws are the plain law's"


def test_adaptive_begins_as_the_plain_law_and_prefers_what_teaches(law):
    made = law("adaptive")
    start = draw(made)
    assert torch.equal(start.rows, draw(law("schedule")).rows) and (start.weight - 1).abs().max() < 1e-12
    seen = torch.bincount(draw(observed(made)).rows, minlength=20) / MANY
    assert seen[:5].min() > 3 * seen[5:19].max() and seen[19] > seen[18]


def test_what_adaptive_has_learnt_goes_into_checkpoints_and_back(law):
    made, again = observed(law("adaptive")), law("adaptive")
    again.load_state(made.state())
    assert torch.equal(draw(again).rows, draw(made).rows) and torch.equal(draw(again).weight, draw(made).weight)
    before = made.state()["sums"].clone()
    observed(again)
    assert torch.equal(made.state()["sums"], before), "two laws share one state"


def test_rows_without_a_finite_signal_change_nothing_much(law):
    made = law("adaptive")
    zeros = torch.zeros(2, 20, dtype=torch.float64)
    zeros[1] = 1.0  # every pair is learnt: nothing teaches
    made.observe({SIGNAL: zeros})
    points = draw(made)
    assert (points.weight - 1).abs().max() < 1e-9


def test_a_rows_running_mean_forgets_a_hundredth_a_step(law):
    """decay 0.99: of two steps' means the earlier one weighs 0.99."""
    made, counts = law("adaptive"), torch.ones(20, dtype=torch.float64)
    for size in (4.0, 1.0):
        made.observe({SIGNAL: torch.stack([counts * size, counts])})
    state = made.state()
    assert (state["sums"] / state["counts"])[0] == pytest.approx((0.99 * 4 + 1) / 1.99)


def test_rows_outside_the_interval_are_not_drawn_among_stored_ones(law):
    for name in LAWS:
        made = law(name, "noise.interval=[0.4,0.8]")
        rows = torch.tensor([0, int(made.allowed[0]), int(made.allowed[-1]), 19])
        points = draw(made, among=rows.expand(MANY, -1))
        assert set(points.rows.tolist()) == set(rows[1:3].tolist())
        assert (points.rows == rows[1]).double().mean() == pytest.approx(0.5, abs=4 * 0.5 / MANY**0.5)
        assert points.weight is None or (points.weight - 1).abs().max() < 1e-12


@pytest.mark.parametrize("epoch", [0, 1])
def test_which_stored_row_is_trained_does_not_depend_on_which_are_stored(law, epoch):
    """Of one stream for both, the row that arrives first would be drawn far more often in the epoch of that key."""
    made, count = law("schedule"), 4000
    rows = torch.tensor([
        stored_rows(made, 4, 0, i, epoch) for i in range(count)
    ])  # fmt: skip
    drawn = made.draw(torch.arange(count), torch.full((count,), epoch), rows).rows
    seen = torch.bincount(drawn, minlength=20) / count
    assert ((seen - 0.05).abs() < 4.5 * (0.05 * 0.95 / count) ** 0.5).all()
