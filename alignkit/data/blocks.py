"""Builds a pair store block by block, on one process or many: each block is made once and appears whole."""

import time
from collections.abc import Callable
from pathlib import Path

from alignkit.data.captions import Problem
from alignkit.data.pairs import LATENT_DTYPES, Pair, StoreInfo, block_file, missing_blocks, write_block
from alignkit.progress import progress, say
from alignkit.sharing import share_out

Made = tuple[list[Pair], list[Problem]]


def build_blocks(
    folder: Path,
    info: StoreInfo,
    make: Callable[[range, Callable[[int], None]], Made],
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
