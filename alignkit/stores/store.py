"""A store: a folder of Arrow blocks that Hugging Face `datasets` maps into memory, and the terms they were made under.

A block is a fixed range of planned rows; it is written whole or not at all, so a killed build continues with the
blocks that are missing. Rows that had to be left out are listed in `block-NNNNN.skipped.jsonl`. Each row carries the
digest of what it was written as, which is compared whenever it is read.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets

from alignkit.errors import DataError
from alignkit.files import put_in_place, write_atomically, write_lines
from alignkit.media.captions import Problem
from alignkit.moment import end_if_of_the_moment, end_if_unreadable, listed

FORMAT = 3
DIGEST = "digest"
COMMANDS = {"pairs": "alignkit pairs", "rollouts": "alignkit rollout", "reference": "alignkit cache-reference"}
"""By what a store holds, which also names the file of its terms: what makes it."""


@dataclass(frozen=True)
class StoreInfo:
    """What every row of a store has in common; a store made under other terms is refused, never mixed.

    kind: how the rows came about (of pairs "local_dpo", "given", "rollouts", "generated"). model: fingerprint of the
    network that made them, which must be the one that is trained; None where no network did. pairs: how many rows are
    planned, of which some may be left out. dtype: what latents are stored in. made: every other term, by name. holds:
    one of COMMANDS.
    """

    kind: str
    family: str
    model: str | None
    vae: str
    text_encoder: str
    pairs: int
    block_size: int
    dtype: str = "fp32"
    made: dict[str, Any] = field(default_factory=dict)
    holds: str = "pairs"
    format: int = FORMAT

    @property
    def blocks(self) -> int:
        return -(-self.pairs // self.block_size)

    def rows(self, block: int) -> range:
        """The planned rows of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.pairs))


def open_for_building(folder: Path, info: StoreInfo) -> None:
    """Create `folder`, or check that what it holds was made under the same terms (DataError names the difference).

    Terms that no block was made under yet are replaced.
    """
    file = terms_file(folder, info.holds)
    if file.exists() and has_blocks(folder):
        check_terms(folder, info)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(info), indent=1).encode())


def check_terms(folder: Path, info: StoreInfo) -> None:
    """Raises DataError, naming the difference, unless `folder` is for rows made under these terms."""
    stored, wanted = asdict(read_info(folder, info.holds)), json.loads(json.dumps(asdict(info)))
    names = {**stored["made"], **wanted["made"], **wanted}
    for name in sorted(names, key="schedule".__eq__):  # a hash last, which tells nobody what to put back
        old, new = ((terms["made"] | terms).get(name) for terms in (stored, wanted))
        if name != "made" and old != new:
            raise DataError(
                f"{folder}: holds {info.holds} made with {name} = {old!r}, now it is {new!r}; "
                "choose another output.dir or delete that folder"
            )


def terms_file(folder: Path, holds: str) -> Path:
    return folder / f"{holds}.json"


def read_info(folder: Path, holds: str = "pairs") -> StoreInfo:
    """The terms of the store in `folder`. Raises DataError where there is none, a damaged one or another format."""
    file = terms_file(folder, holds)
    try:
        info = json.loads(file.read_text())
    except OSError as error:
        end_if_of_the_moment(file, error)
        others = [other for other in COMMANDS if terms_file(folder, other).exists()]
        found = f"holds {others[0]}, not {holds}" if others else f"no {holds} here"
        raise DataError(f"{folder}: {found}; run '{COMMANDS[holds]}' with this configuration first") from None
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); delete the folder and build again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        written = info.get("format") if isinstance(info, dict) else info
        raise DataError(f"{folder}: written in pair format {written!r}, this version reads {FORMAT}")
    try:
        return StoreInfo(**info)
    except TypeError as error:
        raise DataError(f"{file}: damaged ({error}); delete the folder and build again") from None


def has_blocks(folder: Path) -> bool:
    """Whether a block that holds anything is there, or one is being made. Blocks that came out empty, all of them, are
    deleted: they protect nothing, and what they were made from may have been mended."""
    found = listed(folder, "block-*")
    whole = [file for file in found if file.suffix == ".arrow"]
    if any(file.suffix == ".lock" or ".partial-" in file.name for file in found):
        return True
    if any(_rows_in(file) for file in whole):
        return True
    for file in found:
        file.unlink(missing_ok=True)
    return False


