"""Inputs and an independent fp64 oracle, shared by the kernel tests."""

import functools
import inspect
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit_kernels import NoiseKey, PathState, count_launches, dispatch
from alignkit_kernels.noise import reference
from alignkit_kernels.sources import key_rows

SHAPES = {
    "channels_first": (2, 3, 2, 5, 7),
    "frames_first": (2, 2, 3, 5, 7),
    "image": (2, 3, 5, 7),
    "aligned": (2, 3, 2, 10, 14),  # 280 positions: whole vectors, and more than one tile
}
EPS = 2.0**-23
# Tensors live on a GPU if there is one. Without one, kernels run where the interpreter does.
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.INTERPRETED else "cpu")
KERNELS_RUN = dispatch.INTERPRETED or (dispatch.HAVE_TRITON and DEVICE.type == "cuda")

if dispatch.INTERPRETED:
    # The interpreter lists all of Triton's language and puts its own in place anew in each call of a device function,
    # and a table of dtypes for each number: three fifths of its time.
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(module) -> list[str]:
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def patch_builtins(module, *how) -> None:
        for name in builtins_of(module):
            if is_builtin(member := getattr(module, name)):  # not patched already
                interpreter._patch_attr(module, name, member, *how)

    whole_patch, whole_table = interpreter._patch_lang, interpreter._get_np_dtype
    languages: dict[int, list] = {}
    dtypes: dict[object, np.dtype] = {}

    def patch_lang(function):
        used = languages.get(id(function.__globals__))
        if used is None:
            used = [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
            languages[id(function.__globals__)] = used
        if any(is_builtin(language.arange) for language in used):
            return whole_patch(function)
        return getattr(interpreter, "_LangPatchScope", type(None))()  # in place already, for what calls this one

    def np_dtype(of):
        kind = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(kind, tl.pointer_type):
            return whole_table(of)
        if kind not in dtypes:
            dtypes[kind] = whole_table(kind)
        return dtypes[kind]

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, np_dtype


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(params=["triton", "reference"] if KERNELS_RUN else ["reference"])
def path(request, monkeypatch) -> str:
    """Runs a test on the Triton kernels, where they can run, and on the reference."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "runs_kernels", lambda x: False)
    return request.param


@pytest.fixture
def launched(path):
    """A context that fails unless exactly the named kernels ran inside it, as often as they are named (none on the
    reference path)."""

    @contextmanager
    def check(*kernels):
        with count_launches() as ran:
            yield
        assert ran == (Counter(kernels) if path == "triton" else {})

    return check


def exactly(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def closed_form(shape, p, q, amp=1.0) -> Tensor:
    """amp * sin(p i + q) * cos(0.37 p i - q), i in C order: inputs that anyone can write down."""
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (amp * torch.sin(p * i + q) * torch.cos(0.37 * p * i - q)).reshape(shape)


@dataclass
class Case:
    """One side: what `region_errors` takes, and its exact answer on the rounded inputs."""

    pred: Tensor
    reference: Tensor
    clean: Tensor
    coefficients: Tensor
    noise: Tensor | NoiseKey | PathState
    regions: Tensor | None
    num_regions: int | None

    def arguments(self) -> tuple:
        return self.pred, self.clean, self.coefficients, self.noise

    def options(self) -> dict:
        return {"reference": self.reference, "regions": self.regions, "num_regions": self.num_regions}

    def rows(self, index) -> "Case":
        """The case for some samples of the batch, in the given order."""
        noise = self.noise
        if isinstance(noise, NoiseKey):
            noise = replace(noise, sample_ids=noise.sample_ids[index])
        elif isinstance(noise, PathState):
            noise = PathState(noise.state[index])
        else:
            noise = noise[index]
        regions = self.regions
        if regions is not None and regions.shape[0] > 1:
            regions = regions[index]
        return Case(
            self.pred[index], self.reference[index], self.clean[index], self.coefficients[index],
            noise, regions, self.num_regions,
        )  # fmt: skip

    def epsilon(self) -> np.ndarray:
        if isinstance(self.noise, NoiseKey):
            shape, keys = list(self.pred.shape), key_rows(self.noise, len(self.pred), torch.device("cpu"))
            return exactly(reference.keyed_normal(shape, keys, torch.float32))
        if isinstance(self.noise, PathState):
            a, s = self._columns()[:2]
            return (exactly(self.noise.state) - a * exactly(self.clean)) / s
        return exactly(self.noise)

    def labels(self) -> np.ndarray:
        if self.regions is None:
            return np.zeros(self.pred.shape, np.int64)
        return np.broadcast_to(self.regions.cpu().numpy().astype(np.int64), self.pred.shape)

    def target(self) -> tuple[np.ndarray, np.ndarray]:
        """y, and the sum of magnitudes that bounds its rounding error in units of eps."""
        a, s, c, d = self._columns()
        epsilon, clean = self.epsilon(), exactly(self.clean)
        magnitude = np.abs(c * epsilon) + np.abs(d * clean)
        if isinstance(self.noise, PathState):
            state = np.abs(exactly(self.noise.state))
            magnitude = magnitude + np.abs(c) * (state + np.abs(a * clean)) / s
        return c * epsilon + d * clean, magnitude

    def exact(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """error, gap and count [B, R], each with the sum of term magnitudes its rounding scales with."""
        y, magnitude = self.target()
        p, r = exactly(self.pred), exactly(self.reference)
        count = self._sums(np.ones_like(p))
        return {
            "error": (self._sums((p - y) ** 2), self._sums(np.abs(p - y) * (np.abs(p) + magnitude))),
            "gap": (
                self._sums((p - r) * (p + r - 2 * y)),
                self._sums(np.abs(p - r) * (np.abs(p) + np.abs(r) + 2 * magnitude)),
            ),
            "count": (count, 0 * count),
        }

    def exact_gradient(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d(sum weights * error)/d(pred), and the magnitude its rounding scales with."""
        y, magnitude = self.target()
        p, labels = exactly(self.pred), self.labels()
        held = labels < weights.shape[1]
        batch = np.arange(p.shape[0]).reshape(-1, *[1] * (p.ndim - 1))
        g = np.where(held, 2 * weights[batch, np.where(held, labels, 0)], 0.0)
        return g * (p - y), np.abs(g) * (np.abs(p) + magnitude)

    def _columns(self) -> list[np.ndarray]:
        columns = exactly(self.coefficients)
        return [columns[:, i].reshape(-1, *[1] * (self.pred.dim() - 1)) for i in range(4)]

    def _sums(self, terms: np.ndarray) -> np.ndarray:
        labels, size = self.labels(), self.num_regions or 1
        return np.stack(
            [
                np.bincount(k.ravel(), weights=t.ravel(), minlength=256)[:size]
                for k, t in zip(labels, terms, strict=True)
            ]
        )


@pytest.fixture
def make_case():
    return _make_case


@pytest.fixture
def formula():
    return closed_form


@pytest.fixture
def eps():
    return EPS


def _make_case(
    layout="channels_first",
    *,
    noise="given",
    num_regions=2,
    dtype=torch.float32,
    dtypes=None,
    shape=None,
    seed=0,
) -> Case:
    """Random inputs whose prediction and reference are near the target, as in training."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or SHAPES[layout]
    pred_dtype, reference_dtype, clean_dtype = dtypes or (dtype,) * 3

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, columns = shape[0], [-1] + [1] * (len(shape) - 1)
    # each sample's own, and not of one model family: a row taken from another sample shows
    s, a, c, d = 0.1 + 0.8 * torch.rand(4, batch, generator=generator, dtype=torch.float64)
    coefficients = torch.stack((a, s, 0.5 + c, -0.5 - d), 1).float()
    clean = normal().to(clean_dtype)
    key = NoiseKey(2**63 + 5, torch.arange(batch) * 7 + 3, 2)
    epsilon = reference.keyed_normal(list(shape), key_rows(key, batch, clean.device), torch.float64)
    key = replace(key, sample_ids=key.sample_ids.to(DEVICE))
    a_column, s_column, c_column, d_column = (coefficients[:, i].double().view(columns) for i in range(4))
    state = (a_column * clean + s_column * epsilon).to(torch.promote_types(pred_dtype, torch.float32))
    sources = {"given": epsilon.to(DEVICE, pred_dtype), "keyed": key, "path": PathState(state.to(DEVICE))}
    target = c_column * epsilon + d_column * clean.double()
    near = target + 0.3 * normal()
    pred = near + 0.03 * normal()
    regions = None
    if num_regions is not None:
        axis = 2 if layout == "frames_first" else 1
        label_shape = [1 if i == axis else size for i, size in enumerate(shape)]
        labels = torch.randint(0, num_regions + 2, label_shape, generator=generator)
        # the last two are ignored: the first label past the regions, and the largest there is
        regions = torch.where(labels > num_regions, 255, labels).to(torch.uint8)
    return Case(
        pred.to(DEVICE, pred_dtype), near.to(DEVICE, reference_dtype), clean.to(DEVICE), coefficients.to(DEVICE),
        sources[noise], None if regions is None else regions.to(DEVICE), num_regions,
    )  # fmt: skip
