"""`preference_loss` against `losses` over `pair_region_errors`, head by head, and what a call costs."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit_kernels import (
    InputError,
    NoiseKey,
    PathState,
    count_launches,
    dispatch,
    losses,
    pair_region_errors,
    preference_loss,
)
from alignkit_kernels.pairs import op as pairs_op
from alignkit_kernels.preference import HEADS
from alignkit_kernels.preference import op as loss_op

BATCH = 3
SHAPE = (BATCH, 4, 2, 5, 8)
BETA = 3.0
PREFERENCE = torch.tensor([[1, -1, 0], [0, 0, 0], [-1, 1, 1]])
STRENGTH = torch.tensor([0.75, 0.8, 0.9], dtype=torch.float64)
RANGE = (0.75, 0.9)
GUARD = torch.tensor([0.2, 1.0, 0.0])
OPTIONS = {
    "local_dpo": {"strength": STRENGTH, "weight_region": 0.7, "weight_global": 0.3, "weight_region_sft": 0.2},
    "dpo": {"label_smoothing": 0.1},
    "robust_dpo": {"label_smoothing": 0.2},
    "ipo": {"weight_sft": 0.5},
    "hinge": {"beta": 0.4},
    "poly_dpo": {"alpha": 0.7},
    "winner_guarded": {"guard_weight": 0.5},
    "region_dpo": {"label_smoothing": 0.1, "num_regions": 3},
    "segment_dpo": {"preference": PREFERENCE},
    "sft": {"weight_sft": 0.25, "weight_region_sft": 0.5},
}


@pytest.fixture
def sides(make_case):
    """Random rows (a, s, c, d) for each pair; labels 0, 1, some ignored; one pair whose mask is empty."""
    winner, loser = make_case(shape=SHAPE), make_case(shape=SHAPE, seed=1)
    rows = 0.2 + torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(3)).to(winner.pred.device)
    labels = winner.regions.clone()
    labels[2] = 0
    return [replace(x, coefficients=rows, regions=labels) for x in (winner, loser)]


def expected(head, sums, options, beta, weight_sft, weight_region_sft):
    """Loss of each pair by `losses` alone."""
    elements = sums.count.sum(1)
    error_w, gap_w, gap_l = (x.sum(1) / elements for x in (sums.error_w, sums.gap_w, sums.gap_l))
    z = losses.logits_of(gap_w, gap_l, beta)
    strength = options.get("strength")
    given = sums.error_w, sums.error_l, sums.gap_w, sums.gap_l, sums.count
    loss = {
        "local_dpo": lambda: losses.local_dpo(
            *given, strength=strength, beta=beta, weight_region=0.7, weight_global=0.3, weight_sft=0.0
        ).loss_per_pair,
        "dpo": lambda: losses.dpo(z, 0.1),
        "robust_dpo": lambda: losses.robust_dpo(z, 0.2),
        "ipo": lambda: losses.ipo(z),
        "hinge": lambda: losses.hinge(z),
        "poly_dpo": lambda: losses.poly_dpo(z, 0.7),
        "winner_guarded": lambda: losses.winner_guarded(z, error_w, beta, options["guard_weight"]),
        "region_dpo": lambda: losses.region_dpo(sums.gap_w, sums.gap_l, sums.count, beta, 0.1),
        "segment_dpo": lambda: losses.segment_dpo(
            sums.gap_w, sums.gap_l, sums.count, PREFERENCE.to(z.device), beta
        ),
        "sft": lambda: losses.sft(error_w),
    }[head]()  # fmt: skip
    if weight_region_sft:
        factor = 1 + losses.strength_eta(strength, RANGE, like=z)
        loss = loss + weight_region_sft * factor * losses.pair_means(*given).region_error_w
    return loss + weight_sft * error_w


def coefficient(case, column: int) -> torch.Tensor:
    return case.coefficients[:, column].double()[:, None, None, None, None]


@pytest.mark.parametrize("safeguard", [None, 0.1], ids=["plain", "safeguard"])
@pytest.mark.parametrize("head", HEADS)
def test_each_head_is_the_function_of_its_name(path, sides, eps, head, safeguard):
    """Loss and gradient, with importance weights, and a gradient through the loss of each pair beside the mean's."""
    winner, loser = sides
    options = {"beta": BETA, **OPTIONS[head]}
    beta, sft = options["beta"], options.get("weight_sft", 0.1 if head == "local_dpo" else 0.0)
    labels = "num_regions" in options or "preference" in options
    references = {} if head == "sft" else {"reference_w": winner.reference, "reference_l": loser.reference}
    importance = torch.tensor([1.0, 0.5, 2.0], device=winner.pred.device)
    if head == "winner_guarded" and safeguard:
        options["guard_weight"] = GUARD.to(winner.pred.device)
    preds = [x.pred.double() for x in sides]
    if safeguard:  # the loser's residual along the winner's, in the first two pairs: it holds back their losers
        along = torch.tensor([4.0, 2.0, -1.0], dtype=torch.float64, device=preds[0].device)[:, None, None, None, None]
        targets = [coefficient(x, 2) * x.noise.double() + coefficient(x, 3) * x.clean.double() for x in sides]
        preds[1] = targets[1] + along * (preds[0] - targets[0])
        loser = replace(loser, reference=preds[1] + (loser.reference - loser.pred))
        references |= {"reference_l": loser.reference} if references else {}
    preds = [pred.requires_grad_() for pred in preds]
    got = preference_loss(
        *preds, head=head, clean_w=winner.clean, clean_l=loser.clean, coefficients=winner.coefficients,
        noise_w=winner.noise, noise_l=loser.noise, regions=winner.regions, weight=importance,
        loser_safeguard=safeguard, **references, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(got.loss + 0.1 * got.loss_per_pair.sum(), preds, materialize_grads=True)

    regions = winner.regions if labels else winner.regions != 0
    sums = pair_region_errors(
        *preds, winner.clean, loser.clean, winner.coefficients, winner.noise, loser.noise,
        reference_w=winner.reference, reference_l=loser.reference, regions=regions, num_regions=3 if labels else 2,
    )  # fmt: skip
    terms = options, beta, sft, options.get("weight_region_sft", 0.0)
    if safeguard is not None:
        apart = [x.detach().requires_grad_() for x in (sums.error_w, sums.gap_w, sums.gap_l)]
        loss = expected(head, sums._replace(**dict(zip(("error_w", "gap_w", "gap_l"), apart, strict=True))), *terms)
        by_error, by_gap, by_loser = torch.autograd.grad(loss.sum(), apart, materialize_grads=True)
        weights = {"weight_w": (by_error + by_gap).clamp(min=0), "weight_l": (-by_loser).clamp(min=0)}
        kept = losses.loser_safeguard(sums.error_w, sums.cross, safeguard, **weights)
        sums = sums._replace(gap_l=losses.scale_gradient(sums.gap_l, kept[:, None]))
        assert torch.allclose(got.kept, kept, rtol=1e-12)
        held_back = (got.kept > 0) & (got.kept < 1)
        assert head == "sft" or held_back.any(), "nothing is held back: the gradient below would not show it"
    loss = expected(head, sums, *terms)
    assert torch.allclose(got.loss_per_pair, loss, rtol=1e-12, atol=1e-15)
    total = (importance.double() * loss).mean()
    assert got.loss.item() == pytest.approx(total.item(), rel=1e-12)
    true = torch.autograd.grad(total + 0.1 * loss.sum(), preds, materialize_grads=True)
    for a, b in zip(gradients, true, strict=True):
        # fp64 throughout: a region's weight is the head's few dozen operations
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_any_size_give_finite_losses(path, sides, head):
    winner, loser = sides
    references = {} if head == "sft" else {"reference_w": 2 * winner.reference, "reference_l": loser.reference}
    for beta in (1e-6, 1e6):
        preds = [x.pred.clone().requires_grad_() for x in sides]
        got = preference_loss(
            *preds, head=head, clean_w=winner.clean, clean_l=loser.clean, coefficients=winner.coefficients,
            noise_w=winner.noise, regions=winner.regions, **references, **{**OPTIONS[head], "beta": beta},
        )  # fmt: skip
        got.loss.backward()
        assert all(x.isfinite().all() for x in (*got, *(p.grad for p in preds if p.grad is not None)))


def test_a_loss_near_zero_keeps_its_digits(path, sides):
    """log(1 + exp(-z)) of a pair that is won by far, where 1 + exp(-z) has lost them."""
    winner, loser = sides

    def result(beta: float, first, second):
        return preference_loss(
            first.pred, second.pred, head="dpo", clean_w=first.clean, clean_l=second.clean, noise_w=first.noise,
            noise_l=second.noise, coefficients=first.coefficients, reference_w=first.reference,
            reference_l=second.reference, beta=beta,
        )  # fmt: skip

    order = (winner, loser) if result(1.0, winner, loser).logits_global.max() > 0 else (loser, winner)
    most = result(1.0, *order).logits_global.max().item()
    for logit in (10.0, 35.0, 60.0):
        got = result(logit / most, *order)
        assert got.logits_global.max().item() == pytest.approx(logit)
        true = -torch.nn.functional.logsigmoid(got.logits_global)
        # ours: exponential and logarithm 1 ulp each, a product and a quotient half of one each, half for 1 + exp(-z);
        # torch's: exponential and log1p 1 each. Five and a half ulp of at most 2**-52
        assert torch.allclose(got.loss_per_pair, true, rtol=12 * 2**-53, atol=0)


def test_every_number_of_a_pair_is_that_of_local_dpo(path, sides):
    winner, loser = sides
    shared = (winner.clean, loser.clean, winner.coefficients, winner.noise)
    references = {"reference_w": winner.reference, "reference_l": loser.reference}
    mask = winner.regions != 0
    sums = pair_region_errors(winner.pred, loser.pred, *shared, **references, regions=mask, num_regions=2)
    true = losses.local_dpo(sums.error_w, sums.error_l, sums.gap_w, sums.gap_l, sums.count, strength=STRENGTH)
    got = preference_loss(
        winner.pred, loser.pred, clean_w=winner.clean, clean_l=loser.clean, coefficients=winner.coefficients,
        noise_w=winner.noise, regions=mask, strength=STRENGTH, **references,
    )  # fmt: skip
    for name in true._fields:
        a, b = getattr(got, name), getattr(true, name)
        assert torch.equal(a, b) if a.dtype == torch.bool else torch.allclose(a, b, rtol=1e-12, atol=1e-15), name
    assert got.region_empty.tolist() == [False, False, True]
    assert not any(getattr(got, name).requires_grad for name in got._fields[2:])


def test_a_mask_is_inside_where_it_is_not_zero_and_labels_beyond_are_counted(path, sides):
    """0 and 255 is what a PNG holds: as labels, all of the inside would be ignored without a word."""
    winner, loser = sides
    given = {
        "clean_w": winner.clean, "clean_l": loser.clean, "coefficients": winner.coefficients, "noise_w": winner.noise,
        "reference_w": winner.reference, "reference_l": loser.reference,
    }  # fmt: skip
    mask = winner.regions == 1
    answers = []
    for regions in (mask, mask.to(torch.uint8), 255 * mask.to(torch.uint8)):
        preds = [x.pred.clone().requires_grad_() for x in sides]
        got = preference_loss(*preds, regions=regions, **given)
        got.loss.backward()
        answers.append((got.loss.detach(), got.logits_region, *(p.grad for p in preds)))
        assert got.ignored.tolist() == [0.0] * BATCH
    assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))
    labelled = preference_loss(
        winner.pred, loser.pred, head="region_dpo", regions=winner.regions, num_regions=2, **given
    )
    assert labelled.ignored.tolist() == [4.0 * int((x >= 2).sum()) for x in winner.regions]
    assert labelled.ignored[0] > 0


