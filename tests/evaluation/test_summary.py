"""The verdict: alignment counts as reached only when every criterion holds at once."""

import copy

import pytest
import torch

from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.summary import attributes_in, criteria
from alignkit.stores.pairs import PairStore
from alignkit.training.run import load_rows

AFTER = {"region_accuracy": 0.75, "comparisons": 200, "error_w_before": 0.5, "error_w_after": 0.502}
PICTURES = {
    "frechet": {"base": [1.0, 1.2, 1.1], "aligned": [1.2, 1.3, 1.1]},
    "motion": {"real": 2.0, "real_through_vae": 4.0, "base": 3.0, "aligned": 3.7},
    "classifier": {"base": 0.9, "aligned": 0.85, "samples": 64},
}


def reached(after=AFTER, pictures=PICTURES):
    return {check["name"]: check["reached"] for check in criteria(after, pictures)}


def test_all_criteria_can_hold():
    assert all(reached().values()) and len(reached()) == 6


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("accuracy", ("after", "region_accuracy"), 0.69),
        ("winner error", ("after", "error_w_after"), 0.5051),
        ("frechet distance", ("frechet", "aligned"), [1.2, 1.4, 1.5]),
        ("motion", ("motion", "aligned"), 2.9),
        ("prompt followed (base)", ("classifier", "base"), 0.79),
        ("prompt followed (aligned)", ("classifier", "aligned"), 0.79),
    ],
)
def test_each_criterion_fails_alone(name, place, value):
    after, pictures = dict(AFTER), copy.deepcopy(PICTURES)
    (after if place[0] == "after" else pictures[place[0]])[place[1]] = value
    assert [key for key, ok in reached(after, pictures).items() if not ok] == [name]


def test_motion_closer_than_the_bases_is_enough():
    pictures = copy.deepcopy(PICTURES)
    pictures["motion"]["aligned"] = 3.2  # 20 % off, where the base was 25 % off
    assert reached(pictures=pictures)["motion"]


def test_what_cannot_be_measured_is_not_reached():
    checks = reached(pictures={**PICTURES, "frechet": None, "classifier": None})
    assert checks == {"accuracy": True, "winner error": True, "frechet distance": False, "motion": True}


def test_prompts_name_their_attributes():
    named = attributes_in("A red circle moves left on a plain background.")
    assert named == {"shape": "circle", "colour": "red", "motion": "left"}
    assert attributes_in("A brown bear walks over rocks.") is None


@pytest.fixture(scope="module")
def heldout(made_pairs):
    return PairStore(made_pairs / "pairs" / "heldout")


def test_a_model_compared_with_itself_scores_exactly_one_half(small_config, wan, heldout):
    scores = score_pairs(small_config(), wan, heldout, wan.transformer, wan.transformer, "", torch.device("cpu"))
    result = describe(scores)
    assert result["region_accuracy"] == result["global_accuracy"] == 0.5
    assert result["error_w_before"] == result["error_w_after"] > 0


def test_scores_of_a_pair_do_not_depend_on_its_batch(small_config, wan, heldout):
    """The network's own batch arithmetic aside: keys, states and labels stay with the pair."""
    moved = copy.deepcopy(wan.transformer)
    with torch.no_grad():
        moved.proj_out.bias += 0.01
    whole, single = (
        score_pairs(
            small_config(f"evaluation.batch_size={size}"), wan, heldout, moved, wan.transformer, "", torch.device("cpu")
        )
        for size in (2, 1)
    )
    # β/2 times a difference of errors near 1 whose predictions carry some 10³ fp32 roundings
    torch.testing.assert_close(whole.region_logit, single.region_logit, rtol=0, atol=2500 * 1e3 * 2**-24)


def test_loading_rows_keeps_pairs_together(heldout):
    batch = load_rows(heldout, [1, 0], torch.device("cpu"))
    assert batch.ids.tolist() == [heldout.ids[1], heldout.ids[0]]
    outside = ~batch.mask.bool().expand_as(batch.winner)
    assert torch.equal(batch.winner[outside], batch.loser[outside])
