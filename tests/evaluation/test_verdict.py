"""The verdict: reached only when every criterion holds at once, and none where nothing can be judged."""

import copy

import numpy as np
import pytest

from alignkit.evaluation.intervals import paired_interval
from alignkit.evaluation.readiness import cannot_draw, too_few
from alignkit.evaluation.verdict import change_of, criteria, verdict

AFTER = {"region_accuracy": 0.75, "comparisons": 200, "error_w_before": 0.5, "error_w_after": 0.502}
PICTURES = {
    "frechet": {"base": [1.0, 1.2, 1.1], "aligned": [1.2, 1.3, 1.1]},
    "motion": {"real": 2.0, "real_through_vae": 4.0, "base": 3.0, "aligned": 3.7},
    "fault_rate": {"base": 0.4, "aligned": 0.2, "interval": [-0.3, -0.1], "samples": 64},
    "prompt_following": {"base": 0.8, "aligned": 0.8, "interval": [-0.1, 0.1], "samples": 64},
}


def reached(after=AFTER, pictures=PICTURES):
    return {check["name"]: check["reached"] for check in criteria(after, pictures)}


def test_all_criteria_can_hold():
    assert all(reached().values()) and len(reached()) == 6
    assert verdict(criteria(AFTER, PICTURES), []) == "reached"


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("accuracy", ("after", "region_accuracy"), 0.69),
        ("winner error", ("after", "error_w_after"), 0.5051),
        ("Fréchet distance", ("frechet", "aligned"), [1.2, 1.4, 1.5]),
        ("motion", ("motion", "aligned"), 2.9),
        ("faults", ("fault_rate", "aligned"), 0.21),
        ("prompt followed", ("prompt_following", "aligned"), 0.79),
    ],
)
def test_each_criterion_fails_alone(name, place, value):
    after, pictures = dict(AFTER), copy.deepcopy(PICTURES)
    (after if place[0] == "after" else pictures[place[0]])[place[1]] = value
    assert [key for key, ok in reached(after, pictures).items() if not ok] == [name]
    assert verdict(criteria(after, pictures), []) == "not reached"


@pytest.mark.parametrize(
    ("base", "aligned", "holds"),
    [(3.0, 3.2, True), (3.0, 2.9, False), (1.0, 2.9, False), (3.9, 3.65, True), (8.0, 5.1, False), (8.0, 4.9, True)],
)
def test_motion_has_a_bound_of_its_own(base, aligned, holds):
    """Real clips move by 4: within a tenth is near; else no further off than the base, and at most a quarter."""
    pictures = copy.deepcopy(PICTURES)
    pictures["motion"] |= {"base": base, "aligned": aligned}
    assert reached(pictures=pictures)["motion"] is holds


def test_a_base_with_few_faults_has_nothing_to_halve():
    pictures = copy.deepcopy(PICTURES)
    pictures["fault_rate"] |= {"base": 0.02, "aligned": 0.03}
    assert reached(pictures=pictures)["faults"]


def test_what_cannot_be_measured_is_not_reached():
    checks = reached(pictures={**PICTURES, "frechet": None, "fault_rate": None, "prompt_following": None})
    assert checks == {"accuracy": True, "winner error": True, "Fréchet distance": False, "motion": True}


def test_good_numbers_that_show_nothing_are_no_verdict():
    assert verdict(criteria(AFTER, PICTURES), ["too few"]) == "cannot be judged"
    assert verdict(criteria(AFTER | {"error_w_after": 0.6}, PICTURES), ["too few"]) == "cannot be judged"


def test_sixteen_clips_and_a_base_that_knows_such_videos_are_needed():
    assert too_few(16) is None and "data.heldout" in too_few(15) and "one clip is" in too_few(1)
    assert cannot_draw(0.5, "tiny") is None and "model.path" in cannot_draw(0.49, "tiny")


def test_a_paired_interval_holds_the_change_and_only_noise_that_is_not_shared_widens_it():
    rng = np.random.default_rng(0)
    before = rng.random(200) < 0.4
    assert paired_interval(before, before) == (0.0, 0.0)
    low, high = paired_interval(before, before & (rng.random(200) < 0.5))
    assert low < -0.2 < high < 0  # half of 0.4 are gone
    independent = paired_interval(before, rng.random(200) < 0.2)
    assert independent[1] - independent[0] > high - low
    assert change_of(before, before)["interval"] == [0.0, 0.0]
