"""Every training objective against its formula in plain torch, value and gradient, and where each of them starts."""

import dataclasses
import math

import pytest
import torch

from alignkit.config import OBJECTIVES, ObjectiveSection
from alignkit.objectives import heads, terms
from alignkit.objectives.diagnostics import diagnostics
from alignkit.objectives.preference import (
    needs_reference,
    preference_loss,
    supervised_loss,
)
from alignkit.objectives.scored import ReferenceErrors, score
from alignkit.objectives.states import States
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import InputError, local_dpo_loss
from alignkit_kernels.preference import HEADS

BETA = 300.0
PREFERENCES = [name for name in OBJECTIVES if name != "sft"]
SHAPE = (4, 3, 2, 5, 6)
# Everything is fp64 here. Sums run over N = 180 terms and errors, some 10 in all, are near 2, so means are off by at
# most N·2⁻⁵³·2 = 4e-14, and logits by β/2 = 150 times that: 6e-12. Losses and gradients are no steeper (ipo's 2z
# with |z| below 10 is 20 times that, relative to values as much larger).
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


def objective(name, **keys):
    return ObjectiveSection(name=name, **({"beta": BETA} if name != "sft" else {}), **keys)


@pytest.fixture
def pairs():
    """Four pairs of random fp64 latents: a common mask, another, an empty one, one that holds everything.

    The last pair prefers its loser. Returns batch, states, predictions, references and targets.
    """
    generator = torch.Generator().manual_seed(0)
    winner, loser, noise, *moves = torch.randn(7, *SHAPE, generator=generator, dtype=torch.float64).unbind()
    mask = torch.zeros(4, 1, *SHAPE[2:], dtype=torch.uint8)
    mask[0, ..., 1:3], mask[1, :, 1:, 2:] = 1, 1
    mask[3] = 1
    batch = PairBatch(torch.arange(4), winner, loser, mask, [], torch.tensor([0.75, 0.8, 0.9, 0.84]).double())
    a = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)
    coefficients = torch.stack([a, 1 - a, torch.ones_like(a), -torch.ones_like(a)], dim=1)
    targets = noise - winner, noise - loser
    references = tuple(target + 0.5 * move for target, move in zip(targets, moves[:2], strict=True))
    predictions = tuple((r + 0.02 * move).requires_grad_() for r, move in zip(references, moves[2:], strict=True))
    return batch, States(torch.empty(0), torch.empty(0), torch.empty(0), coefficients, noise), predictions, references


def plain_loss(section, batch, states, predictions, references):
    """The loss, [B], of squared errors that torch differentiates by itself."""
    axes = (1, 2, 3, 4)
    errors, gaps, inside, outside = [], [], [], []
    mask = batch.mask.expand(SHAPE).double()
    for clean, p, r in zip((batch.winner, batch.loser), predictions, references, strict=True):
        target = states.noise_w - clean
        difference = (p - target) ** 2 - (r - target) ** 2
        errors.append(((p - target) ** 2).mean(axes))
        gaps.append(difference.mean(axes))
        inside.append((difference * mask).sum(axes) / mask.sum(axes).clamp(min=1))
        outside.append((difference * (1 - mask)).sum(axes) / (1 - mask).sum(axes).clamp(min=1))

    def logit(sides):
        return -section.beta / 2 * (sides[0] - sides[1])

    def sigmoid_loss(z):
        softplus, e = torch.nn.functional.softplus, section.label_smoothing
        return (1 - e) * softplus(-z) + e * softplus(z)

    has_inside, has_outside = mask.amax(axes), (1 - mask).amax(axes)
    z, e = logit(gaps), section.label_smoothing
    sft = section.weight_sft * errors[0]
    match section.name:
        case "poly_dpo":
            p = torch.sigmoid(z)
            return -p.log() + section.poly_alpha * (1 - p) + sft
        case "winner_guarded":
            guard = section.guard_weight * states.coefficients[:, 0] ** section.guard_exponent
            return (1 + (-z).exp() + (guard * section.beta * errors[0] / 2).exp()).log() + sft
        case "local_dpo":
            low, high = section.strength_range
            factor = 1 if batch.strength is None else 1 + (batch.strength - low) / (high - low)
            region = sigmoid_loss(factor * logit(inside)) * has_inside
            return section.weight_region * region + section.weight_global * sigmoid_loss(z) + sft
        case "dpo":
            return sigmoid_loss(z) + sft
        case "robust_dpo":
            softplus = torch.nn.functional.softplus
            return ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e)
        case "ipo":
            return (z - 0.5) ** 2
        case "hinge":
            return (1 - z).clamp(min=0)
        case "region_dpo":
            terms = sigmoid_loss(logit(inside)) * has_inside + sigmoid_loss(logit(outside)) * has_outside
            return terms / (has_inside + has_outside)
        case "sft":
            return errors[0]