def _rows_in(file: Path) -> bool:
    """Whether a block holds a row; a damaged one counts as if it did."""
    try:
        return len(datasets.Dataset.from_file(str(file))) > 0
    except Exception:  # as in _open_block
        return True


def block_file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.arrow"


def missing_blocks(folder: Path, info: StoreInfo) -> list[int]:
    """Numbers of the blocks that are not there yet."""
    return [number for number in range(info.blocks) if not block_file(folder, number).exists()]


def write_rows(
    folder: Path,
    block: int,
    rows: Iterable[dict[str, Any]],
    features: datasets.Features,
    skipped: list[Problem] | tuple[()] = (),
) -> None:
    """Store `rows` as block number `block`, whole or not at all.

    An empty block is stored too: it is done. `skipped` lists what should have been in it and why it is not. What
    processes that were killed left of this block is deleted: only the holder of its lock may call this.
    """
    target = block_file(folder, block)
    for left in listed(folder, f"{target.stem}.partial-*"):
        left.unlink()
    partial = target.with_suffix(f".partial-{uuid.uuid4().hex}")
    left_out = target.with_suffix(".skipped.jsonl")
    if skipped:
        write_lines(left_out, [asdict(problem) for problem in skipped])
    else:
        left_out.unlink(missing_ok=True)
    with datasets.arrow_writer.ArrowWriter(path=str(partial), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    put_in_place(partial, target)


def with_digest(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is to be written, for `check_row`."""
    return row | {DIGEST: _digest(row)}


def _digest(row: dict[str, Any]) -> str:
    """Of every value but the digest itself. None counts as absent: a column may be newer than a row."""
    digest = hashlib.sha256()
    for name in sorted(name for name, value in row.items() if name != DIGEST and value is not None):
        value = row[name]
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def check_row(folder: Path, info: StoreInfo, row: dict[str, Any]) -> None:
    """Raises DataError, naming the block, unless the row is as it was written. Rows from before digests pass."""
    written = row.get(DIGEST)
    if written is None or written == _digest(row):
        return
    files = listed(folder, "block-*.arrow")
    holding = (file for file in files if written in datasets.Dataset.from_file(str(file))[DIGEST])
    raise DataError(
        f"{next(holding, folder)}: damaged (number {row['id']} of its {info.holds} is not as it was written); delete "
        f"it and run '{COMMANDS[info.holds]}' again"
    )


def skipped_rows(folder: Path) -> list[Problem]:
    """What finished blocks left out and why."""
    files = listed(Path(folder), "block-*.skipped.jsonl")
    return [Problem(**json.loads(line)) for file in files for line in file.read_text().splitlines()]


def open_blocks(
    folder: Path, info: StoreInfo, features: datasets.Features, blocks: Iterable[int] | None = None
) -> datasets.Dataset:
    """The rows of `blocks`, of a whole store unless told. features: the columns; stores of before may lack some.

    Raises DataError for a block that is not whole, or where there are no rows.
    """
    missing = missing_blocks(folder, info) if blocks is None else []
    command = COMMANDS[info.holds]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {info.blocks} blocks of {info.holds} are not made yet; "
            f"run '{command}' with this configuration again"
        )
    numbers = range(info.blocks) if blocks is None else blocks
    opened = [_open_block(block_file(folder, number), features, command) for number in numbers]
    opened = [block for block in opened if len(block)]
    if not opened:
        raise DataError(f"{folder}: holds no {info.holds}; the reasons are in its block-*.skipped.jsonl")
    return datasets.concatenate_datasets(opened)


def _open_block(file: Path, features: datasets.Features, command: str) -> datasets.Dataset:
    try:
        block = datasets.Dataset.from_file(str(file))
        strange = [name for name, kind in block.features.items() if features.get(name) != kind]
        if strange or "id" not in block.features:
            raise ValueError(f"a column {strange[0]!r} that none has" if strange else "no column of ids")
        block.data.table.validate(full=True)  # offsets beyond the file would end the process when they are followed
        return block
    except Exception as error:  # of its own description, datasets raises whatever the damage happens to lead to
        end_if_unreadable(file, error)
        problem = " ".join(str(error).split())
        raise DataError(f"{file}: damaged ({problem}); delete it and run '{command}' again") from None
