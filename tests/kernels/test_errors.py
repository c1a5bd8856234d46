"""region_errors and pair_region_errors against an independent fp64 oracle, and the precision contract."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkit_kernels import (
    NoiseKey,
    PathState,
    add_keyed_noise,
    dispatch,
    keyed_randn,
    pair_region_errors,
    region_errors,
)
from alignkit_kernels.checks import check_regions
from alignkit_kernels.errors import reference
from alignkit_kernels.layout import by_sample

LAYOUTS = ["channels_first", "frames_first", "image", "aligned"]
SOURCES = ["given", "keyed", "path"]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Rounding in units of eps = 2**-23 (two roundings) of a term's magnitude. The target: 1 for two products and a sum,
# and 4 for a kernel's normals (or 4, with an approximate division, for a path state). A squared residual doubles
# those 5 and adds 1.5: 11.5. The fp32 sums add 1 for up to 4 channels and 9.5 for a tile of 256 (19 additions in a
# row in numpy's order, 12 on a GPU). The second stage is fp64. Together 22; the reference stays well below.
C = 22

FORWARD = "region_errors_kernel", "sum_tiles_kernel"
BACKWARD = "region_errors_backward_kernel"
PAIR_FORWARD = "pair_region_errors_kernel", "sum_tiles_kernel"
PAIR_BACKWARD = "pair_region_errors_backward_kernel"

pytestmark = pytest.mark.usefixtures("path")


def within(got: torch.Tensor, exact: tuple[np.ndarray, np.ndarray], eps: float) -> bool:
    value, magnitude = exact
    return bool((np.abs(array(got) - value) <= C * eps * magnitude).all())


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def pair_options(winner, loser) -> dict:
    return {
        "reference_w": winner.reference, "reference_l": loser.reference,
        "regions": winner.regions, "num_regions": winner.num_regions,
    }  # fmt: skip


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
def test_every_tensor_may_have_its_own_dtype(make_case, eps, launched, dtypes, noise):
    case = make_case(dtypes=dtypes, noise=noise)
    with launched(*FORWARD):
        got = region_errors(*case.arguments(), **case.options())
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, torch.int16), (FP32, torch.int32)])
def test_a_gap_of_single_ulps_is_seen(make_case, eps, device, launched, dtype, bits):
    """A policy one ulp from its reference: 0 if computed in bf16, noise as a difference of two errors in fp32."""
    case = make_case("aligned", dtype=dtype)
    every_third = torch.arange(case.pred.numel(), device=device).reshape(case.pred.shape) % 3 == 0
    case.pred = (case.reference.view(bits) + every_third).to(bits).view(dtype)
    with launched(*FORWARD):
        got = region_errors(*case.arguments(), **case.options())
    assert within(got.gap, case.exact()["gap"], eps) and (got.gap != 0).all()


def test_a_sample_of_many_tiles(make_case, eps, launched):
    """More partial sums than the second stage takes at once."""
    case = make_case(shape=(1, 1, 1, 257, 257), num_regions=None)
    with launched(*FORWARD):
        got = region_errors(*case.arguments(), **case.options())
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name


def test_tiles_are_added_up_in_fp64(path, device):
    """One tile's sum is 2**24, of 515 others 1: an odd total, which fp32 cannot hold."""
    pred = torch.zeros(1, 1, 1, 257, 257, device=device)
    pred.view(-1)[128 * torch.arange(1, 516, device=device)] = 1.0
    pred.view(-1)[0] = 4096.0
    rows = torch.tensor([[0.5, 0.5, 1.0, -1.0]], device=device)
    nothing = torch.zeros_like(pred)
    got = region_errors(pred, nothing, rows, nothing, reference=nothing)
    assert got.error.item() == got.gap.item() == 2**24 + 515