def training_loss_of(section, batch, states, predictions, references):
    if needs_reference(section):
        return preference_loss(section, predictions, references, batch, states)
    return supervised_loss(predictions[0], batch, states)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("local_dpo", {}),
        ("local_dpo", {"weight_region": 0.3, "weight_global": 2.0}),
        ("dpo", {}),
        ("local_dpo", {"weight_sft": 30.0}),
        ("dpo", {"label_smoothing": 0.2}),
        ("dpo", {"weight_sft": 30.0}),
        ("poly_dpo", {"poly_alpha": 0.7}),
        ("winner_guarded", {}),
        ("winner_guarded", {"guard_weight": 0.02, "guard_exponent": 0.0, "weight_sft": 2.0}),
        ("robust_dpo", {"label_smoothing": 0.2}),
        ("ipo", {}),
        ("hinge", {}),
        ("region_dpo", {}),
        ("region_dpo", {"label_smoothing": 0.2}),
        ("sft", {}),
    ],
)
def test_value_and_gradient_are_the_formulas(pairs, name, keys):
    section = objective(name, **keys)
    predictions = pairs[2]
    got, want = training_loss_of(section, *pairs), plain_loss(section, *pairs)
    torch.testing.assert_close(got.loss_per_pair, want, **TOLERANCE)
    assert torch.equal(got.loss, got.loss_per_pair.mean())
    gradients, wanted = (torch.autograd.grad(loss, predictions, allow_unused=True) for loss in (got.loss, want.mean()))
    for side, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        assert (a is None) == (b is None) == (name == "sft" and side == 1)
        if a is not None:
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, **TOLERANCE)


def test_every_name_of_the_configuration_is_an_objective():
    names = ObjectiveSection.model_fields["name"].annotation.__args__
    functions = {name for name, f in vars(heads).items() if getattr(f, "__module__", None) == heads.__name__}
    assert set(names) == set(OBJECTIVES) == {*functions, "sft"} - {"guard_of"} <= set(HEADS)


