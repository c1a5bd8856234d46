"""Heads that look after the winner or the size of a logit, and the safeguard with the loss's own region weights."""

import math

import pytest
import torch

from alignkit_kernels import InputError, losses

EPS = 2.0**-53
LOGITS = torch.tensor([-40.0, -1.5, 0.0, 0.7, 25.0], dtype=torch.float64)
ERRORS = torch.tensor([0.5, 0.02, 1.0, 0.3, 0.1], dtype=torch.float64)
# a dozen operations on terms of the result's own sign and size, each rounded once, twice over (theirs and ours)
ROUNDINGS = 24 * EPS


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, (0.81, 0.64, 0.25, 0.04, 0.0)])
def test_winner_guarded_is_the_formula_with_a_temperature(weight):
    """tau log(1 + exp((D_w - D_l) / tau) + exp(w E_w / tau)), written with its own tau, over tau."""
    beta = 8.0
    tau = 2 / beta
    each = weight if isinstance(weight, tuple) else (weight,) * len(LOGITS)
    wanted = []
    for z, error, w in zip(LOGITS.tolist(), ERRORS.tolist(), each, strict=True):
        gaps = -z * tau  # D_w - D_l
        wanted.append(math.log(1 + math.exp(gaps / tau) + math.exp(w * error / tau)))
    given = torch.tensor(weight, dtype=torch.float64) if isinstance(weight, tuple) else weight
    # an exponent of up to 40 is rounded as a whole before exp: its rounding is a relative one of the term
    assert losses.winner_guarded(LOGITS, ERRORS, beta, given).tolist() == pytest.approx(wanted, rel=40 * EPS)


def test_without_the_guard_winner_guarded_is_dpo_in_value_and_gradient():
    z, error = LOGITS.clone().requires_grad_(), ERRORS.clone().requires_grad_()
    guarded, plain = losses.winner_guarded(z, error, 8.0, None), losses.dpo(z)
    assert torch.equal(guarded, plain)
    assert guarded.tolist() == pytest.approx([math.log1p(math.exp(-abs(x))) + max(-x, 0) for x in z.tolist()])
    (one,) = torch.autograd.grad(guarded.sum(), z)
    (other,) = torch.autograd.grad(plain.sum(), z)
    assert torch.equal(one, other)


def test_the_guards_gradient_takes_the_preferences_place_as_the_winners_error_rises():
    shares = []
    for error in (0.01, 1.0, 3.0):
        z, error_w = leaf(-1.0), leaf(error)
        by_z, by_error = torch.autograd.grad(losses.winner_guarded(z, error_w, 8.0).sum(), (z, error_w))
        assert by_z < 0 < by_error, "descent raises the logit and lowers the winner's error"
        shares.append((-float(by_z), float(by_error) / 4))  # softmax shares of exp(-z) and of the guard
    preference, guard = zip(*shares, strict=True)
    assert list(preference) == sorted(preference, reverse=True) and list(guard) == sorted(guard)
    assert guard[-1] > 0.99


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 2.0])
def test_poly_dpo_is_its_formula_and_never_turns_around(alpha):
    z = torch.linspace(-12, 12, 25, dtype=torch.float64).requires_grad_()
    p = [1 / (1 + math.exp(-x)) for x in z.tolist()]
    got = losses.poly_dpo(z, alpha)
    # 1 - p and log p lose digits against 1 in the formula as written
    assert got.tolist() == pytest.approx([-math.log(x) + alpha * (1 - x) for x in p], abs=32 * EPS)
    (slope,) = torch.autograd.grad(got.sum(), z)
    assert slope.tolist() == pytest.approx([-(1 - x) * (1 + alpha * x) for x in p], abs=32 * EPS)
    assert (slope <= 0).all()


def test_poly_dpo_with_alpha_0_is_dpo():
    assert torch.equal(losses.poly_dpo(LOGITS, 0.0), losses.dpo(LOGITS))


@pytest.mark.parametrize("alpha", [-1.0, 0.5])
def test_gradcheck_of_poly_dpo(alpha):
    assert torch.autograd.gradcheck(lambda z: losses.poly_dpo(z, alpha), leaf(-3.0, -0.2, 0.0, 1.5))


