"""What a caller can get wrong is refused with a message that names it; what is allowed imports anywhere."""

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from alignkit_kernels import (
    InputError,
    LocalDPOLoss,
    NoiseKey,
    PairRegionErrors,
    PathState,
    PreferenceLoss,
    RegionErrors,
    Stream,
    add_keyed_noise,
    flow_coefficients,
    keyed_rand,
    keyed_randn,
    local_dpo_loss,
    losses,
    pair_region_errors,
    preference_loss,
    region_errors,
    v_coefficients,
)

X = torch.zeros(2, 4, 3, 5, 7)
ROWS = torch.tensor([[0.5, 0.5, 1.0, -1.0]] * 2)
MASK = torch.zeros(2, 1, 3, 5, 7, dtype=torch.uint8)
KEY = NoiseKey(0, torch.tensor([1, 2]), 0)


def errors(pred=X, clean=X, rows=ROWS, noise=KEY, **options):
    return region_errors(pred, clean, rows, noise, **options)


def pairs(*args, **options):
    return pair_region_errors(X, X, X, X, ROWS, *args, **options)


def loss(pred=X, pred_l=X, reference_w=X, reference_l=X, **options):
    given = {"clean_w": X, "clean_l": X, "coefficients": ROWS, "noise_w": KEY, **options}
    return preference_loss(pred, pred_l, reference_w=reference_w, reference_l=reference_l, **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: errors(pred=X.int()), "pred must be a floating-point tensor .* got int32"),
        (lambda: errors(pred=X[0, 0]), r"pred must be .* got float32 \[3, 5, 7\]"),
        (lambda: errors(clean=X[:1]), r"clean is \[1, 4, 3, 5, 7\] but pred is \[2, 4, 3, 5, 7\]"),
        (lambda: errors(pred=X[:0], clean=X[:0]), "pred has no elements"),
        (lambda: errors(rows=ROWS[0]), r"coefficients are \[4\], expected \[2, 4\]"),
        (lambda: errors(rows=ROWS.half()), "coefficients must be a float32 or float64"),
        (lambda: errors(reference=X[..., 1:]), r"reference is \[2, 4, 3, 5, 6\]"),
        (lambda: errors(noise=X[:, 1:]), r"noise is \[2, 3, 3, 5, 7\] but clean is"),
        (lambda: errors(noise=PathState(X[:1])), r"noise.state is \[1, 4"),
        (lambda: errors(noise=7), "noise must be a Tensor, a NoiseKey or a PathState, got int"),
        (lambda: errors(regions=MASK), "num_regions is required"),
        (lambda: errors(num_regions=2), "num_regions is 2 but regions is None"),
        (lambda: errors(regions=MASK, num_regions=0), "num_regions is 0, expected 1 to 255"),
        (lambda: errors(regions=MASK.float(), num_regions=2), "regions must be a uint8 or bool"),
        (lambda: errors(regions=MASK[:, 0], num_regions=2), "every axis must be equal or 1"),
        (lambda: errors(regions=MASK[..., :5], num_regions=2), "every axis must be equal or 1"),
        (lambda: errors(noise=replace(KEY, sample_ids=torch.tensor([1]))), "1 ids for a batch of 2"),
        (lambda: errors(noise=replace(KEY, sample_ids=torch.tensor([1, -2]))), "sample_ids holds -2"),
        (lambda: errors(noise=replace(KEY, sample_ids=torch.tensor([1, 2**32]))), "sample_ids holds 429"),
        (lambda: errors(noise=replace(KEY, sample_ids=[1, 2])), "sample_ids must be an int64 tensor"),
        (lambda: errors(noise=replace(KEY, draw=-1)), "draw holds -1"),
        (lambda: errors(noise=replace(KEY, draw=torch.tensor([1.0]))), "draw must be an int or int64"),
        (lambda: keyed_randn((3, 5), KEY), "2 ids for a batch of 3"),
        (lambda: keyed_randn((2, 0), KEY), "every size at least 1"),
        (lambda: keyed_randn((2, 5), KEY, dtype=torch.int32), "floating-point"),
        (lambda: keyed_randn((2, 5), 3), "key must be a NoiseKey, got int"),
        (lambda: keyed_rand((2, 5), KEY, dtype=torch.bfloat16), "round up to 1"),
        (lambda: add_keyed_noise(X, ROWS[:1], KEY), r"coefficients are \[1, 4\], expected \[2, 4\]"),
        (lambda: pairs(KEY, reference_w=X), "reference_l is None"),
        (lambda: pairs(PathState(X)), "noise_l is required"),
        (lambda: loss(reference_l=None), "pass either the reference's predictions"),
        (lambda: loss(reference_w=None, reference_l=None), "pass either the reference's predictions"),
        (lambda: loss(reference_error_w=ROWS[:, :1].double()), "pass either the reference's predictions"),
        (
            lambda: loss(
                reference_w=None, reference_l=None, reference_error_w=ROWS[:, :1], reference_error_l=ROWS[:, :1]
            ),
            r"reference_error_w is float32 \[2, 1\], expected float64",
        ),
        (lambda: loss(strength=torch.tensor([0.8])), r"strength must be a tensor \[2\]"),
        (lambda: loss(strength_range=(0.9, 0.8)), "expected low <= high"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_importable_without_triton_and_without_anything_else():
    """A machine with torch alone: every other distribution is refused, and the reference path answers."""
    program = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "alignkit", "diffusers", "deepspeed", "transformers", "scipy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import alignkit_kernels as k
x = torch.ones(1, 2, 2, 2)
rows = torch.tensor([[0.5, 0.5, 1.0, -1.0]])
print(float(k.region_errors(x, x, rows, k.NoiseKey(0, torch.tensor([1]), 0)).count))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "8.0", answer.stderr


def test_the_public_names_defaults_and_fields_are_the_contract():
    """Other people's trainers and stored pairs depend on these: what fails here is a breaking change."""
    assert LocalDPOLoss._fields == (
        "loss", "loss_per_pair", "logits_region", "logits_global", "error_w", "error_l", "gap_w", "gap_l",
        "region_gap_w", "region_gap_l", "region_empty",
    )  # fmt: skip
    assert RegionErrors._fields == ("error", "gap", "count")
    assert PairRegionErrors._fields == ("error_w", "error_l", "gap_w", "gap_l", "cross", "count")
    assert PreferenceLoss._fields == (*LocalDPOLoss._fields[:8], "region_error_w", *LocalDPOLoss._fields[8:], "kept",
                                      "ignored")  # fmt: skip
    arguments = inspect.signature(local_dpo_loss).parameters
    assert list(arguments)[:2] == ["pred_w", "pred_l"]
    defaults = {name: x.default for name, x in arguments.items() if x.kind == x.KEYWORD_ONLY}
    required = {name for name, default in defaults.items() if default is inspect.Parameter.empty}
    assert required == {"clean_w", "clean_l", "coefficients", "noise_w"}
    optional = {
        "reference_w": None, "reference_l": None, "noise_l": None, "regions": None, "strength": None,
        "reference_error_w": None, "reference_error_l": None, "weight": None, "beta": 5000.0,
        "strength_range": (0.75, 0.90), "weight_region": 1.0, "weight_global": 1.0, "weight_sft": 0.1,
        "weight_region_sft": 0.0,
    }  # fmt: skip
    assert {name: defaults[name] for name in optional} == optional and set(defaults) == required | set(optional)
    # the same words for the same thing everywhere
    assert required | set(optional) - {"weight_sft"} <= set(inspect.signature(preference_loss).parameters)
    assert {"reference_w", "reference_l"} <= set(inspect.signature(pair_region_errors).parameters)
    assert [stream.name for stream in sorted(Stream)] == [
        "TRAINING", "TIMESTEP", "MASK", "STRENGTH", "CORRUPTION", "ROLLOUT", "CAPTION_DROPOUT", "EVALUATION"
    ]  # fmt: skip
    assert [int(stream) for stream in sorted(Stream)] == list(range(8))
    assert NoiseKey(0, torch.tensor([1]), 0).stream == Stream.TRAINING


F8 = X.to(torch.float8_e4m3fn)
SEGMENTS = torch.zeros(2, 1, 3, 1, 1, dtype=torch.uint8)
SILENT = [  # each was taken, and meant something else, or died of something that named nothing
    (lambda: errors(noise=replace(KEY, draw=0.5)), r"NoiseKey.draw must be an int .* got 0.5"),
    (lambda: errors(noise=replace(KEY, draw=True)), r"NoiseKey.draw must be an int .* got True"),
    (lambda: errors(noise=replace(KEY, stream="training")), r"NoiseKey.stream must be an int .* got 'training'"),
    (lambda: errors(noise=replace(KEY, seed="7")), r"NoiseKey.seed must be an int .* got '7'"),
    (lambda: errors(noise=replace(KEY, sample_ids=torch.tensor([True, False]))), "sample_ids must be an int64 tensor"),
    (lambda: keyed_randn((2, 5), replace(KEY, sample_ids=[1, 2])), "sample_ids must be an int64 tensor"),
    (lambda: keyed_rand((2, 5), replace(KEY, sample_ids=[1, 2])), "sample_ids must be an int64 tensor"),
    (lambda: errors(pred=F8, clean=F8), "pred is float8_e4m3fn .* expected float16, bfloat16"),
    (lambda: errors(clean=F8), "clean is float8_e4m3fn"),
    (lambda: loss(beta="5000"), "beta must be a number or a tensor of one element, got str"),
    (lambda: loss(beta=True), "beta must be a number or a tensor of one element, got bool"),
    (lambda: loss(beta=torch.ones(2)), "beta must be a number or a floating-point tensor of one element"),
    (lambda: loss(beta=float("nan")), "beta is nan, expected a finite number above 0"),
    (lambda: losses.dpo(losses.logits_of(X, X, "5000")), "beta must be a number, got '5000'"),
    (lambda: loss(head="dpop"), "head is 'dpop', expected one of local_dpo, dpo"),
    (lambda: loss(head="ipo", label_smoothing=0.1), "label_smoothing is set, but head 'ipo' does not read it; dpo, "),
    (lambda: loss(head="dpo", label_smoothing=0.5), "label_smoothing is 0.5, expected a finite number of 0 to below 0"),
    (lambda: loss(head="dpo", regions=MASK, num_regions=2), "num_regions is set, but head 'dpo' does not read it"),
    (lambda: loss(head="region_dpo", regions=MASK, num_regions=0), "num_regions is 0, expected 1 to 255"),
    (
        lambda: loss(reference_w=None, reference_l=None, reference_error_w=1.0, reference_error_l=1.0),
        r"reference_error_w is float, expected float64 \[2, 1\]",
    ),
    (lambda: loss(head="poly_dpo", alpha=-2), "alpha is -2, expected a finite number of -1 and above"),
    (lambda: loss(head="winner_guarded", guard_weight=-0.1), "guard_weight is -0.1"),
    (lambda: loss(head="segment_dpo", regions=SEGMENTS), "needs preference"),
    (
        lambda: loss(head="segment_dpo", regions=SEGMENTS, preference=torch.tensor([[1, 2]] * 2)),
        "preference must hold -1, 0 and 1 alone",
    ),
    (lambda: loss(head="sft"), "compares with no reference"),
    (lambda: loss(weight=torch.tensor([1.0, -1.0])), "weight must hold finite numbers of 0 and above"),
    (lambda: loss(weight=torch.ones(3)), r"weight must be a floating-point tensor \[2\]"),
    (lambda: loss(loser_safeguard=1.5), "loser_safeguard is 1.5"),
    (lambda: keyed_randn((2, 5), KEY, shard=(0, 0, 2)), "shard's axis is 0, expected 1 to 1"),
    (lambda: keyed_randn((2, 5), KEY, shard=(1, 3, 7)), "shard starts at 3 of 7, but the part has 5 along axis 1"),
    (lambda: keyed_randn((2, 5), KEY, shard=(1, 0.5, 7)), r"shard must be three ints \(axis, start, full_size\)"),
    (lambda: loss(weight_sft="0.1"), "weight_sft must be a number, got str"),
    (lambda: loss(pred=X[:1], pred_l=None), "stacked predictions are"),
    (lambda: loss(reference_w=X[:1]), r"reference_w is \[1, 4, 3, 5, 7\] but pred_w is"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), SILENT)
def test_a_mistake_that_passed_in_silence_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_coefficients_of_the_two_families():
    levels = torch.tensor([0.0, 0.36, 1.0], dtype=torch.float64)
    assert flow_coefficients(levels).tolist() == [[1, 0, 1, -1], [0.64, 0.36, 1, -1], [0, 1, 1, -1]]
    assert v_coefficients(levels).tolist()[1] == pytest.approx([0.6, 0.8, 0.6, -0.8], rel=1e-15)
    for make in (flow_coefficients, v_coefficients):
        assert make(levels.float()).dtype == torch.float32
        for wrong, message in ((levels + 0.5, "holds 1.5, expected 0 to 1"), (levels.half(), r"got float16 \[3\]"),
                               (levels[None], "must be a float32 or float64 tensor"), (0.5, "got float")):  # fmt: skip
            with pytest.raises(InputError, match=message):
                make(wrong)


def test_keys_and_states_compare_by_identity():
    assert KEY == KEY and NoiseKey(0, torch.tensor([1, 2]), 0) != KEY and PathState(X) != PathState(X)


@pytest.mark.parametrize("call", [lambda x: errors(pred=x).error.sum(), lambda x: loss(pred=x).loss],
                         ids=["region_errors", "preference_loss"])  # fmt: skip
def test_transforms_of_torch_func_and_tangents_are_refused(call):
    """jvp gave a tangent of 0 without a word."""
    with pytest.raises(InputError, match=r"pred\w* is inside a transform of torch.func"):
        torch.func.jvp(call, (X,), (torch.ones_like(X),))
    with pytest.raises(InputError, match=r"is inside a transform of torch.func"):
        torch.func.grad(call)(X)
    with pytest.raises(InputError, match=r"is inside a transform of torch.func"):
        torch.func.vmap(call)(torch.stack([X, X]))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(InputError, match=r"pred\w* has a tangent"):
        call(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
