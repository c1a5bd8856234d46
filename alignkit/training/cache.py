"""`alignkit cache-reference`: computes a frozen reference's errors at every visit of a training run, once."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alignkit.config import Config, changed
from alignkit.config.batches import accumulation_steps, data_ranks
from alignkit.errors import ConfigError
from alignkit.files import write_atomically
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.objectives.laws import start_law
from alignkit.objectives.preference import needs_reference
from alignkit.objectives.scored import score
from alignkit.objectives.states.checks import check_noise, check_origins
from alignkit.progress import say
from alignkit.stores.blocks import build_together, one_thread
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.stores.store import StoreInfo, has_blocks, missing_blocks, read_info, terms_file, write_rows
from alignkit.training.context import check_context
from alignkit.training.distributed import Process, on_main
from alignkit.training.engine import process_put_back
from alignkit.training.order import global_batch
from alignkit.training.references.cached import FEATURES, HOLDS, cache_folder, cache_info, check_made, visit_row
from alignkit.training.references.copy import Copy
from alignkit.training.run import load_rows, visited_states
from alignkit.training.settings import check_deepspeed
from alignkit.training.terms import run_terms
from alignkit.training.weights import open_start


def with_cache(config: Config, where: str) -> Config:
    """`config`, comparing with cached errors. Raises ConfigError, beginning with `where`, for a run that compares with
    nothing, or whose visits cannot be known beforehand."""
    if not needs_reference(config.objective):
        name = config.objective.name
        raise ConfigError(f"{where}: objective.name: {name!r} compares with no reference, so there is nothing to cache")
    accumulation_steps(config, config.train.context_parallel)
    return changed(config, {"reference": {"strategy": "cached"}}, where)


@process_put_back()
def build_cache(config: Config, process: Process) -> Path:
    """Compute what is missing of the cache of a run (`with_cache`) and return its folder. Every process calls this.

    The same bytes for any number of processes: each computes whole steps, micro-batch by micro-batch as training does,
    on a CPU with one thread. Raises DataError for a cache that was made under other terms.
    """
    data_ranks(config, process.world_size)  # refused before anything loads
    check_deepspeed(config, process)
    folder = cache_folder(config)
    store = PairStore(pairs_folder(config, "train"))
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_context(config, process, model, store)
    check_origins(config, model, check_noise(config, model), store)
    info = on_main(process, lambda: _open(config, process, model, store))
    if on_main(process, lambda: missing_blocks(folder, info)):
        with one_thread(process.device):
            _compute(config, process, model, store, folder, info)
    if process.main:
        size = sum(file.stat().st_size for file in folder.glob("block-*.arrow")) / 1e6
        say(f"errors for {config.train.steps} steps of {info.block_size} pairs, {size:.3g} MB, in {folder}")
    return folder


def _open(config: Config, process: Process, model: VideoModel, store: PairStore) -> StoreInfo:
    """Create the folder, or check that what it holds has the same terms; it says how many steps are planned at most."""
    run_terms(config, store, model)  # whose pairs must fit
    folder, info = cache_folder(config), cache_info(config, process, model, store)
    planned = info.pairs
    if terms_file(folder, HOLDS).exists() and has_blocks(folder):
        check_made(folder, info)
        planned = max(planned, read_info(folder, HOLDS).pairs)
    folder.mkdir(parents=True, exist_ok=True)
    recorded = asdict(replace(info, pairs=planned))
    write_atomically(terms_file(folder, HOLDS), json.dumps(recorded, indent=1).encode())
    return info


def _compute(
    config: Config, process: Process, model: VideoModel, store: PairStore, folder: Path, info: StoreInfo
) -> None:
    train, law = config.train, start_law(config, model)
    dtype = working_dtype(config.model, process.device)
    # processes share out steps, not a step's pairs: any number of them will do
    ranks = data_ranks(config, process.world_size)
    together = train.model_copy(update={"global_batch_size": train.micro_batch_size * ranks})
    engine = config.model_copy(update={"train": together})
    reference = Copy(engine, process, None, model, open_start(engine, model))

    @torch.no_grad()
    def make(rows: range) -> list[dict[str, Any]]:
        visits = global_batch(len(store), train.seed, rows.start // info.block_size, info.block_size)
        made = []
        for first in range(0, len(visits), train.micro_batch_size):
            micro = visits[first : first + train.micro_batch_size]
            batch = load_rows(store, [row for row, _ in micro], process.device)
            epochs = torch.tensor([epoch for _, epoch in micro])
            states = visited_states(config, model, law, store, batch, epochs, dtype)
            sums = score(reference.answer(batch, states), None, batch, states)
            errors = torch.cat([sums.error_w, sums.error_l], dim=1).tolist()
            visited = zip(batch.ids.tolist(), epochs.tolist(), errors, strict=True)
            made += [visit_row(*visit) for visit in visited]
        return made

    build_together(
        folder,
        info,
        make,
        "computing the reference's errors",
        write=lambda folder, block, made, skipped, dtype: write_rows(folder, block, made, FEATURES, skipped),
        rank=process.rank,
        world_size=process.world_size,
        agree=lambda look: on_main(process, look),
        check=lambda: check_made(folder, info),
        side_by_side=train.context_parallel,
        show=process.main,
    )
    reference.release()
