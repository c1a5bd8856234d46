"""The ops as torch's machinery and memory see them."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit_kernels import (
    NoiseKey,
    PathState,
    add_keyed_noise,
    dispatch,
    keyed_randn,
    local_dpo_loss,
    pair_region_errors,
    region_errors,
)
from alignkit_kernels.errors import op as errors_op
from alignkit_kernels.noise import op as noise_op
from alignkit_kernels.pairs import op as pairs_op
from alignkit_kernels.preference import op as loss_op
from alignkit_kernels.sources import key_rows

pytestmark = pytest.mark.usefixtures("path")
SHAPE = (2, 2, 1, 2, 3)


@pytest.fixture
def pair(make_case):
    return make_case(shape=SHAPE, noise="keyed"), make_case(shape=SHAPE, seed=1)


def test_what_is_made_lies_as_the_compiler_is_told(make_case, device):
    """Contiguous, whatever the size, and however the inputs lie."""
    shape = (2, 2, 1, 3, 5)  # 30 elements: no multiple of 4
    case, keys = make_case(shape=shape), key_rows(NoiseKey(1, torch.arange(2, device=device), 0), 2, device)
    made = [make(list(shape), keys, dtype) for make in (noise_op.keyed_normal, noise_op.keyed_uniform)
            for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    noise = case.noise.transpose(3, 4).contiguous().transpose(3, 4)
    grad = torch.ones(3, 2, 2, dtype=torch.float64, device=device)
    arguments = grad, case.pred, case.clean, case.coefficients, "given", noise, case.regions
    made.append(errors_op.region_errors_backward(*arguments))
    assert not noise.is_contiguous() and all(x.is_contiguous() for x in made)


def test_opcheck(pair, device):
    winner, loser = pair
    keys = key_rows(winner.noise, 2, device)
    pred_w, pred_l = winner.pred.requires_grad_(), loser.pred.requires_grad_()
    rows, regions = winner.coefficients, winner.regions
    check = torch.library.opcheck
    check(noise_op.keyed_normal, (list(SHAPE), keys, torch.bfloat16))
    check(noise_op.keyed_uniform, (list(SHAPE), keys, torch.float32))
    check(noise_op.add_noise, (winner.clean, rows, "keyed", keys))
    check(errors_op.region_errors, (pred_w, winner.reference, winner.clean, rows, "keyed", keys, regions, 2))
    check(errors_op.region_errors, (pred_w, None, winner.clean, rows, "given", loser.noise, None, 1))
    grad = torch.ones(3, 2, 2, dtype=torch.float64, device=device)
    check(
        errors_op.region_errors_backward,
        (grad, pred_w.detach(), winner.clean, rows, "keyed", keys, regions),
    )
    sides = (pred_w, pred_l, winner.reference, loser.reference, winner.clean, loser.clean, rows)
    check(pairs_op.pair_region_errors, (*sides, "keyed", keys, "given", loser.noise, regions, 2))
    grad = torch.ones(6, 2, 2, dtype=torch.float64, device=device)
    sides = (grad, pred_w.detach(), pred_l.detach(), winner.clean, loser.clean, rows)
    check(pairs_op.pair_region_errors_backward, (*sides, "keyed", keys, "keyed", None, regions))
    sides = pred_w, pred_l, winner.reference, loser.reference, winner.clean, loser.clean, rows
    settings = [5.0, 0.75, 0.9, 1.0, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    check(loss_op.preference_loss, (*sides, "keyed", keys, "keyed", None, regions, 2, 1, *[None] * 8, "local_dpo",
                                    settings))  # fmt: skip
    weights, by_loss = torch.ones(2, 2, 2, device=device), torch.ones((), dtype=torch.float64, device=device)
    sides = by_loss, None, weights, None, pred_w.detach(), pred_l.detach(), winner.clean, loser.clean, rows
    check(loss_op.preference_loss_backward, (*sides, "keyed", keys, "keyed", None, regions, 1))


@pytest.mark.parametrize("noise", ["key", "tensor", "path"])
def test_compiles_as_one_graph(pair, device, launched, noise):
    """One graph: so the host waits for no number, either."""
    winner, loser = pair
    rows, regions = winner.coefficients, winner.regions

    def step(pred_w, pred_l, ids):
        key = NoiseKey(3, ids, 1)
        noisy_w, noisy_l = (add_keyed_noise(x.clean, rows, key) for x in pair)
        drawn = keyed_randn(pred_w.shape, key)
        noises = {"key": (key, None), "tensor": (drawn, None), "path": (PathState(noisy_w), PathState(noisy_l))}[noise]
        return local_dpo_loss(
            pred_w, pred_l, reference_w=winner.reference, reference_l=loser.reference, clean_w=winner.clean,
            clean_l=loser.clean, coefficients=rows, noise_w=noises[0], noise_l=noises[1], regions=regions,
            strength=torch.tensor([0.8, 0.9]),
        ).loss + (noisy_w + noisy_l + drawn).mean()  # fmt: skip

    ids = torch.tensor([4, 5], device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    fused = (
        "pair_region_errors_kernel", "sum_tiles_kernel", "preference_head_kernel", "pair_region_errors_backward_kernel"
    )  # fmt: skip
    grads = []
    for function in (step, compiled):
        preds = [x.pred.clone().requires_grad_() for x in pair]
        with launched("keyed_kernel", "add_noise_kernel", "add_noise_kernel", *fused):
            loss = function(*preds, ids)
            loss.backward()
        grads.append((loss.detach(), *(x.grad for x in preds)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def everything(case, other) -> list[torch.Tensor]:
    """Every number, gradient and noise there is."""
    pred, pred_l = (x.pred.detach().requires_grad_() for x in (case, other))
    own = region_errors(pred, *case.arguments()[1:], **case.options())
    pair = pair_region_errors(
        pred, pred_l, case.clean, other.clean, case.coefficients, case.noise,
        reference_w=case.reference, reference_l=other.reference, regions=case.regions, num_regions=case.num_regions,
    )  # fmt: skip
    grads = torch.autograd.grad((own.error + own.gap).sum() + (pair.gap_l + pair.cross).sum(), (pred, pred_l))
    noisy = add_keyed_noise(case.clean, case.coefficients, case.noise)
    ids = torch.tensor([1, 2], device=case.pred.device)
    return [x.detach() for x in (*own, *pair, *grads, noisy, keyed_randn((2, 5), NoiseKey(0, ids, 0)))]


def test_no_number_comes_from_memory_that_was_never_written(make_case, device):
    """torch fills what `empty` returns with NaN, and nothing changes."""
    case, other = make_case("aligned", num_regions=2), make_case("aligned", seed=1)
    expected = everything(case, other)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2, device=device).isnan().all() and torch.ones(2, device=device).new_empty(2).isnan().all()
        poisoned = everything(case, other)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("shape", [SHAPE, (2, 2, 1, 2, 4)])
def test_offsets_beyond_two_to_the_31_elements(make_case, shape):
    """Two samples more than 2**31 elements apart; the memory between them is never touched."""
    row = 2**31 + 8

    def far(x):
        storage = torch.empty(row + x[0].numel(), dtype=x.dtype, device=x.device)
        return storage.as_strided(x.shape, (row, *x.stride()[1:])).copy_(x)

    def and_back(x):
        return x, replace(x, pred=x.reference, reference=x.pred)

    case = make_case(shape=shape, dtype=torch.bfloat16, num_regions=None)
    spread = replace(
        case, pred=far(case.pred), reference=far(case.reference), clean=far(case.clean), noise=far(case.noise)
    )
    near, got = everything(*and_back(case)), everything(*and_back(spread))
    assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))


class NoHostReads(TorchDispatchMode):
    """Fails at anything for which the host would wait for a GPU, inside our own ops too."""

    WAITS = "item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"
    BODIES: ClassVar = {
        str(op._opoverload): op._init_fn
        for op in (
            errors_op.region_errors, errors_op.region_errors_backward, noise_op.keyed_normal, noise_op.add_noise,
            pairs_op.pair_region_errors, pairs_op.pair_region_errors_backward, loss_op.preference_loss,
            loss_op.preference_loss_backward,
        )
    }  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        if body := self.BODIES.get(str(func)):
            with self:
                return body(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing(pair, device, monkeypatch):
    """Forward and backward read no number of a tensor. Where tensors live on the host, looking is free and bad ids and
    strengths are refused at once; here the path of device tensors is taken."""
    winner, loser = pair
    preds = [x.pred.requires_grad_() for x in pair]
    ids, strength = torch.tensor([4, 5], device=device), torch.tensor([0.8, 0.9], device=device)

    def step():
        key = NoiseKey(3, ids, 1)
        noisy = add_keyed_noise(winner.clean, winner.coefficients, key)
        loss = local_dpo_loss(
            *preds, reference_w=winner.reference, reference_l=loser.reference, clean_w=winner.clean,
            clean_l=loser.clean, coefficients=winner.coefficients, noise_w=key, regions=winner.regions,
            strength=strength,
        ).loss  # fmt: skip
        own = region_errors(preds[0], *winner.arguments()[1:], **winner.options())
        (loss + own.gap.sum()).backward()
        return noisy.mean() + keyed_randn((2, 3), key).mean()

    if device.type == "cuda":
        step()  # what is allocated or compiled the first time may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with NoHostReads():
            step()


GUARDED = """
import ctypes, mmap, torch
from alignkit_kernels import (
    NoiseKey, PathState, add_keyed_noise, count_launches, keyed_randn, pair_region_errors, preference_loss,
    region_errors
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
            apart = PathState(make(torch.float32)), key
            pair_region_errors(*sides, make(), make(), rows, *apart, reference_w=make(), reference_l=make())
            mask, strength = guarded((regions > 0).to(torch.uint8), at_end), guarded(torch.tensor([0.8, 0.9]), at_end)
            loss = preference_loss(
                *sides, clean_w=make(), clean_l=make(), coefficients=rows, noise_w=key, regions=mask, strength=strength,
                weight=strength, reference_w=make(), reference_l=make(), loser_safeguard=0.5,
            )
            (loss.loss + loss.loss_per_pair.sum()).backward()
            add_keyed_noise(make(), rows, key)
            keyed_randn(shape, key)
print(sum(launched.values()))
"""


def test_nothing_outside_an_input_is_read(path):
    """Every input ends, then starts, at a page that may not be touched: of the host, so under the interpreter."""
    if path == "triton" and not dispatch.INTERPRETED:
        pytest.skip("kernels run on the device here")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if path == "triton" else "0"}
    command = [sys.executable, "-c", GUARDED]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, f"{answer.returncode}: {answer.stderr[-1000:]}"
    assert (int(answer.stdout) > 0) == (path == "triton")
