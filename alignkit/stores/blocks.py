"""Builds stores block by block, on one process or many: each block is made once and appears whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.models import VideoModel
from alignkit.progress import progress, say
from alignkit.sharing import share_out
from alignkit.stores.folders import check_order, follow_members, settled, show_pairs
from alignkit.stores.pairs import LATENT_DTYPES, Pair, PairStore, write_block, write_texts
from alignkit.stores.store import (
    StoreInfo,
    block_file,
    check_terms,
    has_blocks,
    missing_blocks,
    open_for_building,
    read_info,
    terms_file,
)

Made = tuple[list[Pair], list[Problem]]
Make = Callable[[range, Callable[[int], None]], tuple[list[Any], list[Problem]]]
Write = Callable[[Path, int, list[Any], list[Problem], torch.dtype], None]


def build_store(
    folder: Path,
    model: VideoModel,
    info: StoreInfo,
    members: list[list[Any]],
    make: Make,
    title: str,
    *,
    negative_prompt: str = "",
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    accepted: Callable[[], None] = lambda: None,
    show: bool = True,
) -> None:
    """Make what is missing of the pair store in `folder`, on one process or many.

    members: what identifies the videos and texts it is made from; another build of the same folder must have the same.
    make: as for `build_blocks`. negative_prompt: which guided training is to use. preview(model, store) is called with
    the first block when it is there, and with the whole store at the end. accepted() is called once the folder has
    turned out to be for these pairs, before anything is made.

    Raises DataError for a folder that holds pairs made under other terms or of other members, and where another build
    goes on from members that changed meanwhile.
    """
    check_store(folder, info, members)
    open_for_building(folder, info)
    follow_members(folder, info, members)
    accepted()
    look = partial(show_pairs, preview, model, folder)

    def make_of_these(rows: range, advance: Callable[[int], None]) -> Made:
        made = make(rows, advance)
        if not settled(folder, members):
            raise DataError(f"{folder}: its videos, captions or masks changed while it was built; run it again")
        return made

    with one_thread(model.vae.device):
        write_texts(folder, *model.encode_text(["", negative_prompt]))
        build_blocks(folder, info, make_of_these, title, first=partial(look, (0,)), show=show)
    look()


def check_store(folder: Path, info: StoreInfo, members: list[list[Any]]) -> None:
    """What `build_store` raises of a folder as it is, before anything is made; of every split, before the first one."""
    if terms_file(folder, info.holds).exists() and has_blocks(folder):
        check_terms(folder, replace(info, pairs=read_info(folder).pairs))
        check_order(folder, members)  # names them, where the terms know of another number alone


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
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
    write: Write = write_block,
    first: Callable[[], None] | None = None,
    show: bool = True,
) -> None:
    """Have every block of the store in `folder` made; returns when all are there, whichever process made them.

    make(rows, advance) returns what stands in the planned rows `rows` and the problems of those left out, and calls
    advance(count) as they get done; write(folder, block, made, problems, dtype) stores it. It must depend on nothing
    but the rows, so that any process makes the same bytes.
    first() is called as soon as the first block is there, for people to look at.

    Raises what `make` raises, and DataError where the file system has no locks.
    """

    def done() -> int:
        return info.pairs - sum(len(info.rows(block)) for block in missing_blocks(folder, info))

    before = shown = done()
    started = time.monotonic()
    with progress(title, info.pairs, done=before, show=show) as bar:

        def advance(count: int) -> None:
            nonlocal shown
            shown += count
            bar.advance(count, note=f"{(shown - before) / (time.monotonic() - started):.2g} {info.holds}/s")

        def make_block(block: int) -> None:
            made, skipped = make(info.rows(block), advance)
            check_terms(folder, info)  # before any block is locked, another build may replace them
            write(folder, block, made, skipped, LATENT_DTYPES[info.dtype])
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


def build_together(
    folder: Path,
    info: StoreInfo,
    make: Callable[[range], list[Any]],
    title: str,
    *,
    write: Write,
    rank: int,
    world_size: int,
    agree: Callable[[Callable[[], list[int]]], list[int]],
    check: Callable[[], None],
    between: Callable[[], None] = lambda: None,
    side_by_side: int = 1,
    show: bool = True,
) -> None:
    """The same by the processes of one group in step, for work in which each of them must take part each time, as in
    every forward under ZeRO-3: with no block left for a process, it makes one over again and throws it away.

    make(rows) must run equally many forwards for every block. agree(look) is what look() returns on the first process,
    for all of them. check() raises DataError where the folder's terms are no longer those of `info`: before any block
    is there, another build may replace them. Every process calls between() before each block but its first, at the same
    place; what it raises ends the work there. side_by_side: so many processes, of consecutive ranks, make each block
    together, and the first of them writes it.
    """
    rank, first_of_them, world_size = rank // side_by_side, rank % side_by_side == 0, world_size // side_by_side
    blocks = agree(lambda: missing_blocks(folder, info))
    with progress(title, info.blocks, done=info.blocks - len(blocks), show=show) as bar:
        for first in range(0, len(blocks), world_size):
            if first:
                between()
            number = first + rank
            block = blocks[min(number, len(blocks) - 1)]
            made = make(info.rows(block))
            if number < len(blocks) and first_of_them:
                check()
                write(folder, block, made, [], LATENT_DTYPES[info.dtype])
            bar.advance(min(world_size, len(blocks) - first))

    def all_there() -> list[int]:
        while left := missing_blocks(folder, info):
            time.sleep(0.1)
        return left

    agree(all_there)  # nobody reads before all is written