def test_gradcheck_of_winner_guarded():
    weight = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    inputs = (leaf(-2.0, 0.1, 3.0), leaf(0.4, 0.2, 0.9))
    assert torch.autograd.gradcheck(lambda z, error: losses.winner_guarded(z, error, 5.0, weight), inputs)


@pytest.mark.parametrize(
    "head",
    [
        lambda w, l: losses.winner_guarded(losses.logits_of(w, l, 50.0), w + 0.2, 50.0),
        lambda w, l: losses.winner_guarded(losses.logits_of(w, l, 50.0), w + 0.2, 50.0, None),
        lambda w, l: losses.poly_dpo(losses.logits_of(w, l, 50.0), 2.0),
        lambda w, l: losses.poly_dpo(losses.logits_of(w, l, 50.0), -1.0),
    ],
    ids=["guarded", "guard off", "poly", "poly at -1"],
)
def test_swapping_winner_and_loser_costs(head):
    """A policy that moved towards the winner pays more once the two are swapped."""
    better, worse = torch.tensor([-0.05, -0.1]).double(), torch.tensor([0.05, 0.02]).double()
    assert (head(better, worse) < head(worse, better)).all()


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("guard", [0.0, 1e4])
def test_extreme_values_stay_finite(logit, guard):
    z, error = leaf(logit), leaf(guard / 2500)  # at beta = 5000 the guard is 2500 E_w
    guarded = losses.winner_guarded(z, error, 5000.0)
    # the two terms that are the largest, or all three, may be equal: at most log 3 above it
    assert max(0.0, -logit, guard) <= guarded.item() <= max(0.0, -logit, guard) + math.log(3) * (1 + 4 * EPS)
    for loss in (guarded, losses.poly_dpo(z, 3.0), losses.poly_dpo(z, -1.0)):
        gradients = torch.autograd.grad(loss.sum(), (z, error), allow_unused=True)
        assert loss.isfinite().all() and all(x is None or x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("alpha", [-1.001, math.nan, math.inf])
def test_an_alpha_that_would_turn_the_gradient_around_is_refused(alpha):
    with pytest.raises(InputError, match=r"alpha is .*, expected a finite number of -1 and above"):
        losses.poly_dpo(LOGITS, alpha)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("weight", [None, 1.0])
def test_a_guarded_loss_without_a_beta_is_refused(beta, weight):
    with pytest.raises(InputError, match="beta is"):
        losses.winner_guarded(LOGITS, ERRORS, beta, weight)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, torch.ones(2), torch.full((5,), -1.0)])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(InputError, match="weight"):
        losses.winner_guarded(LOGITS, ERRORS, 8.0, weight)


@pytest.mark.parametrize(
    ("mean_gap", "wanted"),
    [(None, 9000.0), (0.0, 9000.0), (1e-9, 9000.0), (5e-324, 9000.0), (0.004, 500.0), (1.0, 100.0), (1e300, 100.0)],
)
def test_auto_beta_makes_a_typical_pair_one_logit(mean_gap, wanted):
    got = losses.auto_beta(mean_gap, 100.0, 9000.0)
    assert type(got) is float and got == wanted
    if wanted == 500.0:
        assert losses.logits_of(leaf(-mean_gap), leaf(0.0), got).item() == pytest.approx(1.0, rel=ROUNDINGS)


@pytest.mark.parametrize(
    "given",
    [
        *((0.1, 2.0, 1.0), (None, 2.0, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, math.inf), (0.1, math.nan, 1.0)),
        *((-0.1, 1.0, 2.0), (math.nan, 1.0, 2.0), (math.inf, 1.0, 2.0)),
    ],
)
def test_an_auto_beta_without_a_meaning_is_refused(given):
    with pytest.raises(InputError, match=r"beta_min|mean_gap"):
        losses.auto_beta(*given)