def test_stacked_predictions_give_the_same_bits_and_one_gradient(path, sides):
    winner, loser = sides
    given = {
        "clean_w": winner.clean, "clean_l": loser.clean, "coefficients": winner.coefficients, "noise_w": winner.noise,
        "reference_w": winner.reference, "reference_l": loser.reference, "regions": winner.regions,
    }  # fmt: skip
    preds = [x.pred.clone().requires_grad_() for x in sides]
    apart = preference_loss(*preds, **given)
    apart.loss.backward()
    stacked = torch.cat([x.pred for x in sides]).requires_grad_()
    together = preference_loss(stacked, **given)
    together.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert torch.equal(stacked.grad, torch.cat([p.grad for p in preds]))


@pytest.mark.parametrize("noise", ["keyed", "path", "mixed"])
def test_noise_sources_of_both_sides_reach_loss_and_gradient(path, make_case, noise):
    """Each side's own source, its stride and its key, with rows of each sample's own."""
    kinds = {"keyed": ("keyed", "keyed"), "path": ("path", "path"), "mixed": ("path", "keyed")}[noise]
    winner, loser = (make_case(shape=SHAPE, noise=kind, seed=seed) for seed, kind in enumerate(kinds))
    if isinstance(loser.noise, NoiseKey):
        loser = replace(loser, noise=replace(loser.noise, sample_ids=loser.noise.sample_ids + 50, draw=4))
    rows = 0.2 + torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(5)).to(winner.pred.device)
    winner, loser = (replace(x, coefficients=rows) for x in (winner, loser))
    given = torch.from_numpy(winner.epsilon()).to(winner.pred), torch.from_numpy(loser.epsilon()).to(loser.pred)
    found = []
    for sources in ((winner.noise, loser.noise), given):
        preds = [x.pred.double().requires_grad_() for x in (winner, loser)]
        sources = [PathState(x.state.double()) if isinstance(x, PathState) else x for x in sources]
        sources = [x.double() if isinstance(x, torch.Tensor) else x for x in sources]
        got = preference_loss(
            *preds, clean_w=winner.clean.double(), clean_l=loser.clean.double(), coefficients=rows, beta=BETA,
            noise_w=sources[0], noise_l=sources[1], reference_w=winner.reference, reference_l=loser.reference,
            regions=winner.regions,
        )  # fmt: skip
        got.loss.backward()
        found.append((got.loss_per_pair.detach(), *(p.grad for p in preds)))
    for a, b in zip(*found, strict=True):
        # noise is fp32 on one of the two ways, divided by s of at least 0.2 on the path
        assert (a - b).abs().max() <= 40 * 2.0**-24 * b.abs().max()


