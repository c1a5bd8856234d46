"""What triton would compile for the calls a user makes, without a GPU: launches are caught where triton decides."""

from dataclasses import replace

import pytest
import torch

from alignkit_kernels import (
    NoiseKey,
    PathState,
    add_keyed_noise,
    dispatch,
    keyed_rand,
    keyed_randn,
    pair_region_errors,
    preference_loss,
    region_errors,
)

pytest.importorskip("triton", "3.6", reason="launches are caught as triton 3.6 and newer make them")
pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture
def compiles(monkeypatch) -> dict:
    """Filled by launches, which then do not happen: kernel and what it is specialised on -> a way to compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend, found = make_backend(target), {}

    def decide(kernel, *args, grid, warmup, **options):
        options = {"debug": False, "instrumentation_mode": "", **options}
        bound, specialisation, chosen = create_function_from_signature(kernel.signature, kernel.params, backend)(
            *args, **options
        )

        def build():
            packed, signature, constants, attributes = kernel._pack_args(
                backend, options, bound, specialisation, chosen
            )
            return triton.compile(
                ASTSource(kernel, signature, constants, attributes), target=target, options=packed.__dict__
            )

        assert options["enable_fp_fusion"] is False, "its default changes between versions, and the bits with it"
        if bound.get("ALIGNED"):  # the kernel was promised whole vectors
            for name, x in bound.items():
                if isinstance(x, torch.Tensor) and name != "coefficients_ptr":
                    vector = 8 if name == "labels_ptr" else 16
                    assert x.data_ptr() % vector == 0, name
                    if x.dim() >= 4 and name != "partial_ptr":  # each sample starts there as well
                        assert x.stride(0) * x.element_size() % vector == 0, name
        found.setdefault((kernel.__name__, str(specialisation), str(chosen)), build)

    monkeypatch.setattr(JITFunction, "run", decide)
    monkeypatch.setattr(dispatch, "runs_kernels", lambda x: True)
    return found


def calls(batch: int, sizes: tuple[int, ...], num_regions: int, seed: int, shift: int = 0, apart: int = 0) -> None:
    """Every public function, forward and backward, on latents of one size that start `shift` elements into memory and
    whose samples have `apart` elements between them."""
    shape = (batch, *sizes)

    def latent(dtype=torch.bfloat16):
        elements = sizes[0] * sizes[1] * sizes[2] * sizes[3] + apart
        rows = torch.zeros(shift + batch * elements, dtype=dtype)[shift:].view(batch, elements)
        return rows[:, : elements - apart].unflatten(1, sizes)

    rows = torch.ones(batch, 4)
    key = NoiseKey(seed, torch.arange(batch) + seed, seed)
    regions = torch.zeros(shift + batch * sizes[1] * sizes[2] * sizes[3], dtype=torch.uint8)[shift:]
    labels = {"regions": regions.view(batch, 1, *sizes[1:]), "num_regions": num_regions}
    pred, pred_l = latent().requires_grad_(), latent().requires_grad_()
    for noise in (latent(), key):
        got = region_errors(pred, latent(), rows, noise, reference=latent(), **labels)
        (got.error + got.gap).sum().backward()
        got = pair_region_errors(
            pred, pred_l, latent(), latent(), rows, noise, reference_w=latent(), reference_l=latent(), **labels
        )
        got.cross.sum().backward()
    given = {"clean_w": latent(), "clean_l": latent(), "coefficients": rows, "noise_w": key}
    references = {"reference_w": latent(), "reference_l": latent()}
    for head, options in (("local_dpo", {}), ("dpo", {"label_smoothing": 0.1 / num_regions})):
        beta = (5000.0, 1.0, 16.0, 2.5)[seed % 4]  # values that triton would specialise integers on, and others
        own = {"weight_sft": 0.0 if seed % 2 else 0.3, "regions": labels["regions"], **references, **options}
        preference_loss(pred, pred_l, head=head, beta=beta, **given, **own).loss.backward()
    states = PathState(latent(torch.float32)), PathState(latent(torch.float32))
    pair_region_errors(pred, pred_l, latent(), latent(), rows, *states)
    add_keyed_noise(latent(), rows, key)
    keyed_randn(shape, replace(key, stream=3))
    keyed_randn(shape, key, shard=(1, seed % 3, sizes[0] + 2))
    keyed_rand(shape, key)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ((2, (4, 2, 6, 8)), [(1, (1, 1, 1, 8)), (3, (5, 3, 10, 16)), (16, (16, 1, 31, 24))]),
        ((2, (3, 3, 5, 7)), [(1, (1, 1, 1, 1)), (3, (5, 3, 11, 17)), (17, (3, 1, 2, 31))]),
    ],
    ids=["aligned", "odd"],
)
def test_a_new_size_batch_seed_or_number_of_regions_compiles_nothing(compiles, first, others):
    calls(*first, num_regions=2, seed=7)
    known = set(compiles)
    # two noises, two ops, two directions; two heads and a backward; path; sums; noise
    assert len(known) == 2 + 2 + 2 + 2 + 2 + 1 + 1 + 1 + 1 + 3
    for number, other in enumerate(others):
        calls(*other, num_regions=(1, 3, 16)[number], seed=(0, 1, 2**31)[number])
    assert set(compiles) == known


@pytest.mark.parametrize("sizes", [(4, 2, 6, 8), (3, 3, 5, 7)], ids=["aligned", "odd"])
def test_no_vector_is_read_from_where_none_starts(compiles, sizes):
    """Views that start one element into memory: a GPU would stop at a misaligned address, an interpreter never."""
    for shift in (0, 1):
        for apart in (0, 1):
            calls(2, sizes, num_regions=2, seed=7, shift=shift, apart=apart)


def test_what_the_launchers_pass_compiles(compiles):
    """The arguments of real calls, not a list of ours, make every kernel."""
    for sizes in ((4, 2, 6, 8), (3, 3, 5, 7)):
        calls(2, sizes, num_regions=2, seed=7)
    for (name, *_), build in compiles.items():
        assert name in build().asm["ptx"]