# The mask holds a fifth of 100 elements, and LocalDPO's two terms weigh an element inside it 6 times one outside.
ERROR_W, CROSS = (80.0, 12.0), (78.0, 17.0)
COUNT = (80.0, 20.0)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_safeguard_with_region_weights_is_its_formula():
    """Plain: 92 / 95. Weighted 1 and 6: (80 + 72) / (78 + 102). A loser weighted less needs less of a guard."""
    error_w, cross = doubles(ERROR_W, ERROR_W, ERROR_W), doubles(CROSS, CROSS, CROSS)
    weight_w = doubles((1, 6), (1, 6), (0.2, 1.2))
    weight_l = doubles((1, 6), (0.5, 3), (1, 6))
    plain = losses.loser_safeguard(error_w, cross)
    weighted = losses.loser_safeguard(error_w, cross, weight_w=weight_w, weight_l=weight_l)
    assert plain.tolist() == pytest.approx([92 / 95] * 3, rel=ROUNDINGS)
    assert weighted.tolist() == pytest.approx([152 / 180, 1.0, 0.2 * 152 / 180], rel=ROUNDINGS)
    strict = losses.loser_safeguard(error_w, cross, 0.25, weight_w=weight_w, weight_l=weight_l)
    assert strict.tolist() == pytest.approx([0.75 * 152 / 180, 1.0, 0.15 * 152 / 180], rel=ROUNDINGS)


def test_weights_of_one_are_the_safeguard_without_weights():
    generator = torch.Generator().manual_seed(0)
    error_w, cross = (torch.randn(16, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    error_w, ones = error_w.abs() / 3, torch.ones(16, 3, dtype=torch.float64)
    plain = losses.loser_safeguard(error_w, cross, 0.1)
    for given in ({"weight_w": ones, "weight_l": ones}, {"weight_w": ones}, {"weight_l": ones}):
        assert torch.equal(losses.loser_safeguard(error_w, cross, 0.1, **given), plain)
    assert len(set(plain.tolist())) > 4


def test_a_region_that_the_loss_leaves_out_does_not_count():
    error_w, cross = doubles((4.0, 6.0)), doubles((-100.0, 12.0))
    inside = doubles((0.0, 2.0))
    assert losses.loser_safeguard(error_w, cross).tolist() == [1.0]
    assert losses.loser_safeguard(error_w, cross, weight_w=inside, weight_l=inside).tolist() == [0.5]
    nothing = torch.zeros_like(inside)
    assert losses.loser_safeguard(error_w, cross, weight_w=inside, weight_l=nothing).tolist() == [1.0]
    assert losses.loser_safeguard(error_w, cross, weight_w=nothing, weight_l=inside).tolist() == [0.0]


@pytest.mark.parametrize("name", ["weight_w", "weight_l"])
@pytest.mark.parametrize("weight", [torch.ones(2), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, math.nan]]), 2.0])
def test_region_weights_that_are_none_are_refused(name, weight):
    with pytest.raises(InputError, match=f"{name} must"):
        losses.loser_safeguard(doubles(ERROR_W), doubles(CROSS), **{name: weight})


