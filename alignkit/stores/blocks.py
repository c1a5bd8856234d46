"""Builds a pair store block by block, on one process or many: each block is made once and appears whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from alignkit.media.captions import Problem
from alignkit.models import VideoModel
from alignkit.progress import progress, say
from alignkit.sharing import share_out
from alignkit.stores.folders import check_membership, show_pairs
from alignkit.stores.pairs import (
    LATENT_DTYPES,
    Pair,
    PairStore,
    StoreInfo,
    block_file,
    check_terms,
    missing_blocks,
    open_for_building,
    write_block,
    write_empty_text,
)

Made = tuple[list[Pair], list[Problem]]
Make = Callable[[range, Callable[[int], None]], Made]


def build_store(
    folder: Path,
    model: VideoModel,
    info: StoreInfo,
    members: list[list],
    make: Make,
    title: str,
    *,
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    show: bool = True,
) -> None:
    """Make what is missing of the store in `folder`, on one process or many.

    members: what identifies the videos and texts it is made from; another build of the same folder must have the same.
    make: as for `build_blocks`. preview(model, store) is called with the first block when it is there, and with the
    whole store at the end.

    Raises DataError for a folder that holds pairs made under other terms or of other members.
    """
    open_for_building(folder, info)
    check_membership(folder, members)
    look = partial(show_pairs, preview, model, folder)
    with _one_thread(model.vae.device):
        write_empty_text(folder, model.encode_text([""])[0])
        build_blocks(folder, info, make, title, first=partial(look, (0,)), show=show)
    look()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On some processors the bits of a convolution depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_blocks(
    folder: Path,
    info: StoreInfo,
    make: Make,
    title: str,
    *,
    first: Callable[[], None] | None = None,
    show: bool = True,
) -> None:
    """Have every block of the store in `folder` made; returns when all are there, whichever process made them.

    make(rows, advance) returns the pairs of the planned rows `rows` and the problems of those left out, and calls
    advance(count) as they get done. It must depend on nothing but the rows, so that any process makes the same bytes.
    first() is called as soon as the first block is there, for people to look at.

    Raises what `make` raises, and DataError where the file system has no locks.
    """

    def rows(block: int) -> range:
        return range(block * info.block_size, min((block + 1) * info.block_size, info.pairs))

    def done() -> int:
        return info.pairs - sum(len(rows(block)) for block in missing_blocks(folder, info))

    before = shown = done()
    started = time.monotonic()
    with progress(title, info.pairs, done=before, show=show) as bar:

        def advance(count: int) -> None:
            nonlocal shown
            shown += count
            bar.advance(count, note=f"{(shown - before) / (time.monotonic() - started):.2g} pairs/s")

        def make_block(block: int) -> None:
            pairs, skipped = make(rows(block), advance)
            check_terms(folder, info)  # before any block is locked, another build may replace them
            write_block(folder, block, pairs, skipped, LATENT_DTYPES[info.dtype])
            for problem in skipped:
                say(f"left out {problem.video}: {problem.reason}")

        def look() -> None:
            nonlocal first
            if done() > shown:  # those that others made
                advance(done() - shown)
            if first and block_file(folder, 0).exists():
                first()
                first = None

        files = [block_file(folder, block) for block in range(info.blocks)]
        share_out(files, make_block, look)