@pytest.mark.parametrize("safeguard", [None, 0.3])
@pytest.mark.parametrize("name", PREFERENCES)
def test_terms_of_ones_own_take_the_same_steps_one_by_one(pairs, monkeypatch, name, safeguard):
    """With a term that the fused loss does not know, of no weight here: the same numbers and gradients."""
    section = objective(name, loser_safeguard=safeguard)
    batch, states, predictions, references = pairs
    states = dataclasses.replace(states, weight=torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64))
    want = preference_loss(section, predictions, references, batch, states)
    monkeypatch.setitem(terms.TERMS, "weight_own", None)
    got = preference_loss(section, predictions, references, batch, states)
    for field in dataclasses.fields(got):
        torch.testing.assert_close(getattr(got, field.name), getattr(want, field.name), **TOLERANCE)
    for a, b in zip(*(torch.autograd.grad(x.loss, predictions) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_dpo_is_the_number_that_four_public_implementations_give():
    def f(p, q, amplitude=1.0):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        return (amplitude * torch.sin(p * i + q) * torch.cos(0.37 * p * i - q)).reshape(shape)

    shape = (2, 4, 3, 6, 8)
    winner, loser, noise = f(0.731, 0.1), f(0.577, 0.9), f(1.37, 0.3, 1.4)
    references = noise - winner + f(2.11, 0.5, 0.5), noise - loser + f(1.91, 0.2, 0.5)
    predictions = references[0] + f(0.911, 0.4, 0.02), references[1] + f(1.13, 0.7, 0.02)
    batch = PairBatch(torch.arange(2), winner, loser, torch.ones(2, 1, 1, 1, 1, dtype=torch.uint8), [], None)
    coefficients = torch.tensor([[0.5, 0.5, 1.0, -1.0]] * 2, dtype=torch.float64)
    states = States(torch.empty(0), torch.empty(0), torch.empty(0), coefficients, noise)
    section = ObjectiveSection(name="dpo", beta=2000.0)
    got = preference_loss(section, predictions, references, batch, states)
    # sums of 576 fp64 terms are off by at most 576·2⁻⁵³ = 6e-14 of themselves; the loss moves by half of its logit
    assert got.loss.item() == pytest.approx(0.685913732547309, rel=1e-13)
    logged = diagnostics(section, got, states)
    digits = 5.1e-11  # half of the last of the ten decimals given, and rounding
    assert logged["rewards/margins"].tolist() == pytest.approx([0.0747177662, -0.0439067016], abs=digits)
    assert logged["rewards/chosen"].mean().item() == pytest.approx(-0.0874429172, abs=digits)
    assert logged["rewards/rejected"].mean().item() == pytest.approx(-0.1028484494, abs=digits)


@pytest.mark.parametrize(
    ("name", "keys", "start"),
    [
        ("local_dpo", {"weight_sft": 0.0}, [2 * math.log(2)] * 2 + [math.log(2), 2 * math.log(2)]),
        ("dpo", {}, [math.log(2)] * 4),
        ("dpo", {"label_smoothing": 0.3}, [math.log(2)] * 4),
        ("robust_dpo", {"label_smoothing": 0.3}, [math.log(2)] * 4),
        ("region_dpo", {}, [math.log(2)] * 4),
        ("ipo", {}, [0.25] * 4),
        ("hinge", {}, [1.0] * 4),
    ],
)
def test_where_each_loss_starts(pairs, name, keys, start):
    batch, states, _, references = pairs
    same = tuple(r.clone() for r in references)
    got = preference_loss(objective(name, **keys), same, references, batch, states)
    assert all((z == 0).all() for z in got.logits.values())
    # every term is exact but a logarithm or a mean of fp64: a few roundings of 1.1e-16 each
    assert got.loss_per_pair.tolist() == pytest.approx(start, rel=1e-14)


def test_local_dpo_is_the_fused_loss_bit_for_bit(pairs):
    """One path for all objectives: with the safeguard off nothing is lost to it."""
    batch, states, predictions, references = pairs
    section = objective("local_dpo", weight_region_sft=0.2)
    got = preference_loss(section, predictions, references, batch, states)
    fused = local_dpo_loss(
        *predictions, reference_w=references[0], reference_l=references[1], clean_w=batch.winner, clean_l=batch.loser,
        coefficients=states.coefficients, noise_w=states.noise_w, regions=batch.mask, strength=batch.strength,
        beta=BETA, weight_region_sft=0.2,
    )  # fmt: skip
    assert torch.equal(got.loss_per_pair, fused.loss_per_pair) and torch.equal(got.loss, fused.loss)
    assert torch.equal(got.logits["region"], fused.logits_region)
    assert torch.equal(got.means.region_gap_l, fused.region_gap_l)
    mine, theirs = (torch.autograd.grad(loss, predictions) for loss in (got.loss, fused.loss))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_label_smoothing_near_a_half_tells_winner_and_loser_apart_no_more(pairs):
    """At ε → ½ the conservative loss is the same with the sides swapped; at 0 it is not. Robust DPO keeps apart."""
    batch, states, predictions, references = pairs
    swapped = dataclasses.replace(batch, winner=batch.loser, loser=batch.winner)
    near = 0.5 - 1e-12
    for name, smoothing, alike in (("dpo", near, True), ("region_dpo", near, True), ("dpo", 0.0, False)):
        section = objective(name, label_smoothing=smoothing)
        one = preference_loss(section, predictions, references, batch, states).loss_per_pair
        other = preference_loss(section, predictions[::-1], references[::-1], swapped, states).loss_per_pair
        # both sides differ by (1 − 2·smoothing)·z = 2e-12·z, with |z| below 20, and by TOLERANCE's rounding
        assert torch.allclose(one, other, rtol=0, atol=1e-10) == alike
    robust = preference_loss(objective("robust_dpo", label_smoothing=0.2), predictions, references, batch, states)
    flipped = preference_loss(
        objective("robust_dpo", label_smoothing=0.2), predictions[::-1], references[::-1], swapped, states
    )
    clean = preference_loss(objective("dpo"), predictions, references, batch, states)
    mean = 0.8 * robust.loss_per_pair + 0.2 * flipped.loss_per_pair
    torch.testing.assert_close(mean, clean.loss_per_pair, **TOLERANCE)


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "poly_dpo", "ipo", "hinge", "local_dpo", "region_dpo"])
def test_the_safeguard_keeps_the_winners_error_from_rising(pairs, name):
    """Winner and loser move alike (both predictions shift by the same parameters), the loser's residual is larger than
    the winner's, more so inside the mask: the plain gradient raises the winner's error, the safeguarded one does not to
    first order, with the loss's own weights by region."""
    batch, states, (winner, _), references = pairs
    residual = winner.detach() - (states.noise_w - batch.winner)
    larger = 2 + 3 * batch.mask.double()
    loser = states.noise_w - batch.loser + larger * residual + 0.1 * references[0]
    own = {"weight_sft": 0.0} if name == "local_dpo" else {}  # it would hold the winner's error down by itself

    def rise(**keys):
        shift = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
        predictions = winner.detach() + shift, loser + shift
        same = tuple(p.detach() for p in predictions)  # at step 0 every logit is 0 and every pair teaches
        got = preference_loss(objective(name, **keys, **own), predictions, same, batch, states)
        (gradient,) = torch.autograd.grad(got.loss, shift)
        return -(2 * residual * gradient).sum((1, 2, 3, 4)), got

    unguarded, off = rise()
    guarded, on = rise(loser_safeguard=0.0)
    halved, half = rise(loser_safeguard=0.5)
    assert (unguarded > 1e-3).all() and (guarded.abs() < 1e-12).all() and (halved < -1e-3).all()
    assert torch.equal(off.loss_per_pair, on.loss_per_pair) and off.safeguard is None
    assert ((on.safeguard > 0.15) & (on.safeguard < 0.5)).all()
    torch.testing.assert_close(half.safeguard, on.safeguard / 2, **TOLERANCE)


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_safeguard_scales_the_losers_gradient_alone(pairs, name):
    batch, states, (winner, _), _ = pairs
    loser = (states.noise_w - batch.loser + 2 * (winner - states.noise_w + batch.winner)).detach().requires_grad_()
    pairs = batch, states, (winner, loser), (winner.detach(), loser.detach())  # at step 0 every pair teaches
    own = {"local_dpo": {"weight_sft": 0.0}, "winner_guarded": {"guard_weight": 0.0}}.get(name, {})
    off, on = (training_loss_of(objective(name, **keys, **own), *pairs) for keys in ({}, {"loser_safeguard": 0.0}))
    plain, guarded = (torch.autograd.grad(result.loss, (winner, loser)) for result in (off, on))
    assert torch.equal(plain[0], guarded[0])
    torch.testing.assert_close(on.safeguard, torch.full((4,), 0.5, dtype=torch.float64), **TOLERANCE)
    torch.testing.assert_close(guarded[1], plain[1] * on.safeguard.view(4, 1, 1, 1, 1), **TOLERANCE)


