"""In a field that is known: which noise source trains where the sampler passes."""

from itertools import pairwise

import pytest
import torch

from alignkit.experiments import paths
from alignkit.experiments.paths import STEPS, chord_errors, distances, known_world, measure, sampled_paths
from alignkit.schedules.inversion import invert, round_trip_error

FAMILIES = ("wan", "cogvideox")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request):
    return measure(request.param)


def test_path_states_are_the_samplers_own_to_the_last_bit(measured):
    assert torch.equal(measured["path"], torch.zeros(STEPS, dtype=torch.float64))


def test_between_two_states_a_first_order_solver_passes_exactly(measured):
    """To the rounding of the states (½ ulp each) and of their weighted sum."""
    assert measured["path_between"].max() < 4 * EPS


def test_initial_noise_is_far_nearer_than_fresh_noise(measured):
    assert (measured["initial"] < 0.6 * measured["shared"]).all()
    assert measured["initial"].mean() < 0.15 * measured["shared"].mean()
    assert measured["initial"][0] < 1e-5 and measured["shared"][0] > 1.3  # √2: two independent noises
    assert measured["initial"].max() > 0.15, "the path is no straight line: else nothing would tell the sources apart"


def test_inversion_finds_the_path_up_to_its_round_trip_error(measured):
    assert measured["inversion"].max() < 0.02 < measured["initial"][STEPS // 2]


def test_a_solver_of_higher_order_leaves_the_line_between_its_states():
    """Why `path_between` is refused with UniPC: its next state is not on the line of its prediction."""
    world = known_world("wan", solver="model")
    kept = distances(world, "path", sampled_paths(world))
    between = distances(world, "path", sampled_paths(world), between=True)
    assert kept.max() == 0 and between[2:-2].max() > 1e-3


def test_a_path_is_no_chord_but_at_its_last_step():
    """The field's tangent misses the target everywhere but where the last step ends in the video."""
    errors = chord_errors(known_world("wan"))
    assert (errors[:-1] > 0.01).all() and errors[0] > 0.5
    # one first-order step ends in the video: what is left are states kept in fp32, divided by the last noise level
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_error_falls_as_steps_double(family):
    """Also of a video between two kinds of data, which a coarse inversion gives back as the other kind."""
    errors = []
    world = known_world(family, samples=8)
    field = world.model.transformer
    for steps in (10, 20, 40):
        schedule = world.model.schedule(steps)
        field.timesteps, field.rows = schedule.timesteps, schedule.coefficients[:-1]
        top = invert(world.videos, world.predict, schedule, 0, lambda row, state: None)
        errors.append(round_trip_error(world.videos, top, world.predict, schedule, 0))
    for coarse, fine in pairwise(errors):
        assert (fine < coarse).all() and fine.median() < 0.3 * coarse.median()


def test_the_experiment_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_plot", lambda measured, noise, file: None)
    monkeypatch.setattr(paths, "CLIPS", 1)
    monkeypatch.setattr(paths, "INVERTED_STEPS", (2, 4))
    page = paths.run(tmp_path).read_text()
    assert "| `initial` |" in page and "| 4 | " in page
    rows = (tmp_path / "page/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 5 * STEPS