def test_coefficients_may_be_a_view_of_any_strides(make_case, launched):
    """A slice of a table of more columns, and its transpose."""
    case, other = make_case("aligned"), make_case("aligned", seed=1)
    wide = torch.cat([case.coefficients, torch.full_like(case.coefficients, 9.0)], 1)
    views = wide[:, :4], case.coefficients.t().contiguous().t()

    def found(rows):
        preds = [x.pred.clone().requires_grad_() for x in (case, other)]
        own = region_errors(preds[0], case.clean, rows, case.noise, reference=case.reference)
        pair = pair_region_errors(*preds, case.clean, other.clean, rows, case.noise)
        noisy = add_keyed_noise(case.clean, rows, case.noise)
        (own.gap.sum() + pair.error_l.sum() + pair.cross.sum()).backward()
        return [own.error, own.gap, *pair[:2], pair.cross, noisy, *(p.grad for p in preds)]

    want = found(case.coefficients)
    for rows in views:
        assert not rows.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(found(rows), want, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("noise", SOURCES)
def test_equal_predictions_give_gap_zero_and_the_gradient_of_the_error(make_case, launched, dtype, noise):
    case = make_case(dtype=dtype, noise=noise)
    case.reference = case.pred.clone()
    case.pred.requires_grad_()
    with launched(*FORWARD, BACKWARD, BACKWARD):
        got = region_errors(*case.arguments(), **case.options())
        assert (got.gap == 0).all()
        (by_gap,) = torch.autograd.grad(got.gap.sum(), case.pred, retain_graph=True)
        (by_error,) = torch.autograd.grad(got.error.sum(), case.pred)
    assert torch.equal(by_gap, by_error) and by_gap.abs().max() > 0


@pytest.mark.parametrize("noise", SOURCES)
@pytest.mark.parametrize(("layout", "dtype"), [(layout, FP32) for layout in LAYOUTS] + [("aligned", BF16)])
def test_gradient_values(make_case, eps, device, launched, layout, noise, dtype):
    case = make_case(layout, noise=noise, dtype=dtype, num_regions=3)
    case.pred.requires_grad_()
    weights = torch.tensor([[0.7, -0.2, 1.1], [1e-3, 3.0, -1.0]], dtype=FP64, device=device)
    got = region_errors(*case.arguments(), **case.options())
    with launched(BACKWARD):
        (got.error * weights + 0.5 * got.gap * weights).sum().backward()
    grad = case.pred.grad
    assert grad.dtype == dtype
    case.pred = case.pred.detach()
    value, magnitude = case.exact_gradient(1.5 * array(weights))
    ulp = torch.finfo(dtype).eps * np.abs(value)
    assert (np.abs(array(grad) - value) <= ulp + C * eps * magnitude).all()
    ignored = case.labels() >= 3
    assert ignored.any() and not array(grad)[ignored].any()


def test_a_gradient_has_one_derivative_only(make_case):
    case = make_case()
    case.pred.requires_grad_()
    total = region_errors(*case.arguments(), **case.options()).error.sum()
    (grad,) = torch.autograd.grad(total, case.pred, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("noise", SOURCES)
def test_gradcheck(make_case, noise):
    """In fp64, by finite differences through the kernels themselves."""
    case = make_case(shape=(1, 2, 1, 2, 3), noise=noise, dtype=FP64)

    def function(pred):
        got = region_errors(pred, case.clean, case.coefficients, case.noise, **case.options())
        return got.error, got.gap

    assert torch.autograd.gradcheck(function, case.pred.requires_grad_())


def everything(case, other) -> dict[str, torch.Tensor]:
    """Every number and gradient that the two ops make of a case, and of a pair with another."""
    pred, pred_l = (x.pred.detach().clone().requires_grad_() for x in (case, other))
    own = region_errors(pred, *case.arguments()[1:], **case.options())
    pair = pair_region_errors(
        pred, pred_l, case.clean, other.clean, case.coefficients, case.noise, other.noise, **pair_options(case, other)
    )
    total = (own.error - 2 * own.gap).sum() + (pair.error_l + pair.gap_w + 0.3 * pair.cross).sum()
    gradients = torch.autograd.grad(total, (pred, pred_l))
    return own._asdict() | {f"pair {k}": v for k, v in pair._asdict().items()} | dict(zip("wl", gradients, strict=True))


EVERYTHING = *FORWARD, *PAIR_FORWARD, BACKWARD, PAIR_BACKWARD


@pytest.mark.parametrize("shape", [(3, 2, 2, 3, 5), (3, 2, 1, 20, 14)])
@pytest.mark.parametrize("noise", SOURCES)
def test_a_samples_numbers_ignore_its_batch(make_case, launched, shape, noise):
    """Any order, any size of batch: equal bit for bit, gradients too."""
    case, other = make_case(shape=shape, noise=noise), make_case(shape=shape, noise=noise, seed=1)
    whole = everything(case, other)
    for rows in ([2, 0, 1], [1], [2, 1]):
        with launched(*EVERYTHING):
            part = everything(case.rows(rows), other.rows(rows))
        assert part.keys() == whole.keys()
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)


def test_the_reference_adds_in_the_same_order_however_the_noise_lies(make_case):
    case = make_case(shape=(2, 4, 3, 5, 6))
    x = case.pred.detach(), case.reference, case.clean, case.coefficients, "given"
    turned = case.noise.transpose(1, 4).contiguous().transpose(1, 4)
    first, again = (reference.forward(*x, noise, case.regions, 2) for noise in (case.noise, turned))
    assert torch.equal(first, again) and first[2].abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 5), (1, 1, 1, 17, 16)])
