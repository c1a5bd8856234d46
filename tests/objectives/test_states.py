"""What the network is shown for a pair: a function of seed, pair and epoch, and the same for winner and loser."""

import dataclasses

import pytest
import torch

from alignkit.objectives.laws import start_law
from alignkit.objectives.states import training_states
from alignkit.stores.pairs import PairStore, collate

SHARE = 0.4


@pytest.fixture(scope="module")
def store(made_pairs):
    return PairStore(made_pairs / "pairs" / "train")


def shown(config, model, store, ids, epoch):
    """The states of pair 0's tensors under other ids."""
    pair = store[0]
    batch = collate([dataclasses.replace(pair, id=number) for number in ids])
    epochs = torch.full((len(ids),), epoch)
    return training_states(config, model, start_law(config, model), batch, epochs, store.empty_text, torch.float32)


def is_empty(states, model, store):
    """Which rows carry the empty prompt, bool [2B]."""
    empty = model.pad_text([store.empty_text])
    return (states.text == empty).flatten(1).all(dim=1)


def test_captions_are_dropped_for_winner_and_loser_together_in_the_wanted_share(small_config, wan, store):
    config = small_config(f"train.caption_dropout={SHARE}")
    ids = range(400)
    dropped = is_empty(shown(config, wan, store, ids, 0), wan, store)
    assert torch.equal(dropped[:400], dropped[400:])
    # a binomial's four standard deviations; the keys are fixed, so this never flickers
    assert abs(dropped.double().mean().item() - SHARE) < 4 * (SHARE * (1 - SHARE) / 400) ** 0.5
    again = is_empty(shown(config, wan, store, ids[200:], 0), wan, store)
    assert torch.equal(again[:200], dropped[200:400]), "a pair's captions depend on its batch"
    other = is_empty(shown(config, wan, store, ids, 1), wan, store)
    assert not torch.equal(other, dropped), "every epoch drops the same captions"


def test_captions_stay_without_dropout_and_go_with_all_of_it(small_config, wan, store):
    assert not is_empty(shown(small_config(), wan, store, range(8), 0), wan, store).any()
    assert is_empty(shown(small_config("train.caption_dropout=1.0"), wan, store, range(8), 0), wan, store).all()
    with torch.no_grad():
        assert torch.equal(store.empty_text, wan.encode_text([""])[0])


def test_dropping_captions_leaves_noise_and_timesteps_alone(small_config, wan, store):
    plain, dropped = (
        shown(small_config(f"train.caption_dropout={share}"), wan, store, range(4), 3) for share in (0.0, 1.0)
    )
    assert torch.equal(plain.inputs, dropped.inputs) and torch.equal(plain.timesteps, dropped.timesteps)
