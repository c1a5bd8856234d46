"""Each side at states of its own path: what the network is shown, and the noise its errors are taken against."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from alignkit.config import load_config
from alignkit.models import load_model
from alignkit.objectives.diagnostics import inversion_numbers, signal
from alignkit.objectives.laws import start_law
from alignkit.objectives.preference import preference_loss
from alignkit.objectives.states import SOURCES, predictions, training_states
from alignkit.stores.origins import REAL, Origin, Trajectory
from alignkit.stores.pairs import PairStore, collate
from alignkit.training.distributed import Process
from alignkit.training.run import Run
from alignkit_kernels import NoiseKey, PathState, Stream, add_keyed_noise, keyed_randn, pair_region_errors

EPOCHS = torch.tensor([2, 2])


@pytest.fixture(scope="module")
def pairs(made_rollouts):
    return list(PairStore(made_rollouts / "pairs" / "train"))


@pytest.fixture
def config(rollout_overrides, config_file, tmp_path):
    return lambda *more: load_config(config_file, rollout_overrides(tmp_path / "run", *more))


@pytest.fixture(scope="module")
def model(config_file):
    return load_model(load_config(config_file).model, with_encoders=False)


def noised(config, model, pairs, epochs=EPOCHS):
    batch = collate(pairs)
    return batch, SOURCES[config.noise.source](config, start_law(config, model), batch, epochs)


def key_of(*origins):
    words = torch.tensor([origin.key for origin in origins])
    return NoiseKey(words[:, 0], words[:, 1], words[:, 2], words[:, 3])


def inverted(pair, side, error=0.1):
    """`pair` with a real video on a side, and states that look as if they had been inverted."""
    states = torch.randn(3, *pair.winner.shape, generator=torch.Generator().manual_seed(1))
    path = {f"path_{side}": Trajectory(states, states.flip(0), error), f"origin_{side}": REAL}
    return dataclasses.replace(pair, **path)


def test_path_shows_both_sides_at_one_stored_row(config, model, pairs):
    _, shown = noised(config("noise.path_between=false"), model, pairs[:2])
    for i, pair in enumerate(pairs[:2]):
        place = pair.path_rows.index(shown.rows[i])
        assert torch.equal(shown.winner[i], pair.path_w.states[place])
        assert torch.equal(shown.loser[i], pair.path_l.states[place])
        assert torch.equal(shown.coefficients[i], model.schedule(6).coefficients[shown.rows[i]])
        assert shown.timesteps[i] == model.schedule(6).timesteps[shown.rows[i]]
    assert isinstance(shown.noise_w, PathState) and torch.equal(shown.noise_l.state, shown.loser)
    rows = {
        int(noised(config("noise.path_between=false"), model, pairs[:1], torch.tensor([e]))[1].rows) for e in range(40)
    }
    assert rows == set(pairs[0].path_rows), "training draws among the stored rows"


def test_between_is_the_line_to_the_state_that_follows(config, model, pairs):
    _, shown = noised(config(), model, pairs[:2])
    law = start_law(config(), model)
    for i, pair in enumerate(pairs[:2]):
        row, (a, s) = int(shown.rows[i]), shown.coefficients[i, :2].tolist()
        high, low = law.schedule.coefficients[row, 1].item(), law.schedule.coefficients[row + 1, 1].item()
        assert low < s <= high and a == pytest.approx(1 - s)
        share = (high - s) / (high - low)
        place = pair.path_rows.index(row)
        line = (1 - share) * pair.path_w.states[place] + share * pair.path_w.following[place]
        torch.testing.assert_close(shown.winner[i], line, rtol=0, atol=1e-6)
    shares = [noised(config(), model, pairs[:1], torch.tensor([e]))[1].coefficients[0, 1].item() for e in range(20)]
    assert len(set(shares)) == 20


def test_initial_regenerates_each_sides_starting_noise_in_registers(config, model, pairs):
    settings = config("noise.source=initial", "noise.path_between=false")
    batch, shown = noised(settings, model, pairs[:2])
    for clean, state, noise, side in (
        (batch.winner, shown.winner, shown.noise_w, "origin_w"), (batch.loser, shown.loser, shown.noise_l, "origin_l"),
    ):  # fmt: skip
        assert isinstance(noise, NoiseKey)
        started = keyed_randn(clean.shape, key_of(*(getattr(pair, side) for pair in pairs[:2])), device="cpu")
        a, s = (shown.coefficients[:, i].view(-1, 1, 1, 1, 1) for i in range(2))
        torch.testing.assert_close(state.double(), a * clean + s * started, rtol=0, atol=1e-6)
    law = start_law(settings, model)
    assert torch.equal(shown.rows, law.draw(batch.ids, EPOCHS).rows), "rows are the law's, whatever is stored"


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_seeds_may_use_all_their_bits(config, model, pairs, seed):
    key = (seed, 7, 3, int(Stream.ROLLOUT))
    pair = dataclasses.replace(pairs[0], origin_w=dataclasses.replace(pairs[0].origin_w, key=key))
    assert Origin.from_json(pair.origin_w.to_json()) == pair.origin_w
    batch, shown = noised(config("noise.source=initial", "noise.path_between=false"), model, [pair], EPOCHS[:1])
    known = add_keyed_noise(batch.winner, shown.coefficients, NoiseKey(seed, torch.tensor([7]), 3, Stream.ROLLOUT))
    assert torch.equal(shown.winner, known)


def test_a_regenerated_loser_and_its_original_share_the_corruption_noise(made_pairs, small_config, model):
    local = list(PairStore(made_pairs / "pairs" / "train"))[:2]
    settings = small_config("noise.source=initial", "noise.interval=[0.1,0.5]")
    batch, shown = noised(settings, model, local)
    key = NoiseKey(settings.pairs.seed, batch.ids, 0, Stream.CORRUPTION)
    assert torch.equal(shown.loser, add_keyed_noise(batch.loser, shown.coefficients, key))
    assert torch.equal(shown.winner, add_keyed_noise(batch.winner, shown.coefficients, key))
    outside = ~batch.mask.bool().expand_as(batch.winner)
    assert torch.equal(shown.winner[outside], shown.loser[outside]), "outside the mask both paths are one"


def test_an_anchor_takes_the_pairs_fresh_noise_or_its_inversion(config, model, pairs):
    fresh = dataclasses.replace(pairs[0], origin_w=REAL, path_w=None)
    batch, shown = noised(config("noise.anchor=shared"), model, [fresh], EPOCHS[:1])
    key = NoiseKey(0, batch.ids, EPOCHS[:1], Stream.TRAINING)
    assert torch.equal(shown.winner, add_keyed_noise(batch.winner, shown.coefficients, key))
    assert isinstance(shown.noise_w, NoiseKey) and isinstance(shown.noise_l, PathState)
    anchored = inverted(pairs[0], "w")
    _, shown = noised(config("noise.path_between=false"), model, [anchored], EPOCHS[:1])
    place = pairs[0].path_rows.index(shown.rows[0])
    assert torch.equal(shown.winner[0], anchored.path_w.states[place])
    assert torch.equal(shown.loser[0], anchored.path_l.states[place])


@pytest.mark.parametrize("changes", [("noise.source=initial", "noise.path_between=false"), ("noise.anchor=shared",)])
def test_a_pairs_numbers_do_not_depend_on_its_company(config, model, pairs, changes):
    """In one micro-batch: sides with keys, sides with states, and both mixed on one side."""
    anchored = inverted(pairs[1], "w") if "initial" in changes[0] else dataclasses.replace(
        pairs[1], origin_w=REAL, path_w=None
    )  # fmt: skip
    together, epochs = [pairs[0], anchored, pairs[2]], torch.tensor([4, 4, 4])
    batch, shown = noised(config(*changes), model, together, epochs)
    prediction = [x * 0.5 for x in (batch.winner, batch.loser)]
    regions = {"regions": batch.mask, "num_regions": 2}
    whole = pair_region_errors(
        *prediction, batch.winner, batch.loser, shown.coefficients, shown.noise_w, shown.noise_l, **regions
    )
    for i, pair in enumerate(together):
        one, alone = noised(config(*changes), model, [pair], epochs[:1])
        assert torch.equal(alone.winner[0], shown.winner[i]) and torch.equal(alone.loser[0], shown.loser[i])
        assert torch.equal(alone.coefficients[0], shown.coefficients[i])
        errors = pair_region_errors(
            one.winner * 0.5, one.loser * 0.5, one.winner, one.loser, alone.coefficients, alone.noise_w, alone.noise_l,
            regions=one.mask, num_regions=2,
        )  # fmt: skip
        # states imply noise by a division by s, which is of another rounding written out than in the kernel
        torch.testing.assert_close(errors.error_w[0], whole.error_w[i], rtol=1e-5, atol=0)
        torch.testing.assert_close(errors.error_l[0], whole.error_l[i], rtol=1e-5, atol=0)


MODES = {
    "shared": ("noise.source=shared", "noise.path_between=false"),
    "initial": ("noise.source=initial", "noise.path_between=false"),
    "path": ("noise.path_between=false",),
    "path_between": (),
    "inversion": ("noise.source=inversion", "noise.path_between=false"),
    "guided": ("noise.path_between=false", "noise.guided=true"),
    "adaptive": ("noise.path_between=false", "noise.timesteps=adaptive"),
}


@pytest.mark.parametrize("mode", MODES)
def test_at_the_reference_every_logit_is_0_and_states_are_keyed(config, model, pairs, mode):
    """Nothing that runs before, no warm-up and no other sampler, changes them."""
    settings = config(*MODES[mode])
    chosen = [inverted(inverted(pair, "w"), "l") for pair in pairs[:2]] if mode == "inversion" else pairs[:2]
    empty, negative = torch.zeros(1, 16), torch.ones(3, chosen[0].text.shape[1])

    def states():
        batch, law = collate(chosen), start_law(settings, model)
        return batch, training_states(settings, model, law, batch, EPOCHS, empty, torch.float32, negative)

    batch, first = states()
    torch.manual_seed(1), torch.randn(1000), torch.nn.Linear(64, 64)
    keyed_randn((4, 1000), NoiseKey(9, torch.arange(4), 0), device="cpu")
    _, again = states()
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.timesteps, again.timesteps)
    with torch.no_grad():
        predicted = predictions(model, model.transformer, first).chunk(2)
        result = preference_loss(settings.objective, predicted, predicted, batch, first)
    assert all((z == 0).all() for z in result.logits.values()) and result.loss.item() == pytest.approx(
        0.6931471805599453
    )
    assert (result.means.error_w > 0).all() and (first.negative is not None) == (mode == "guided")


def test_guided_predictions_are_the_samplers_own_field(config, model, pairs):
    from alignkit.models.wan import guided

    settings = config("noise.guided=true", "noise.path_between=false")
    negative = torch.randn(3, pairs[0].text.shape[1], generator=torch.Generator().manual_seed(0))
    law, batch = start_law(settings, model), collate(pairs[:2])
    states = training_states(settings, model, law, batch, EPOCHS, negative[:1], torch.float32, negative)
    with torch.no_grad():
        ours = predictions(model, model.transformer, states)
        theirs = guided(
            model.transformer, states.inputs, states.timesteps, states.text, states.negative, settings.sampler.guidance
        )
        fewer = predictions(model, model.transformer, states, slice(2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    # some processors choose their sums by the number of rows: rounding, where another pair would be off by 1
    torch.testing.assert_close(fewer, ours[:2], rtol=0, atol=2e-5)
    plain = dataclasses.replace(states, negative=None)
    with torch.no_grad():
        assert (predictions(model, model.transformer, plain) - ours).abs().max() > 1e-3


def test_inversions_are_counted_and_those_far_off_flagged(pairs):
    batch = collate([inverted(pairs[0], "w", 0.3), inverted(inverted(pairs[1], "w", 0.1), "l", 0.2), pairs[2]])
    assert inversion_numbers(batch, None)["inversion/error"].tolist() == [0.3, 0.2, 0.0]
    assert inversion_numbers(batch, 0.25)["inversion/flagged"].tolist() == [1.0, 0.0, 0.0]


def test_the_adaptive_laws_signal_is_the_size_of_a_pairs_gradient():
    """σ(−z)·√(E_w + E_l): a pair that is learnt teaches nothing, one that is swapped teaches most."""
    z, errors = torch.tensor([[0.0, 40.0, -40.0], [0.09, 1.0, 0.5]], dtype=torch.float64)
    means = SimpleNamespace(error_w=errors, error_l=torch.zeros(3).double())
    got = signal(SimpleNamespace(logits={"global": z}, means=means))
    torch.testing.assert_close(got, torch.tensor([0.15, 0.0, 0.5**0.5], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_run_guides_away_from_the_negative_prompt_of_its_rollouts(made_rollouts, config, wan, model):
    store = PairStore(made_rollouts / "pairs" / "train")
    with torch.no_grad():
        assert torch.equal(store.negative_text, wan.encode_text(["blurred"])[0])
    assert not torch.equal(store.negative_text, store.empty_text)
    settings = config("noise.guided=true", "noise.path_between=false")
    policy = SimpleNamespace(module=model.transformer)
    process = Process(0, 1, 0, torch.device("cpu"))
    run = Run(settings, process, model, store, policy, None, start_law(settings, model), None)
    states = run.states(collate([store[0]]), EPOCHS[:1])
    assert torch.equal(states.negative[0], model.pad_text([store.negative_text])[0])
    assert states.guidance == settings.sampler.guidance > 1