class Shared:
    """Two predictions that are one parameter [100] plus a constant each, so that their Jacobian is the identity, with
    the sums of ERROR_W and CROSS; region 1 is the last 20 elements."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.parameter = torch.zeros(100, dtype=torch.float64, requires_grad=True)
        self.winner, self.loser = torch.empty(2, 100, dtype=torch.float64)
        for region, error, cross in zip(self.by_region(torch.arange(100)), ERROR_W, CROSS, strict=True):
            along, across = torch.randn(2, len(region), generator=generator, dtype=torch.float64)
            along *= math.sqrt(error) / along.norm()
            across -= (across @ along) / error * along
            self.winner[region] = along
            self.loser[region] = cross / error * along + 3 * across / across.norm()

    @staticmethod
    def by_region(x):
        return x[:80], x[80:]

    def sums(self, x):
        return torch.stack([part.sum() for part in self.by_region(x)])[None]

    def errors(self):
        return self.sums((self.winner + self.parameter) ** 2), self.sums((self.loser + self.parameter) ** 2)

    def loss(self, keep=None):
        """LocalDPO's loss against the reference that the policy starts as, the loser's gradient scaled by `keep`, and
        how it changes with each sum of the winner and of the loser."""
        error_w, error_l = self.errors()
        gap_w, gap_l = error_w - error_w.detach(), error_l - error_l.detach()
        by_loser = gap_l if keep is None else losses.scale_gradient(gap_l, keep)
        count = doubles(COUNT)
        loss = losses.local_dpo(error_w, error_l, gap_w, by_loser, count, beta=10.0, weight_sft=0.1).loss
        # error_w's derivative holds that by gap_w, which is made from it here
        by_winner, by_loser = torch.autograd.grad(loss, (error_w, gap_l), retain_graph=True)
        return loss, by_winner, -by_loser

    def changes(self, keep, size):
        """The winner's errors by region after a step minus those before, over the step's size, and the step's square
        length over it: the whole second order, since errors are quadratic."""
        loss, _, _ = self.loss(keep)
        (gradient,) = torch.autograd.grad(loss, self.parameter)
        before, _ = self.errors()
        with torch.no_grad():
            self.parameter -= size * gradient
        after, _ = self.errors()
        with torch.no_grad():
            self.parameter.zero_()
        return (after - before).detach() / size, float(size * gradient.square().sum())


def test_a_step_on_local_dpo_raises_the_winners_error_with_the_plain_safeguard_and_not_with_the_weighted_one():
    shared, size = Shared(), 1e-4
    _, weight_w, weight_l = shared.loss()
    error_w, _ = shared.errors()
    cross = shared.sums((shared.winner + shared.parameter) * (shared.loser + shared.parameter))
    # the two preference terms weigh 6 : 1; the SFT term, 0.1 / 100 beside 0.5 * 10 / 2 / 100, adds to the winner alone
    assert (weight_l[0, 1] / weight_l[0, 0]).item() == pytest.approx(6.0, rel=1e-12)
    assert ((weight_w - weight_l) * 100).tolist()[0] == pytest.approx([0.1, 0.1], rel=1e-12)
    plain = losses.loser_safeguard(error_w, cross)
    weighted = losses.loser_safeguard(error_w, cross, weight_w=weight_w, weight_l=weight_l)
    assert float(plain) == pytest.approx(0.968, abs=0.001) and float(weighted) == pytest.approx(0.865, abs=0.001)

    # errors near 100 are rounded to 100 EPS by some hundred additions each and divided by the size
    rounding = 4 * 100 * 100 * EPS / size
    rises, second_order = shared.changes(plain, size)
    assert float(rises.sum()) > 100 * second_order, "to first order"
    held, second_order = shared.changes(weighted, size)
    assert float(held.sum()) <= second_order + rounding
    # with mu it falls, by that share of what the winner's part alone would bring: its gradient is -4 weight error
    strict = losses.loser_safeguard(error_w, cross, 0.1, weight_w=weight_w, weight_l=weight_l)
    falls, second_order = shared.changes(strict, size)
    alone = 4 * (weight_w * error_w).sum().item()
    assert float(falls.sum()) <= -0.1 * alone + second_order + rounding


def test_the_safeguard_holds_the_plain_error_and_not_the_one_that_the_loss_weighs():
    """What the docstring says of its reach: here the error inside the mask rises, so the weighted error does too, and
    its own bound, with the weights squared, would have held that."""
    shared, size = Shared(), 1e-4
    _, weight_w, weight_l = shared.loss()
    error_w, _ = shared.errors()
    cross = shared.sums((shared.winner + shared.parameter) * (shared.loser + shared.parameter))
    weighted = losses.loser_safeguard(error_w, cross, weight_w=weight_w, weight_l=weight_l)
    change, second_order = shared.changes(weighted, size)
    assert float(change[0, 1]) > 0 > float(change[0, 0])
    assert float((weight_w * change).sum()) > 10 * second_order * float(weight_w.max())
    own_bound = (weight_w**2 * error_w).sum() / (weight_w * weight_l * cross).sum()
    own_bound = own_bound.detach()
    assert float(own_bound) < float(weighted)
    change, second_order = shared.changes(own_bound, size)
    rounding = 4 * 100 * 100 * EPS / size  # as in the test above
    assert float((weight_w * change).sum()) <= (second_order + rounding) * float(weight_w.max())