def test_beta_may_be_a_tensor_of_the_device(path, sides):
    winner, loser = sides
    given = {
        "clean_w": winner.clean, "clean_l": loser.clean, "coefficients": winner.coefficients, "noise_w": winner.noise,
        "reference_w": winner.reference, "reference_l": loser.reference,
    }  # fmt: skip
    number = preference_loss(winner.pred, loser.pred, beta=7.5, **given)
    for beta in (torch.tensor(7.5), torch.tensor([7.5], dtype=torch.float64)):
        tensor = preference_loss(winner.pred, loser.pred, beta=beta.to(winner.pred.device), **given)
        assert torch.equal(number.loss_per_pair, tensor.loss_per_pair)


def to_cpu(x):
    return replace(x, sample_ids=x.sample_ids.cpu()) if isinstance(x, NoiseKey) else x.cpu()


def part(rank: int, folder: str, cases: list, options: dict) -> None:
    """One of two processes: the loss of its half of the frames, and what it finds."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        frames = slice(2, None) if rank else slice(2)  # 2 and 3 of 5
        winner, loser = (
            {name: x[:, :, frames] if isinstance(x, torch.Tensor) and x.dim() == 5 else x for name, x in case.items()}
            for case in cases
        )
        preds = [x["pred"].clone().requires_grad_() for x in (winner, loser)]
        got = preference_loss(
            *preds, clean_w=winner["clean"], clean_l=loser["clean"], coefficients=winner["coefficients"],
            noise_w=winner["noise"], reference_w=winner["reference"], reference_l=loser["reference"],
            regions=winner["regions"], process_group=torch.distributed.group.WORLD,
            shard=(2, frames.start or 0, 5), **options,
        )  # fmt: skip
        got.loss.backward()
        torch.save(([x.detach() for x in got], [p.grad for p in preds]), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("head", "noise"), [("local_dpo", "given"), ("region_dpo", "keyed")])
def test_parts_of_latents_in_two_processes_give_the_loss_of_the_whole(make_case, tmp_path, head, noise):
    """Cut along the frames, unevenly: the same loss, and each process the gradient of its part."""
    options = {"head": head, "beta": BETA, "loser_safeguard": 0.1}
    options |= {"num_regions": 2} if head == "region_dpo" else {"weight_region_sft": 0.2}
    cases = [make_case(shape=(2, 3, 5, 4, 8), dtype=torch.float64, noise=noise, seed=seed) for seed in range(2)]
    names = "pred", "reference", "clean", "noise", "regions", "coefficients"
    given = [{name: to_cpu(getattr(case, name)) for name in names} for case in cases]
    torch.multiprocessing.spawn(part, (str(tmp_path), given, options), nprocs=2)
    preds = [x.pred.cpu().requires_grad_() for x in cases]
    whole = preference_loss(
        *preds, clean_w=given[0]["clean"], clean_l=given[1]["clean"], coefficients=given[0]["coefficients"],
        noise_w=given[0]["noise"], reference_w=given[0]["reference"], reference_l=given[1]["reference"],
        regions=given[0]["regions"], **options,
    )  # fmt: skip
    whole.loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for numbers, _ in parts:
        for name, a, b in zip(whole._fields, numbers, whole, strict=True):
            # sums of two halves are rounded once more than the whole's: a few of 2**-53, in logits times beta / 2
            torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13, msg=name)
    for side, pred in enumerate(preds):
        together = torch.cat([gradients[side] for _, gradients in parts], dim=2)
        torch.testing.assert_close(together, pred.grad, rtol=1e-12, atol=0)


def test_a_key_is_refused_for_parts_that_lie_nowhere(make_case):
    case = make_case(noise="keyed")
    with pytest.raises(InputError, match="keyed noise with process_group needs shard"):
        preference_loss(
            case.pred, case.pred, clean_w=case.clean, clean_l=case.clean, coefficients=case.coefficients,
            noise_w=case.noise, reference_w=case.pred, reference_l=case.pred, process_group=object(),
        )  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what starts a kernel, inside our own ops too: views, `empty` and copies from the host are free."""

    FREE: ClassVar = {
        "empty", "empty_like", "empty_strided", "new_empty", "view", "slice", "select", "unbind", "expand", "detach",
        "_to_copy", "lift_fresh",
    }  # fmt: skip
    BODIES: ClassVar = {
        str(op._opoverload): op._init_fn
        for op in (loss_op.preference_loss, loss_op.preference_loss_backward, pairs_op.pair_region_errors)
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if body := self.BODIES.get(str(func)):
            with self:
                return body(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.FREE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not dispatch.HAVE_TRITON or dispatch.INTERPRETED, reason="the interpreter's kernels run on torch")
@pytest.mark.parametrize("variant", ["predictions", "stored errors", "stacked"])
def test_a_whole_call_is_four_launches_of_ours_and_three_of_torchs(make_case, device, monkeypatch, variant):
    """Without a GPU the launches are caught where triton would start them."""
    if device.type != "cuda":
        monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **options: None)
        monkeypatch.setattr(dispatch, "runs_kernels", lambda x: True)
    winner, loser = make_case("aligned", dtype=torch.bfloat16), make_case("aligned", dtype=torch.bfloat16, seed=1)
    given = {
        "clean_w": winner.clean, "clean_l": loser.clean, "coefficients": winner.coefficients, "regions": winner.regions,
        "weight": torch.ones(2, device=device), "noise_w": NoiseKey(3, torch.tensor([4, 5]), 1),
        "strength": torch.tensor([0.75, 0.9], dtype=torch.float64),
    }  # fmt: skip
    if variant == "stored errors":
        stored = torch.ones(2, 2, dtype=torch.float64, device=device)
        given |= {"reference_error_w": stored, "reference_error_l": stored}
    else:
        given |= {"reference_w": winner.reference, "reference_l": loser.reference}
    preds = [x.pred.clone().requires_grad_() for x in (winner, loser)]
    if variant == "stacked":
        preds = [torch.cat(preds).detach().requires_grad_()]
    with count_launches() as ours, Launches() as mode:
        preference_loss(*preds, **given).loss.backward()
    assert sum(ours.values()) == 4 and len(mode.names) <= 3, (ours, mode.names)
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        for pred in preds:
            pred.grad = None  # adding to one would be torch's own launch
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            preference_loss(*preds, **given).loss.backward()
            torch.cuda.synchronize()
        started = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len([name for name in started if not name.startswith(("Memcpy", "Memset"))]) <= 7, started