def test_repeats_are_equal_bit_for_bit(make_case, shape):
    case, other = make_case(shape=shape, noise="keyed"), make_case(shape=shape, noise="keyed", seed=1)
    # the interpreter runs one program after the other: nothing can overtake
    first, *others = (everything(case, other) for _ in range(3 if dispatch.INTERPRETED else 20))
    assert all(torch.equal(again[name], first[name]) for again in others for name in first)


def test_an_ignored_label_is_ignored_even_where_the_prediction_is_not_finite(make_case, launched):
    case = make_case()
    expected = region_errors(*case.arguments(), **case.options())
    spoiled = case.pred.masked_fill(case.regions >= 2, float("nan")).requires_grad_()
    with launched(*FORWARD):
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
def test_regions_broadcast_over_any_axis(make_case, eps, device, launched, label_shape):
    case = make_case(shape=(2, 3, 2, 4, 5))
    labels = torch.randint(0, 4, label_shape, generator=torch.Generator().manual_seed(1))
    case.regions, case.num_regions = labels.to(device, torch.uint8), 3
    case.pred.requires_grad_()
    with launched(*FORWARD, BACKWARD):
        got = region_errors(*case.arguments(), **case.options())
        got.error.sum().backward()
    grad, case.pred = case.pred.grad, case.pred.detach()
    for name, exact in case.exact().items():
        assert within(getattr(got, name), exact, eps), name
    value, magnitude = case.exact_gradient(np.ones((2, 3)))
    assert (np.abs(array(grad) - value) <= C * eps * magnitude).all()


def test_a_label_map_that_was_expanded_is_not_written_out(make_case):
    """`expand` repeats labels without memory; the op reads them where they are."""
    case = make_case("aligned")
    expected = region_errors(*case.arguments(), **case.options())
    expanded = case.regions.expand(case.pred.shape)
    got = region_errors(*case.arguments(), reference=case.reference, regions=expanded, num_regions=2)
    assert torch.equal(got.error, expected.error) and torch.equal(got.gap, expected.gap)
    checked, _ = check_regions(expanded, 2, case.pred)
    assert checked.shape == case.regions.shape and checked.data_ptr() == case.regions.data_ptr()


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


def half(x):
    return torch.cat((torch.zeros_like(x), x))[len(x) :]


def permuted(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x):
    return torch.stack((x, x), -1)[..., 1]


