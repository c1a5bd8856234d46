"""The heads, against numbers written down elsewhere and against their own definitions."""

import math

import pytest
import torch

from alignkit_kernels import InputError, local_dpo_loss, losses, pair_region_errors, region_errors

FLOW = torch.tensor([[0.5, 0.5, 1.0, -1.0]] * 2)
EPSILON = torch.tensor([[0.5, 0.5, 1.0, 0.0]] * 2)
FORWARD = "pair_region_errors_kernel", "sum_tiles_kernel", "preference_head_kernel"
# of logits whose terms are below 1, in losses of at least 0.5
A_DOZEN_ROUNDINGS = 24 * 2**-53


@pytest.fixture
def pair(formula, device):
    """The closed-form pair of the published numbers: predictions, references, clean latents, noise."""

    def make(shape, target):
        clean_w, clean_l, noise = (
            formula(shape, 0.731, 0.1),
            formula(shape, 0.577, 0.9),
            formula(shape, 1.37, 0.3, 1.4),
        )
        y_w, y_l = (noise - clean_w, noise - clean_l) if target == "flow" else (noise, noise)
        ref_w, ref_l = y_w + formula(shape, 2.11, 0.5, 0.5), y_l + formula(shape, 1.91, 0.2, 0.5)
        pred_w, pred_l = ref_w + formula(shape, 0.911, 0.4, 0.02), ref_l + formula(shape, 1.13, 0.7, 0.02)
        rows = FLOW if target == "flow" else EPSILON
        return [x.to(device) for x in (pred_w, pred_l, ref_w, ref_l, clean_w, clean_l, rows, noise)]

    return make


def positional(pred_w, pred_l, reference_w, reference_l, clean_w, clean_l, coefficients, noise_w, **options):
    return local_dpo_loss(
        pred_w, pred_l, reference_w=reference_w, reference_l=reference_l, clean_w=clean_w, clean_l=clean_l,
        coefficients=coefficients, noise_w=noise_w, **options,
    )  # fmt: skip


def test_flow_dpo_agrees_with_four_public_implementations(pair, launched):
    with launched(*FORWARD):
        got = positional(*pair((2, 4, 3, 6, 8), "flow"), beta=2000.0, weight_sft=0.0)
    assert float(got.loss) == pytest.approx(0.685913732547309, rel=1e-13)
    assert got.logits_global.tolist() == pytest.approx([0.0747177662, -0.0439067016], abs=1e-10)
    assert -1000 * float(got.gap_w.mean()) == pytest.approx(-0.0874429172, abs=1e-10)
    assert -1000 * float(got.gap_l.mean()) == pytest.approx(-0.1028484494, abs=1e-10)


def test_epsilon_dpo_agrees_with_published_numbers(pair, launched):
    with launched(*FORWARD):
        got = positional(*pair((2, 4, 6, 8), "epsilon"), beta=5000.0, weight_sft=0.0)
    assert float(got.loss) == pytest.approx(0.7531032270841758, rel=1e-13)
    assert got.logits_global.tolist() == pytest.approx([0.696110018714724, -0.697817090351046], rel=1e-12)


def test_x0_loss_weighted_by_one_over_one_minus_alpha_bar_is_the_velocity_loss(formula, device, launched):
    """CogVideoX: error of x0 = sqrt(ab) x_t - sqrt(1 - ab) v, over 1 - ab, equals the error of v."""
    shape, alpha_bar = (2, 4, 3, 6, 8), torch.tensor([0.3, 0.9], dtype=torch.float64, device=device)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    clean, noise = formula(shape, 0.731, 0.1).to(device), formula(shape, 1.37, 0.3, 1.4).to(device)
    column = [x.view(-1, 1, 1, 1, 1) for x in (a, s)]
    velocity = column[0] * noise - column[1] * clean
    pred = velocity + formula(shape, 0.911, 0.4, 0.1).to(device)
    ref = velocity + formula(shape, 2.11, 0.5, 0.1).to(device)
    noisy = column[0] * clean + column[1] * noise

    def x0(v):
        return column[0] * noisy - column[1] * v

    with launched(*["region_errors_kernel", "sum_tiles_kernel"] * 2):
        v_space = region_errors(pred, clean, torch.stack((a, s, a, -s), 1), noise, reference=ref)
        x0_space = region_errors(x0(pred), clean, torch.stack((a, s, 0 * a, 1 + 0 * a), 1), noise, reference=x0(ref))
    ratio = (x0_space.gap[:, 0] / (1 - alpha_bar)) / v_space.gap[:, 0]
    assert ratio.tolist() == pytest.approx([1, 1], rel=1e-12)