def test_the_safeguard_counts_what_holds_the_winner_down_as_well(pairs):
    """The SFT term's own pull on the winner leaves more room for the loser's."""
    batch, states, (winner, _), _ = pairs
    residual = winner.detach() - (states.noise_w - batch.winner)
    predictions = winner.detach(), states.noise_w - batch.loser + 3 * residual
    kept = [
        preference_loss(objective("dpo", weight_sft=w, loser_safeguard=0.0), predictions, predictions, batch, states)
        for w in (0.0, BETA / 4, 100 * BETA)
    ]
    # at step 0 the preference pulls with β/4 on either side, so as much again for the winner doubles what may be kept
    third = torch.full((4,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(kept[0].safeguard, third, **TOLERANCE)
    torch.testing.assert_close(kept[1].safeguard, 2 * third, **TOLERANCE)
    assert (kept[2].safeguard == 1).all()


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_references_errors_do_for_its_predictions(pairs, name):
    """Also where the safeguard holds the loser back: the same loss, gradient and numbers."""
    batch, states, predictions, references = pairs
    section = objective(name, loser_safeguard=0.5)
    sums = score(references, None, batch, states)
    assert sums.gap_w is None and sums.gap_l is None
    want = preference_loss(section, predictions, references, batch, states)
    got = preference_loss(section, predictions, ReferenceErrors(sums.error_w, sums.error_l), batch, states)
    torch.testing.assert_close(got.loss_per_pair, want.loss_per_pair, **TOLERANCE)
    torch.testing.assert_close(got.safeguard, want.safeguard, **TOLERANCE)
    for a, b in zip(*(torch.autograd.grad(x.loss, predictions) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    numbers, wanted = (diagnostics(section, x, states) for x in (got, want))
    assert numbers.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(numbers[key], wanted[key], **TOLERANCE)


def test_errors_of_the_policys_own_predictions_leave_no_gap(pairs):
    batch, states, predictions, _ = pairs
    sums = score(predictions, None, batch, states)
    got = preference_loss(
        objective("local_dpo"), predictions, ReferenceErrors(sums.error_w, sums.error_l), batch, states
    )
    assert all((z == 0).all() for z in got.logits.values())


def test_sides_may_have_noise_of_their_own_and_pairs_a_weight(pairs):
    """What the sources and laws of trajectory matching need: today's laws leave the weight out, which is 1."""
    batch, states, predictions, references = pairs
    other = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shared = preference_loss(objective("dpo"), predictions, references, batch, states)
    apart = dataclasses.replace(states, noise_l=other)
    got = preference_loss(objective("dpo"), predictions, references, batch, apart)
    squares = [((x - (other - batch.loser)) ** 2).mean((1, 2, 3, 4)) for x in (predictions[1], references[1])]
    torch.testing.assert_close(got.means.gap_l, squares[0] - squares[1], **TOLERANCE)
    assert torch.equal(got.means.gap_w, shared.means.gap_w) and not torch.equal(got.means.gap_l, shared.means.gap_l)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    weighted = preference_loss(
        objective("dpo"), predictions, references, batch, dataclasses.replace(states, weight=weight)
    )
    assert torch.equal(weighted.loss_per_pair, shared.loss_per_pair)
    torch.testing.assert_close(weighted.loss, (weight * shared.loss_per_pair).mean(), **TOLERANCE)
    alone = supervised_loss(predictions[0], batch, dataclasses.replace(states, weight=weight))
    torch.testing.assert_close(alone.loss, (weight * alone.loss_per_pair).mean(), **TOLERANCE)


def logged(section, *pairs):
    return diagnostics(section, training_loss_of(section, *pairs), pairs[1])


def test_what_is_logged_is_what_the_objective_defines(pairs):
    always = {"loss", "error_w", "noise_level"}
    compared = always | {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    compared |= {"error_l", "region_empty", "global/gap_w", "global/gap_l"}
    compared |= {f"region/{name}" for name in ("accuracy", "logit", "gap_w", "gap_l")}
    whole, region = ({f"{name}/gradient_factor", f"{name}/saturated"} for name in ("global", "region"))
    expected = {"local_dpo": compared | whole | region, "dpo": compared | whole, "robust_dpo": compared | whole}
    expected |= {"poly_dpo": compared | whole, "winner_guarded": compared | whole}
    expected |= {"region_dpo": compared | region, "ipo": compared, "hinge": compared, "sft": always}
    for name, names in expected.items():
        numbers = logged(objective(name), *pairs)
        assert numbers.keys() == names, name
        assert all(x.shape == (4,) and x.dtype == torch.float64 and not x.requires_grad for x in numbers.values())
        if name != "sft":
            assert logged(objective(name, loser_safeguard=0.0), *pairs).keys() == names | {"safeguard/factor"}
            section = ObjectiveSection(name=name, beta="auto")
            got = diagnostics(section, preference_loss(section, *pairs[2:], *pairs[:2], beta=BETA), pairs[1])
            assert got.keys() == names | {"beta", "global/gap_distance"} and (got["beta"] == BETA).all()


def test_what_is_logged_are_the_plain_numbers(pairs):
    """Every diagnostic of every pair against squared errors written out; the last pair prefers its loser."""
    batch, states, predictions, references = pairs
    beta, axes, mask = 4000.0, (1, 2, 3, 4), batch.mask.expand(SHAPE).double()
    squares = [[(x - (states.noise_w - clean)) ** 2 for x in (p, r)]
               for clean, p, r in zip((batch.winner, batch.loser), predictions, references, strict=True)]  # fmt: skip
    errors = [policy.mean(axes) for policy, _ in squares]
    gaps = [(policy - reference).mean(axes) for policy, reference in squares]
    inside = [((policy - reference) * mask).sum(axes) / mask.sum(axes).clamp(min=1) for policy, reference in squares]
    rewards = [-beta / 2 * gap for gap in gaps]
    whole = rewards[0] - rewards[1]
    plain = -beta / 2 * (inside[0] - inside[1])
    scaled = plain * (1 + (batch.strength - 0.75) / 0.15)
    wanted = {
        "rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/margins": whole,
        "rewards/accuracies": (whole > 0).double(), "global/gap_w": gaps[0], "global/gap_l": gaps[1],
        "region/gap_w": inside[0], "region/gap_l": inside[1], "error_w": errors[0], "error_l": errors[1],
        "region_empty": torch.tensor([0.0, 0.0, 1.0, 0.0]), "noise_level": states.coefficients[:, 1],
    }  # fmt: skip
    for name, region in (("local_dpo", scaled), ("dpo", plain), ("region_dpo", plain)):
        numbers = logged(ObjectiveSection(name=name, beta=beta), *pairs)
        expected = wanted | {"region/logit": region}
        expected["region/accuracy"] = (region > 0).double() + 0.5 * (region == 0).double()
        for of, logit in (("global", whole), ("region", region)):
            if f"{of}/saturated" in numbers:
                expected[f"{of}/gradient_factor"] = 1 / (1 + logit.exp())
                expected[f"{of}/saturated"] = (logit.abs() > 6).double()
        assert numbers.keys() == expected.keys() | {"loss"}
        for key, value in expected.items():
            assert torch.allclose(numbers[key], value.detach().double(), **TOLERANCE), key
    assert 0 < whole.gt(0).sum() < 4 and 0 < scaled.abs().gt(6).sum() < 4, "both outcomes occur"


@pytest.mark.parametrize("name", [*PREFERENCES, "sft"])
def test_pairs_without_a_mask_and_without_a_strength(pairs, name):
    """A mask of one cell that holds everything: the region is the whole, its outside is empty, nothing divides by 0."""
    batch, states, predictions, references = pairs
    bare = dataclasses.replace(batch, mask=torch.ones(4, 1, 1, 1, 1, dtype=torch.uint8), strength=None)
    section = objective(name)
    got = training_loss_of(section, bare, states, predictions, references)
    numbers = logged(section, bare, states, predictions, references)
    assert all(x.isfinite().all() for x in numbers.values())
    torch.testing.assert_close(
        got.loss_per_pair, plain_loss(section, bare, states, predictions, references), **TOLERANCE
    )
    if name != "sft":
        assert not numbers["region_empty"].any()
        assert torch.equal(numbers["region/logit"], numbers["rewards/margins"])
        torch.autograd.grad(got.loss, predictions)


def test_a_strength_outside_the_range_is_refused(pairs):
    batch, *rest = pairs
    strange = dataclasses.replace(batch, strength=torch.tensor([0.8, 0.5, 0.8, 0.8]).double())
    with pytest.raises(InputError, match="strength must lie in strength_range"):
        training_loss_of(objective("local_dpo"), strange, *rest)
    training_loss_of(objective("dpo"), strange, *rest)  # which does not read it