def shifted(x):
    """Contiguous, but no vector of 128 bits starts where the samples do."""
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("layout", ["channels_first", "aligned"])
@pytest.mark.parametrize("view", [half, permuted, sliced, shifted])
def test_any_strides_are_read_right(make_case, launched, layout, view):
    """Bit for bit what contiguous copies give, forward and backward."""
    case, other = make_case(layout), make_case(layout, seed=1)
    expected = everything(case, other)
    turned = [
        replace(
            x, pred=view(x.pred), reference=view(x.reference), clean=view(x.clean),
            noise=view(x.noise), regions=view(x.regions),
        )
        for x in (case, other)
    ]  # fmt: skip
    with launched(*EVERYTHING):
        got = everything(*turned)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def spread(x):
    """Samples that are whole, twice as far from one another."""
    return torch.stack((x, torch.full_like(x, 7)), 1)[:, 0]


@pytest.mark.parametrize("side", [0, 1], ids=["winner", "loser"])
@pytest.mark.parametrize("name", ["pred", "reference", "clean", "noise"])
def test_samples_of_each_tensor_lie_as_far_apart_as_its_own_stride_says(make_case, launched, name, side):
    """One of a pair's tensors alone is spread: nothing reads it with another's stride, nor another with its own."""
    sides = make_case(), make_case(seed=1)

    def found():
        w, l = sides
        preds = [x.pred.detach().requires_grad_() for x in sides]
        pair = pair_region_errors(
            *preds, w.clean, l.clean, w.coefficients, w.noise, l.noise, reference_w=w.reference, reference_l=l.reference
        )
        own = [
            region_errors(pred, x.clean, x.coefficients, x.noise, reference=x.reference)
            for pred, x in zip(preds, sides, strict=True)
        ]
        (pair.error_w + pair.gap_l + 0.3 * pair.cross + own[0].error - own[1].gap).sum().backward()
        return [*pair, *own[0], *own[1], *(pred.grad for pred in preds)]

    expected = found()
    value = spread(getattr(sides[side], name))
    assert value[0].is_contiguous() and not value.is_contiguous()
    setattr(sides[side], name, value)
    with launched(*FORWARD, BACKWARD, *EVERYTHING):  # of one side, of the other, of the pair
        got = found()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["channels_first", "aligned"])
def test_halves_of_a_batch_are_read_where_they_are(make_case, layout):
    x = make_case(layout).pred
    for part in (*torch.cat((x, x)).chunk(2), x[1:], x[:1]):
        assert by_sample(part, aligned=layout == "aligned") is part
    assert by_sample(permuted(x), aligned=False).is_contiguous()