def test_a_captured_graph_draws_new_noise_for_a_new_draw(path, make_case, device):
    if device.type != "cuda" or path == "reference":
        pytest.skip("graphs are of a GPU")
    winner, loser = make_case("aligned", dtype=torch.bfloat16), make_case("aligned", dtype=torch.bfloat16, seed=1)
    draw = torch.tensor([1], device=device)
    key = NoiseKey(torch.tensor([3], device=device), torch.tensor([4, 5], device=device), draw,
                   torch.tensor([0], device=device))  # fmt: skip
    pred = torch.cat([winner.pred, loser.pred]).requires_grad_()
    out = torch.zeros((), dtype=torch.float64, device=device)

    def step():
        pred.grad = None
        got = preference_loss(
            pred, clean_w=winner.clean, clean_l=loser.clean, coefficients=winner.coefficients, noise_w=key,
            regions=winner.regions, reference_w=winner.reference, reference_l=loser.reference,
        )  # fmt: skip
        got.loss.backward()
        out.copy_(got.loss.detach())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = {}
    for number in (1, 2, 1):
        draw.fill_(number)
        graph.replay()
        torch.cuda.synchronize()
        found.setdefault(number, []).append(out.item())
    assert found[1][0] == found[1][1] != found[2][0]
    draw.fill_(2)
    step()
    assert out.item() == found[2][0]
