"""What the evaluation is made of: held-out pairs scored, prompts read."""

import copy

import pytest
import torch

from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.stores.pairs import PairStore
from alignkit.tiny.classifier import attributes_in
from alignkit.training.run import load_rows


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
