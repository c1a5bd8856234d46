"""The ops as torch's machinery and memory see them."""

import os
import subprocess
import sys

import pytest
import torch

from alignkit_kernels import NoiseKey, keyed_randn, local_dpo_loss, region_errors
from alignkit_kernels.errors import op as errors_op
from alignkit_kernels.noise import op as noise_op
from alignkit_kernels.pairs import op as pairs_op
from alignkit_kernels.sources import key_rows

pytestmark = pytest.mark.usefixtures("path")
SHAPE = (2, 2, 1, 2, 3)


@pytest.fixture
def pair(make_case):
    return make_case(shape=SHAPE, noise="keyed"), make_case(shape=SHAPE, seed=1)


def test_opcheck(pair):
    winner, loser = pair
    keys = key_rows(winner.noise, 2, torch.device("cpu"))
    pred_w, pred_l = winner.pred.requires_grad_(), loser.pred.requires_grad_()
    rows, regions = winner.coefficients, winner.regions
    check = torch.library.opcheck
    check(noise_op.keyed_normal, (list(SHAPE), keys, torch.bfloat16))
    check(noise_op.keyed_uniform, (list(SHAPE), keys, torch.float32))
    check(noise_op.add_noise, (winner.clean, rows, "keyed", keys))
    check(errors_op.region_errors, (pred_w, winner.reference, winner.clean, rows, "keyed", keys, regions, 2))
    check(errors_op.region_errors, (pred_w, None, winner.clean, rows, "given", loser.noise, None, 1))
    grad = torch.ones(3, 2, 2, dtype=torch.float64)
    check(
        errors_op.region_errors_backward,
        (grad, pred_w.detach(), winner.clean, rows, "keyed", keys, regions),
    )
    sides = (pred_w, pred_l, winner.reference, loser.reference, winner.clean, loser.clean, rows)
    check(pairs_op.pair_region_errors, (*sides, "keyed", keys, "given", loser.noise, regions, 2))
    grad = torch.ones(6, 2, 2, dtype=torch.float64)
    sides = (grad, pred_w.detach(), pred_l.detach(), winner.clean, loser.clean, rows)
    check(pairs_op.pair_region_errors_backward, (*sides, "keyed", keys, "keyed", None, regions))


def test_compiles_as_one_graph(pair):
    winner, loser = pair

    def step(pred_w, pred_l, ids):
        return local_dpo_loss(
            pred_w, pred_l, winner.reference, loser.reference, winner.clean, loser.clean, winner.coefficients,
            NoiseKey(3, ids, 1), regions=winner.regions, strength=torch.tensor([0.8, 0.9]),
        ).loss  # fmt: skip

    ids = torch.tensor([4, 5])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        preds = [x.pred.clone().requires_grad_() for x in pair]
        loss = function(*preds, ids)
        loss.backward()
        grads.append((loss.detach(), *(x.grad for x in preds)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_number_comes_from_memory_that_was_never_written(make_case):
    """torch fills what `empty` returns with NaN, and nothing changes."""
    case = make_case("aligned", num_regions=2)

    def run():
        pred = case.pred.clone().requires_grad_()
        got = region_errors(pred, *case.arguments()[1:], **case.options())
        (got.error + got.gap).sum().backward()
        noise = keyed_randn((2, 5), NoiseKey(0, torch.tensor([1, 2]), 0))
        return got.error.detach(), got.gap.detach(), got.count, pred.grad, noise

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


def test_offsets_beyond_two_to_the_31_elements(make_case):
    """Two samples 2**31 elements apart; the memory between them is never touched."""
    case = make_case(shape=SHAPE, dtype=torch.bfloat16, num_regions=None)
    elements = case.pred[0].numel()
    storage = torch.empty(2**31 + elements, dtype=torch.bfloat16)
    far = storage.as_strided(SHAPE, (2**31, *case.pred.stride()[1:]))
    far.copy_(case.pred)
    near = region_errors(*case.arguments(), reference=case.reference)
    got = region_errors(far, *case.arguments()[1:], reference=case.reference)
    assert torch.equal(got.error, near.error) and torch.equal(got.gap, near.gap)


GUARDED = """
import ctypes, mmap, torch
from alignkit_kernels import (
    NoiseKey, PathState, add_keyed_noise, count_launches, pair_region_errors, region_errors
)

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def guarded(x, at_end):
    "x in the middle one of three areas, flush with the end or the start; the others may not be touched."
    x = x.contiguous()
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    middle = -(-size // page) * page
    area = mmap.mmap(-1, middle + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for start in (address, address + page + middle):
        assert libc.mprotect(ctypes.c_void_p(start), page, 0) == 0
    offset = page + (middle - size if at_end else 0)
    buffer = (ctypes.c_char * size).from_address(address + offset)
    keep.append((area, buffer))
    out = torch.frombuffer(buffer, dtype=x.dtype).view(x.shape)
    out.copy_(x)
    return out

with count_launches() as launched:
    for at_end in (True, False):
        for shape in ((2, 2, 1, 3, 5), (2, 2, 1, 2, 4)):
            def make(dtype=torch.bfloat16):
                return guarded(torch.randn(shape).to(dtype), at_end)
            rows = guarded(torch.tensor([[0.5, 0.5, 1.0, -1.0]] * 2), at_end)
            regions = guarded(torch.randint(0, 3, (2, 1, *shape[2:])).to(torch.uint8), at_end)
            strided = guarded(torch.randint(0, 3, (2, 1, shape[2], 1, shape[4])).to(torch.uint8), at_end)
            ids = guarded(torch.tensor([3, 4]), at_end)
            key = NoiseKey(1, ids, 0)
            for noise in (make(), key, PathState(make(torch.float32))):
                pred = make().requires_grad_()
                got = region_errors(pred, make(), rows, noise, reference=make(), regions=regions, num_regions=2)
                (got.error + got.gap).sum().backward()
            region_errors(make(), make(), rows, key, regions=strided, num_regions=2)
            sides = make().requires_grad_(), make().requires_grad_()
            got = pair_region_errors(*sides, make(), make(), rows, make(), regions=regions, num_regions=2)
            got.cross.sum().backward()
            add_keyed_noise(make(), rows, key)
print(sum(launched.values()))
"""


def test_nothing_outside_an_input_is_read(path):
    """Every input ends, then starts, at a page that may not be touched."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if path == "triton" else "0"}
    command = [sys.executable, "-c", GUARDED]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, f"{answer.returncode}: {answer.stderr[-1000:]}"
    assert (int(answer.stdout) > 0) == (path == "triton")
