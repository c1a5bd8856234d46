"""region_errors and pair_region_errors against an independent fp64 oracle, and the precision contract."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkit_kernels import NoiseKey, PathState, keyed_randn, pair_region_errors, region_errors

LAYOUTS = ["channels_first", "frames_first", "image", "aligned"]
SOURCES = ["given", "keyed", "path"]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Rounding in units of eps = 2**-23 of a term's magnitude: at most 3 for the target (two products and a sum),
# 4 more for a kernel's normals, 2 for difference and product, 2 for the fp32 sum over at most 4 channels and
# 5 for the sum over a block of 256: 16. The reference path sums in fp64 and stays well below.
C = 16

FORWARD = "region_errors_kernel", "sum_tiles_kernel"
PAIR_FORWARD = "pair_region_errors_kernel", "sum_tiles_kernel"

pytestmark = pytest.mark.usefixtures("path")


def within(got: torch.Tensor, exact: tuple[np.ndarray, np.ndarray], eps: float) -> bool:
    value, magnitude = exact
    return bool((np.abs(got.detach().double().numpy() - value) <= C * eps * magnitude).all())


@pytest.mark.parametrize(
    ("layout", "noise", "num_regions"),
    [(layout, noise, 2) for layout in LAYOUTS for noise in SOURCES]
    + [("channels_first", "given", size) for size in (None, 1, 3, 16, 40)]
    + [("aligned", "keyed", None), ("frames_first", "given", None), ("frames_first", "given", 16)],
)
def test_values(make_case, eps, launched, layout, noise, num_regions):
    case = make_case(layout, noise=noise, num_regions=num_regions)
    with launched(*FORWARD):
        got = region_errors(*case.arguments(), **case.options())
    for name, exact in case.exact().items():
        value = getattr(got, name)
        assert value.dtype == FP64 and value.shape == (2, num_regions or 1)
        assert within(value, exact, eps), name


@pytest.mark.parametrize("dtypes", [(BF16, BF16, FP32), (FP16, BF16, BF16), (FP32, BF16, FP16), (FP64, FP32, BF16)])
@pytest.mark.parametrize("noise", SOURCES)
def test_every_tensor_may_have_its_own_dtype(make_case, eps, dtypes, noise):
    case = make_case(dtypes=dtypes, noise=noise)
    got = region_errors(*case.arguments(), **case.options())
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, torch.int16), (FP32, torch.int32)])
def test_a_gap_of_single_ulps_is_seen(make_case, eps, dtype, bits):
    """A policy one ulp from its reference: 0 if computed in bf16, noise as a difference of two errors in fp32."""
    case = make_case("aligned", dtype=dtype)
    every_third = torch.arange(case.pred.numel()).reshape(case.pred.shape) % 3 == 0
    case.pred = (case.reference.view(bits) + every_third).to(bits).view(dtype)
    got = region_errors(*case.arguments(), **case.options())
    assert within(got.gap, case.exact()["gap"], eps) and (got.gap != 0).all()


def test_a_sample_of_many_tiles(make_case, eps):
    """More partial sums than the second stage takes at once."""
    case = make_case(shape=(1, 1, 1, 257, 257), num_regions=None)
    got = region_errors(*case.arguments(), **case.options())
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("noise", SOURCES)
def test_equal_predictions_give_gap_zero_and_the_gradient_of_the_error(make_case, dtype, noise):
    case = make_case(dtype=dtype, noise=noise)
    case.reference = case.pred.clone()
    case.pred.requires_grad_()
    got = region_errors(*case.arguments(), **case.options())
    assert (got.gap == 0).all()
    (by_gap,) = torch.autograd.grad(got.gap.sum(), case.pred, retain_graph=True)
    (by_error,) = torch.autograd.grad(got.error.sum(), case.pred)
    assert torch.equal(by_gap, by_error) and by_gap.abs().max() > 0


@pytest.mark.parametrize("noise", SOURCES)
@pytest.mark.parametrize(("layout", "dtype"), [(layout, FP32) for layout in LAYOUTS] + [("aligned", BF16)])
def test_gradient_values(make_case, eps, launched, layout, noise, dtype):
    case = make_case(layout, noise=noise, dtype=dtype, num_regions=3)
    case.pred.requires_grad_()
    weights = torch.tensor([[0.7, -0.2, 1.1], [1e-3, 3.0, -1.0]], dtype=FP64)
    got = region_errors(*case.arguments(), **case.options())
    with launched("region_errors_backward_kernel"):
        (got.error * weights + 0.5 * got.gap * weights).sum().backward()
    grad = case.pred.grad
    assert grad.dtype == dtype
    case.pred = case.pred.detach()
    value, magnitude = case.exact_gradient(1.5 * weights.numpy())
    ulp = torch.finfo(dtype).eps * np.abs(value)
    assert (np.abs(grad.double().numpy() - value) <= ulp + C * eps * magnitude).all()
    ignored = case.labels() >= 3
    assert ignored.any() and not grad.float().numpy()[ignored].any()


@pytest.mark.parametrize("noise", SOURCES)
def test_gradcheck(make_case, noise):
    case = make_case(shape=(1, 2, 1, 2, 3), noise=noise, dtype=FP64)

    def function(pred):
        got = region_errors(pred, case.clean, case.coefficients, case.noise, **case.options())
        return got.error, got.gap

    assert torch.autograd.gradcheck(function, case.pred.requires_grad_())


@pytest.mark.parametrize("shape", [(3, 2, 2, 3, 5), (3, 2, 1, 20, 14)])
@pytest.mark.parametrize("noise", SOURCES)
def test_a_samples_numbers_ignore_its_batch(make_case, shape, noise):
    case = make_case(shape=shape, noise=noise)
    whole = region_errors(*case.arguments(), **case.options())
    for rows in ([2, 0, 1], [1], [2, 1]):
        part = case.rows(rows)
        got = region_errors(*part.arguments(), **part.options())
        for name in ("error", "gap", "count"):
            assert torch.equal(getattr(got, name), getattr(whole, name)[rows])


def test_twenty_repeats_are_equal_bit_for_bit(make_case):
    case = make_case(noise="keyed")
    first, *others = (region_errors(*case.arguments(), **case.options()) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_an_ignored_label_is_ignored_even_where_the_prediction_is_not_finite(make_case):
    case = make_case()
    expected = region_errors(*case.arguments(), **case.options())
    spoiled = case.pred.masked_fill(case.regions >= 2, float("nan")).requires_grad_()
    got = region_errors(spoiled, *case.arguments()[1:], **case.options())
    assert torch.equal(got.error, expected.error) and torch.equal(got.gap, expected.gap)
    got.error.sum().backward()
    assert spoiled.grad.isfinite().all()


@pytest.mark.parametrize(
    "label_shape",
    [
        (1, 1, 2, 4, 5),
        (2, 1, 2, 1, 1),
        (2, 3, 2, 4, 5),
        (1, 1, 1, 4, 1),
        (2, 1, 1, 1, 1),
        (2, 3, 1, 4, 5),
        (2, 3, 2, 4, 1),
    ],
)
def test_regions_broadcast_over_any_axis(make_case, eps, label_shape):
    case = make_case(shape=(2, 3, 2, 4, 5))
    labels = torch.randint(0, 4, label_shape, generator=torch.Generator().manual_seed(1))
    case.regions, case.num_regions = labels.to(torch.uint8), 3
    case.pred.requires_grad_()
    got = region_errors(*case.arguments(), **case.options())
    got.error.sum().backward()
    grad, case.pred = case.pred.grad, case.pred.detach()
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name
    value, magnitude = case.exact_gradient(np.ones((2, 3)))
    assert (np.abs(grad.numpy() - value) <= C * eps * magnitude).all()


def test_a_bool_mask_is_a_label_map_of_two(make_case):
    case = make_case()
    case.regions = (case.regions == 1).to(torch.uint8)
    as_labels = region_errors(*case.arguments(), **case.options())
    case.regions = case.regions.bool()
    as_mask = region_errors(*case.arguments(), **case.options())
    assert torch.equal(as_labels.error, as_mask.error)


def test_without_a_reference_there_is_no_gap(make_case):
    case = make_case()
    got = region_errors(*case.arguments(), regions=case.regions, num_regions=2)
    assert got.gap is None
    assert torch.equal(got.error, region_errors(*case.arguments(), **case.options()).error)


def test_any_strides_are_read_right(make_case):
    """Halves of a batch, a permuted view and a sliced view give what contiguous copies give."""
    case = make_case()
    expected = region_errors(*case.arguments(), **case.options())

    def half(x):
        return torch.cat((torch.zeros_like(x), x))[len(x) :]

    def permuted(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def sliced(x):
        return torch.stack((x, x), -1)[..., 1]

    for view in (half, permuted, sliced):
        clean, noise, reference = view(case.clean), view(case.noise), view(case.reference)
        pred = view(case.pred).requires_grad_()
        got = region_errors(
            pred,
            clean,
            case.coefficients,
            noise,
            reference=reference,
            regions=view(case.regions),
            num_regions=2,
        )
        assert torch.equal(got.gap, expected.gap) and torch.equal(got.error, expected.error)
        (grad,) = torch.autograd.grad(got.error.sum(), pred)
        plain = case.pred.clone().requires_grad_()
        again = region_errors(plain, *case.arguments()[1:], **case.options())
        assert torch.equal(grad, torch.autograd.grad(again.error.sum(), plain)[0])


@pytest.mark.parametrize(
    ("layout", "noise", "own_noise"),
    [("channels_first", noise, own) for noise in SOURCES for own in (False, True)]
    + [
        ("frames_first", "given", False),
        ("image", "keyed", False),
        ("aligned", "keyed", True),
        ("aligned", "given", False),
    ],
)
def test_a_pair_is_its_two_sides_and_a_cross_term(make_case, eps, launched, layout, noise, own_noise):
    winner = make_case(layout, noise=noise, num_regions=3)
    loser = make_case(layout, noise=noise, num_regions=3, seed=1)
    loser.regions, loser.coefficients = winner.regions, winner.coefficients
    if isinstance(loser.noise, NoiseKey) and own_noise:
        loser.noise = replace(loser.noise, draw=5)
    noise_l = loser.noise if own_noise or noise == "path" else None
    if noise_l is None:
        loser.noise = winner.noise
    with launched(*PAIR_FORWARD):
        got = pair_region_errors(
            winner.pred, loser.pred, winner.clean, loser.clean, winner.coefficients, winner.noise, noise_l,
            reference_w=winner.reference, reference_l=loser.reference, regions=winner.regions, num_regions=3,
        )  # fmt: skip
    for name, side in (("w", winner), ("l", loser)):
        exact = side.exact()
        assert within(getattr(got, f"error_{name}"), exact["error"], eps)
        assert within(getattr(got, f"gap_{name}"), exact["gap"], eps)
    (y_w, m_w), (y_l, m_l) = winner.target(), loser.target()
    p_w, p_l = winner.pred.double().numpy(), loser.pred.double().numpy()
    magnitude = np.abs(p_w - y_w) * (np.abs(p_l) + m_l) + np.abs(p_l - y_l) * (np.abs(p_w) + m_w)
    cross = (winner._sums((p_w - y_w) * (p_l - y_l)), winner._sums(magnitude))
    assert within(got.cross, cross, eps)
    assert within(got.count, winner.exact()["count"], eps)


@pytest.mark.parametrize("noise", SOURCES)
def test_gradcheck_of_a_pair(make_case, noise):
    winner = make_case(shape=(1, 2, 1, 1, 3), noise=noise, dtype=FP64)
    loser = make_case(shape=(1, 2, 1, 1, 3), noise=noise, dtype=FP64, seed=1)

    def function(pred_w, pred_l):
        got = pair_region_errors(
            pred_w, pred_l, winner.clean, loser.clean, winner.coefficients, winner.noise,
            loser.noise if noise == "path" else None,
            reference_w=winner.reference, reference_l=loser.reference, regions=winner.regions, num_regions=2,
        )  # fmt: skip
        return got[:5]

    assert torch.autograd.gradcheck(function, (winner.pred.requires_grad_(), loser.pred.requires_grad_()))


def test_a_path_state_is_the_noise_that_made_it(make_case):
    case = make_case(noise="path", dtype=FP64)
    implied = region_errors(*case.arguments(), **case.options())
    key = make_case(noise="keyed", dtype=FP64)
    drawn = region_errors(*key.arguments(), **key.options())
    assert torch.allclose(implied.error, drawn.error, rtol=1e-12) and isinstance(case.noise, PathState)


def test_the_two_layouts_agree_to_float_error(make_case):
    case = make_case(num_regions=2)
    turned = replace(
        case,
        pred=case.pred.transpose(1, 2),
        reference=case.reference.transpose(1, 2),
        clean=case.clean.transpose(1, 2),
        noise=case.noise.transpose(1, 2),
        regions=case.regions.transpose(1, 2),
    )
    one = region_errors(*case.arguments(), **case.options())
    other = region_errors(*turned.arguments(), **turned.options())
    assert torch.allclose(one.error, other.error, rtol=1e-6) and torch.equal(one.count, other.count)
    assert torch.allclose(one.gap, other.gap, rtol=1e-5, atol=1e-6)


def test_noise_given_and_noise_regenerated_are_the_same_noise(make_case):
    keyed = make_case(noise="keyed")
    given = replace(keyed, noise=keyed_randn(keyed.pred.shape, keyed.noise))
    one = region_errors(*keyed.arguments(), **keyed.options())
    other = region_errors(*given.arguments(), **given.options())
    assert torch.allclose(one.error, other.error, rtol=1e-6)