@pytest.fixture
def sums():
    """Sums [B, 2] of three pairs; the last one's mask is empty."""
    generator = torch.Generator().manual_seed(0)
    count = torch.tensor([[90.0, 10.0], [60.0, 40.0], [100.0, 0.0]], dtype=torch.float64)

    def draw(scale):
        return scale * torch.randn(3, 2, generator=generator, dtype=torch.float64) * (count > 0)

    error_w, error_l = draw(1).abs() * 10, draw(1).abs() * 10
    return error_w, error_l, draw(1e-2), draw(1e-2), count


def test_local_dpo_is_its_formula(sums):
    error_w, _, gap_w, gap_l, count = sums
    alpha = torch.tensor([0.75, 0.84, 0.9])
    got = losses.local_dpo(*sums, strength=alpha, beta=500.0, weight_region_sft=0.2)
    for b in range(3):
        eta = float(alpha[b] - 0.75) / 0.15
        z_global = -250.0 * float((gap_w[b].sum() - gap_l[b].sum()) / count[b].sum())
        loss = math.log1p(math.exp(-z_global)) + 0.1 * float(error_w[b].sum() / count[b].sum())
        if count[b, 1] > 0:
            z_region = -250.0 * (1 + eta) * float((gap_w[b, 1] - gap_l[b, 1]) / count[b, 1])
            loss += math.log1p(math.exp(-z_region))
            loss += 0.2 * (1 + eta) * float(error_w[b, 1] / count[b, 1])
            assert float(got.logits_region[b]) == pytest.approx(z_region, rel=1e-6)
        assert float(got.logits_global[b]) == pytest.approx(z_global, rel=1e-12)
        assert float(got.loss_per_pair[b]) == pytest.approx(loss, rel=1e-6)
    assert float(got.loss) == pytest.approx(float(got.loss_per_pair.mean()), rel=1e-15)
    assert got.region_empty.tolist() == [False, False, True]


def test_an_empty_mask_contributes_nothing_to_the_region_term(sums):
    with_region = losses.local_dpo(*sums).loss_per_pair
    without = losses.local_dpo(*sums, weight_region=0.0).loss_per_pair
    assert (with_region[:2] > without[:2]).all() and with_region[2] == without[2]


def test_a_pairs_loss_ignores_its_batch_mates(sums):
    whole = losses.local_dpo(*sums).loss_per_pair
    alone = losses.local_dpo(*(x[1:2] for x in sums)).loss_per_pair
    assert torch.equal(whole[1:2], alone)


def test_without_a_strength_or_with_a_single_one_the_factor_is_one(sums):
    plain = losses.local_dpo(*sums)
    one = losses.local_dpo(*sums, strength=torch.full((3,), 0.8), strength_range=(0.8, 0.8))
    assert torch.equal(plain.loss_per_pair, one.loss_per_pair)


@pytest.mark.parametrize("strength", [0.74, 0.91, float("nan")])
def test_a_strength_outside_the_range_is_refused(sums, strength):
    with pytest.raises(InputError, match=r"strength must lie in strength_range = \[0.75, 0.9\], got"):
        losses.local_dpo(*sums, strength=torch.tensor([0.8, strength, 0.8]))


def test_the_ends_of_the_range_survive_rounding_to_fp32(sums):
    losses.local_dpo(*sums, strength=torch.tensor([0.76, 0.9, 0.84]), strength_range=(0.76, 0.84 + 0.06))


def test_stored_reference_errors_give_the_loss_of_the_references_predictions(make_case, path):
    winner, loser = make_case(noise="keyed", dtype=torch.float64), make_case(dtype=torch.float64, seed=1)
    shared = (winner.clean, loser.clean, winner.coefficients, winner.noise)
    mask = winner.regions == 1
    live = positional(winner.pred, loser.pred, winner.reference, loser.reference, *shared, regions=mask)
    stored = pair_region_errors(winner.reference, loser.reference, *shared, regions=mask, num_regions=2)
    cached = positional(
        winner.pred, loser.pred, None, None, *shared,
        regions=mask, reference_error_w=stored.error_w, reference_error_l=stored.error_l,
    )  # fmt: skip
    assert torch.allclose(live.loss_per_pair, cached.loss_per_pair, rtol=1e-9)


