"""`reference.strategy: cached`: errors that `alignkit cache-reference` computed, instead of a second model.

The cache is a store (`alignkit.stores.store`) of one block a training step, so that a longer run only adds blocks. A
row is a visit, in the order of `alignkit.training.order`; of which pair and epoch follows from the store's terms, and
is in the row's checksum.
"""

import hashlib
import importlib
import importlib.metadata
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import torch
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.models import VideoModel, working_dtype
from alignkit.models.attention import set_attention
from alignkit.moment import end_if_of_the_moment
from alignkit.objectives.scored import NUM_REGIONS, ReferenceErrors
from alignkit.objectives.states import States
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import LATENT_DTYPES, PairBatch, PairStore
from alignkit.stores.store import StoreInfo, block_file, read_info
from alignkit.training.context import token_key
from alignkit.training.distributed import Process
from alignkit.training.order import global_batch
from alignkit.training.terms import difference
from alignkit.training.weights import Start, empty_network

HOLDS, COMMAND = "reference", "alignkit cache-reference"
SHAPES = "micro_batch_size", "global_batch_size", "seed", "compile", "context_parallel"
"""Of `train`: what bits depend on, and which pairs come when."""
FEATURES = datasets.Features(
    errors=datasets.List(datasets.Value("float64"), length=2 * NUM_REGIONS),  # the winner's, then the loser's
    checksum=datasets.Value("uint32"),
)


@dataclass(frozen=True)
class Visited(States):
    """States at which training visits B pairs, each in one of `epochs`, int64 [B]."""

    epochs: Tensor = field(kw_only=True)


class Cached:
    """Holds no model."""

    def __init__(self, config: Config, process: Process, policy: Any, model: VideoModel, start: Start):
        store = PairStore(pairs_folder(config, "train"))
        self._errors = read_errors(config, store)
        self._row = {pair: row for row, pair in enumerate(store.ids)}

    def answer(self, batch: PairBatch, states: Visited) -> ReferenceErrors:
        rows = torch.tensor([self._row[pair] for pair in batch.ids.tolist()])
        return ReferenceErrors(*self._errors[states.epochs, rows].to(batch.winner.device).unbind(1))


def cache_folder(config: Config) -> Path:
    return config.reference.cache or config.output.dir / "reference"


def cache_info(config: Config, process: Process, model: VideoModel, store: PairStore) -> StoreInfo:
    """What a run's cache is to hold, and in `made` by name all that its numbers depend on. Reads the model's files and
    every pair."""
    train, device = config.train, process.device
    dtype = working_dtype(config.model, device)
    texts = [store.empty_text, *([store.negative_text] if config.noise.guided else [])]
    content = store.content()
    made = {
        "model": model.fingerprint(),
        **({"model.expert": model.expert} if model.expert else {}),
        "family": model.family,
        "dtype": next(name for name, known in LATENT_DTYPES.items() if known == dtype),
        "attention": set_attention(
            empty_network(model), config.model.attention, device, dtype, shared=token_key(config)
        ),
        "deepspeed.preset": config.deepspeed.preset,
        "deepspeed.config": config.deepspeed.config,
        "device": _device_name(device),
        **{name: _version(name) for name in ("torch", "triton", "diffusers", "deepspeed")},
        **{name: _installed(name) for name in ("flash-attn", "xformers")},
        **{f"train.{key}": getattr(train, key) for key in SHAPES},
        **{f"noise.{key}": value for key, value in config.noise.model_dump(mode="json").items()},
        # the other entry comes of a set, in any order
        **{f"scheduler.{key}": value for key, value in model.scheduler.config.items() if key != "_use_default_values"},
        "schedule": model.schedule(config.sampler.num_steps).fingerprint,
        "noise.guidance": config.sampler.guidance if config.noise.guided else None,
        "model.max_sequence_length": config.model.max_sequence_length,
        "train.caption_dropout": train.caption_dropout,
        "regions": content["regions"],
        "pairs": content["pairs"],
        "texts": hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()[:16],
    }
    return StoreInfo(
        kind=HOLDS,
        family=model.family,
        model=made["model"],
        vae=store.info.vae,
        text_encoder=store.info.text_encoder,
        pairs=train.steps * train.global_batch_size,
        block_size=train.global_batch_size,
        made=json.loads(json.dumps(made, default=str)),
        holds=HOLDS,
    )


def cache_digest(info: StoreInfo) -> str:
    """Changes with whatever a cache's numbers depend on."""
    made = dict(info.made)
    if made["train.context_parallel"] == 1:  # as digests in older checkpoints have it
        del made["train.context_parallel"]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def check_cache(config: Config, info: StoreInfo, store: PairStore) -> None:
    """Raises DataError, naming the term, where the cache of a run that needs `info` was made otherwise; and where it is
    missing, not whole or damaged."""
    folder = cache_folder(config)
    check_made(folder, info)
    steps = range(info.blocks)
    held = sum(block_file(folder, step).exists() for step in steps)
    if held < len(steps):
        raise DataError(
            f"{folder}: holds the reference's errors for {held} of the {len(steps)} steps of train.steps; run "
            f"'{COMMAND}' with this configuration again"
        )
    read_errors(config, store)


def check_made(folder: Path, info: StoreInfo) -> None:
    """Raises DataError unless `folder` holds errors that were computed under the terms of `info`, for however many
    steps."""
    changed = difference(read_info(folder, HOLDS).made, info.made)
    if changed:
        raise DataError(
            f"{folder}: holds errors of a reference computed with {changed}; put it back, or delete that folder (or "
            f"choose another reference.cache) and run '{COMMAND}'"
        )


def read_errors(config: Config, store: PairStore) -> Tensor:
    """The reference's errors by epoch and row of `store`, fp64 [epochs, rows, 2 sides, R], NaN at what training does
    not visit. Raises DataError for a damaged block."""
    train, count = config.train, len(store)
    epochs = -(-train.steps * train.global_batch_size // count)
    errors = torch.full((epochs, count, 2, NUM_REGIONS), torch.nan, dtype=torch.float64)
    for step in range(train.steps):
        visits = global_batch(count, train.seed, step, train.global_batch_size)
        pairs = [(store.ids[row], epoch) for row, epoch in visits]
        at = torch.tensor(visits).T.flip(0).unbind()
        errors[at] = _read_block(block_file(cache_folder(config), step), pairs)
    return errors


def _read_block(file: Path, visits: list[tuple[int, int]]) -> Tensor:
    """The errors at `visits`, (pair, epoch) each, fp64 [B, 2, R]."""
    try:
        # not mapped: a damaged file that gets its own sizes wrong would end the process
        table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
        table.validate(full=True)
        stored = table.to_pylist()
        whole = stored == [visit_row(*visit, row["errors"]) for visit, row in zip(visits, stored, strict=True)]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        end_if_of_the_moment(file, error)
        whole = False
    if not whole:
        raise DataError(f"{file}: damaged; delete it and run '{COMMAND}' again")
    return torch.tensor([row["errors"] for row in stored], dtype=torch.float64).view(-1, 2, NUM_REGIONS)


def visit_row(pair: int, epoch: int, errors: list[float]) -> dict[str, Any]:
    """A row of the cache: the errors of a pair's two sides by region, with a checksum over them and the visit."""
    packed = struct.pack(f"<qq{len(errors)}d", pair, epoch, *errors)
    return {"errors": errors, "checksum": zlib.crc32(packed)}


def _version(library: str) -> str | None:
    try:
        return importlib.import_module(library).__version__
    except ImportError:
        return None


def _installed(library: str) -> str | None:
    """The same of one that takes long to import."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