@pytest.mark.parametrize(
    ("layout", "noise", "own_noise"),
    [("channels_first", noise, own) for noise in SOURCES for own in (False, True)]
    + [
        ("channels_first", "mixed", True),
        ("aligned", "mixed", True),
        ("frames_first", "given", False),
        ("image", "keyed", False),
        ("aligned", "keyed", True),
        ("aligned", "given", False),
    ],
)
def test_a_pair_is_its_two_sides_and_a_cross_term(make_case, eps, launched, layout, noise, own_noise):
    sources = ("given", "keyed") if noise == "mixed" else (noise, noise)
    winner = make_case(layout, noise=sources[0], num_regions=3)
    loser = make_case(layout, noise=sources[1], num_regions=3, seed=1)
    loser.regions, loser.coefficients = winner.regions, winner.coefficients
    if isinstance(loser.noise, NoiseKey) and own_noise:
        loser.noise = replace(loser.noise, draw=5)
    noise_l = loser.noise if own_noise or noise == "path" else None
    if noise_l is None:
        loser.noise = winner.noise
    with launched(*PAIR_FORWARD):
        got = pair_region_errors(
            winner.pred, loser.pred, winner.clean, loser.clean, winner.coefficients, winner.noise, noise_l,
            **pair_options(winner, loser),
        )  # fmt: skip
    for name, side in (("w", winner), ("l", loser)):
        exact = side.exact()
        assert within(getattr(got, f"error_{name}"), exact["error"], eps)
        assert within(getattr(got, f"gap_{name}"), exact["gap"], eps)
    (y_w, m_w), (y_l, m_l) = winner.target(), loser.target()
    p_w, p_l = array(winner.pred), array(loser.pred)
    magnitude = np.abs(p_w - y_w) * (np.abs(p_l) + m_l) + np.abs(p_l - y_l) * (np.abs(p_w) + m_w)
    cross = (winner._sums((p_w - y_w) * (p_l - y_l)), winner._sums(magnitude))
    assert within(got.cross, cross, eps)
    assert within(got.count, winner.exact()["count"], eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_regions", [None, 1, 3, 16, 40])
def test_gradient_values_of_a_pair(make_case, eps, device, launched, layout, num_regions):
    """Weights that differ by number, sample and region; the cross term's gradient is the other side's residual."""
    winner = make_case(layout, noise="keyed", num_regions=num_regions)
    loser = replace(make_case(layout, num_regions=num_regions, seed=1), coefficients=winner.coefficients)
    loser.noise, loser.regions = winner.noise, winner.regions
    size = num_regions or 1
    by_number = torch.randn(5, 2, size, generator=torch.Generator().manual_seed(2), dtype=FP64)
    sides = winner.pred.requires_grad_(), loser.pred.requires_grad_()
    with launched(*PAIR_FORWARD, PAIR_BACKWARD):
        got = pair_region_errors(
            *sides, winner.clean, loser.clean, winner.coefficients, winner.noise, **pair_options(winner, loser)
        )
        sum((x * w).sum() for x, w in zip(got, by_number.to(device), strict=False)).backward()
    by_number = array(by_number)
    for own, other, weights in ((winner, loser, by_number[[0, 2]]), (loser, winner, by_number[[1, 3]])):
        value, magnitude = own.exact_gradient(weights.sum(0))
        cross = other.exact_gradient(by_number[4] / 2)
        slack = C * eps * (magnitude + cross[1]) + eps * np.abs(value + cross[0])
        assert (np.abs(array(own.pred.grad) - value - cross[0]) <= slack).all()


@pytest.mark.parametrize("noise", SOURCES)
def test_gradcheck_of_a_pair(make_case, noise):
    winner = make_case(shape=(1, 2, 1, 1, 3), noise=noise, dtype=FP64)
    loser = make_case(shape=(1, 2, 1, 1, 3), noise=noise, dtype=FP64, seed=1)

    def function(pred_w, pred_l):
        got = pair_region_errors(
            pred_w, pred_l, winner.clean, loser.clean, winner.coefficients, winner.noise,
            loser.noise if noise == "path" else None, **pair_options(winner, loser),
        )  # fmt: skip
        return got[:5]

    assert torch.autograd.gradcheck(function, (winner.pred.requires_grad_(), loser.pred.requires_grad_()))


def test_a_path_state_is_the_noise_that_made_it(make_case, launched):
    """In fp64, where the state holds the noise to 1e-15; the noise itself has fp32's accuracy on a kernel."""
    case = make_case(noise="path", dtype=FP64)
    with launched(*FORWARD):
        implied = region_errors(*case.arguments(), **case.options())
    given = make_case(noise="given", dtype=FP64)
    drawn = region_errors(*given.arguments(), **given.options())
    assert torch.allclose(implied.error, drawn.error, rtol=1e-12) and isinstance(case.noise, PathState)


def test_the_two_layouts_agree_to_float_error(make_case, eps):
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
    for name in ("error", "gap", "count"):
        _, magnitude = case.exact()[name]
        assert (np.abs(array(getattr(one, name) - getattr(other, name))) <= 2 * C * eps * magnitude).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_given_and_noise_regenerated_are_the_same_noise(make_case, layout, launched):
    """Bit for bit: what `keyed_randn` stores is what the fused kernels regenerate."""
    keyed = make_case(layout, noise="keyed")
    given = replace(keyed, noise=keyed_randn(keyed.pred.shape, keyed.noise))
    with launched(*FORWARD, *FORWARD):
        one = region_errors(*keyed.arguments(), **keyed.options())
        other = region_errors(*given.arguments(), **given.options())
    assert torch.equal(one.error, other.error) and torch.equal(one.gap, other.gap)