def test_policy_equal_to_reference_gives_logits_exactly_zero_and_a_gradient(make_case, path):
    winner, loser = make_case(noise="keyed", dtype=torch.bfloat16), make_case(dtype=torch.bfloat16, seed=1)
    pred_w, pred_l = winner.pred.requires_grad_(), loser.pred.requires_grad_()
    got = positional(
        pred_w, pred_l, pred_w.detach().clone(), pred_l.detach().clone(), winner.clean, loser.clean,
        winner.coefficients, winner.noise, regions=winner.regions, weight_sft=0.0,
    )  # fmt: skip
    assert (got.logits_region == 0).all() and (got.logits_global == 0).all()
    assert got.loss.item() == pytest.approx(2 * math.log(2), rel=1e-15)
    got.loss.backward()
    assert pred_w.grad.abs().max() > 0 and pred_l.grad.abs().max() > 0


def test_gradcheck_of_the_whole_loss(make_case, path):
    shape = (1, 2, 1, 2, 3)
    winner, loser = (make_case(shape=shape, dtype=torch.float64, seed=seed) for seed in (0, 1))

    def function(pred_w, pred_l):
        return positional(
            pred_w, pred_l, winner.reference, loser.reference, winner.clean, loser.clean, winner.coefficients,
            winner.noise, regions=winner.regions, strength=torch.tensor([0.8]), beta=20.0,
            weight_region_sft=0.1,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(function, (winner.pred.requires_grad_(), loser.pred.requires_grad_()))


LOGITS = torch.tensor([-40.0, -1.5, 0.0, 0.7, 25.0], dtype=torch.float64)


def test_heads_are_their_formulas():
    z = LOGITS.tolist()
    softplus = [math.log1p(math.exp(-abs(x))) + max(-x, 0) for x in z]
    flipped = [math.log1p(math.exp(-abs(x))) + max(x, 0) for x in z]
    assert losses.dpo(LOGITS).tolist() == pytest.approx(softplus, rel=1e-15)
    smoothed = [0.9 * a + 0.1 * b for a, b in zip(softplus, flipped, strict=True)]
    assert losses.dpo(LOGITS, 0.1).tolist() == pytest.approx(smoothed, rel=1e-14)
    robust = [(0.9 * a - 0.1 * b) / 0.8 for a, b in zip(softplus, flipped, strict=True)]
    assert losses.robust_dpo(LOGITS, 0.1).tolist() == pytest.approx(robust, rel=1e-13)
    assert losses.ipo(LOGITS).tolist() == pytest.approx([(x - 0.5) ** 2 for x in z], rel=1e-15)
    assert losses.hinge(LOGITS).tolist() == pytest.approx([max(0, 1 - x) for x in z], rel=1e-15)
    assert losses.sft(LOGITS) is LOGITS


def test_robust_dpo_undoes_random_swaps_on_average():
    swapped = 0.8 * losses.robust_dpo(LOGITS, 0.2) + 0.2 * losses.robust_dpo(-LOGITS, 0.2)
    assert torch.allclose(swapped, losses.dpo(LOGITS), rtol=1e-12, atol=1e-15)


def test_one_sigmoid_per_region_averages_over_regions_that_exist(sums):
    _, _, gap_w, gap_l, count = sums
    got = losses.region_dpo(gap_w, gap_l, count, beta=300.0)
    single = losses.dpo(-150.0 * (gap_w[2, 0] - gap_l[2, 0]) / count[2, 0])
    both = losses.dpo(-150.0 * (gap_w[0] - gap_l[0]) / count[0]).mean()
    assert float(got[2]) == pytest.approx(float(single), rel=1e-12)
    assert float(got[0]) == pytest.approx(float(both), rel=1e-12)


def test_segment_dpo_follows_the_labels(sums):
    _, _, gap_w, gap_l, count = sums
    prefers = [[1, 1], [-1, 1], [0, 0]]
    got = losses.segment_dpo(gap_w, gap_l, count, torch.tensor(prefers), beta=300.0)
    whole = losses.dpo(losses.logits_of(gap_w[0].sum() / 100, gap_l[0].sum() / 100, 300.0))
    mixed = losses.dpo(-150.0 * ((gap_w - gap_l)[1, 1] - (gap_w - gap_l)[1, 0]) / 100)
    assert got.tolist() == pytest.approx([float(whole), float(mixed), 0.0], rel=A_DOZEN_ROUNDINGS)


def test_segments_without_a_label_do_not_dilute_the_others(sums):
    _, _, gap_w, gap_l, count = sums
    got = losses.segment_dpo(gap_w, gap_l, count, torch.tensor([[1, 0], [0, -1], [0, 0]]), beta=300.0)
    means = (gap_w - gap_l) / count
    wanted = [losses.dpo(-150.0 * means[0, 0]), losses.dpo(150.0 * means[1, 1])]
    assert got.tolist() == pytest.approx([*map(float, wanted), 0.0], rel=A_DOZEN_ROUNDINGS)


@pytest.mark.parametrize("beta", [0.0, -5000.0, float("nan"), float("inf")])
def test_a_beta_that_would_teach_nothing_or_the_opposite_is_refused(sums, beta):
    with pytest.raises(InputError, match=r"beta is .*, expected a finite number above 0"):
        losses.local_dpo(*sums, beta=beta)
    with pytest.raises(InputError, match="beta is"):
        losses.region_dpo(*sums[2:], beta)
    with pytest.raises(InputError, match="beta is"):
        losses.segment_dpo(*sums[2:], torch.zeros(3, 2), beta)


@pytest.mark.parametrize("preference", [torch.ones(3), torch.ones(3, 2).bool(), torch.full((3, 2), 7)])
def test_labels_that_are_none_are_refused(sums, preference):
    with pytest.raises(InputError, match="preference"):
        losses.segment_dpo(*sums[2:], preference, 300.0)


def test_three_regions_have_no_inside(sums):
    three = [torch.cat((x, x[:, :1]), dim=1) for x in sums]
    with pytest.raises(InputError, match="sums are of 3 regions"):
        losses.local_dpo(*three)


@pytest.mark.parametrize("mu", [-0.1, 1.5, float("nan")])
def test_a_mu_outside_its_range_is_refused(sums, mu):
    with pytest.raises(InputError, match=r"mu is .*, expected 0 <= mu <= 1"):
        losses.loser_safeguard(sums[0], sums[2], mu)


def test_the_safeguard_keeps_the_winners_error_from_rising():
    """Descend on z's gradient for two linear predictions that share their parameters: with the safeguard the
    winner's error does not rise, without it it does."""
    generator = torch.Generator().manual_seed(0)
    residual_w = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    residual_l = 3 * residual_w + 0.1 * torch.randn(1, 64, generator=generator, dtype=torch.float64)
    error_w, cross = (residual_w**2).sum(1, keepdim=True), (residual_w * residual_l).sum(1, keepdim=True)
    keep = losses.loser_safeguard(error_w, cross)
    assert 0 < float(keep) < 1

    def winners_change(factor):
        step = -(2 * residual_w - factor * 2 * residual_l)  # both predictions move alike
        return float((2 * residual_w * step).sum())

    assert winners_change(1.0) > 0 and winners_change(float(keep)) <= 1e-9
    assert losses.loser_safeguard(error_w, -cross).tolist() == [1.0]
    assert losses.loser_safeguard(error_w, cross, mu=1.0).tolist() == [0.0]


def test_the_safeguard_is_per_pair():
    error_w = torch.tensor([[1.0], [9.0]], dtype=torch.float64)
    cross = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    assert losses.loser_safeguard(error_w, cross).tolist() == [0.5, 1.0]


def test_scale_gradient_changes_the_gradient_alone():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scaled = losses.scale_gradient(x, torch.tensor([0.25, 1.0], dtype=torch.float64))
    scaled.sum().backward()
    assert scaled.tolist() == [1.0, 2.0] and x.grad.tolist() == [0.25, 1.0]


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(InputError, match="label_smoothing"):
        losses.dpo(LOGITS, smoothing)


@pytest.mark.parametrize(
    ("half", "reduction", "beta", "here"),
    [(0.5, "mean", 5000, 5000), (1, "mean", 2500, 5000), (0.5, "sum", 1, "N"), (1, "sum", 1, "2N")],
    ids=["salesforce", "diffusers", "simpletuner", "no half and a sum"],
)
def test_the_table_of_betas(pair, half, reduction, beta, here):
    """The docs' conversions, against each package's own arithmetic: errors reduced, subtracted, multiplied."""
    pred_w, pred_l, ref_w, ref_l, clean_w, clean_l, rows, noise = pair((2, 4, 3, 6, 8), "flow")

    def error(pred, clean):
        return getattr((pred - (noise - clean)) ** 2, reduction)((1, 2, 3, 4))

    theirs = (error(pred_w, clean_w) - error(ref_w, clean_w)) - (error(pred_l, clean_l) - error(ref_l, clean_l))
    elements = pred_w[0].numel()
    ours = {"N": elements * beta, "2N": 2 * elements * beta}.get(here, here)
    got = positional(pred_w, pred_l, ref_w, ref_l, clean_w, clean_l, rows, noise, beta=ours)
    assert torch.allclose(got.logits_global, -half * beta * theirs, rtol=1e-9)
