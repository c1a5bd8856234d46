"""The pair store: one row a pair, Arrow files that Hugging Face `datasets` maps into memory.

A folder holds `pairs.json` (what all pairs share), the empty prompt's embedding and `block-NNNNN.arrow` files.
A block is a fixed range of pair ids; it is written whole or not at all, so a killed build continues with the
blocks that are missing. Pairs that had to be left out are listed in `block-NNNNN.skipped.jsonl`.
No byte is stored twice: a loser that equals its winner outside the mask is kept inside it only, of the text
only its tokens.
"""

import copy
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit.errors import DataError
from alignkit.files import write_atomically, write_lines
from alignkit.media.captions import Problem

FORMAT = 3
INFO = "pairs.json"
EMPTY_TEXT = "empty_prompt.safetensors"
LATENT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Pair:
    """One preference pair in latent space.

    winner, loser: fp32, the model family's layout without the batch axis.
    mask: uint8, the same with one channel (1: where the two are compared as a region; LocalDPO's regenerated part,
    everywhere else the two are equal). text: fp32 [tokens, D], unpadded.
    steps: how many of the schedule's last steps were redone, strength = steps / num_inference_steps; None for
    pairs that were not made that way.
    """

    id: int
    source: str
    prompt: str
    text: Tensor
    winner: Tensor
    loser: Tensor
    mask: Tensor
    steps: int | None = None
    strength: float | None = None


def fault_of(pair: Pair, stored: torch.dtype) -> str | None:
    """What makes a pair useless for training once its latents are stored in `stored`, None if nothing does."""
    winner, loser = pair.winner.to(stored), pair.loser.to(stored)
    if not (loser.isfinite().all() and winner.isfinite().all()):
        return "its latents are not finite; try model.dtype=fp32, or pairs.dtype=fp32"
    inside = pair.mask.bool().expand_as(winner)
    if torch.equal(winner[inside], loser[inside]):
        return "winner and loser are the same inside the mask"
    return None


@dataclass(frozen=True)
class StoreInfo:
    """What every pair of a store has in common; a store made under other terms is refused, never mixed.

    kind: how its losers came about ("local_dpo", "given", "generated"). model: fingerprint of the network that made
    them, which must be the one that is trained; None where no network did. pairs: how many are planned, of which
    some may be left out. dtype: what latents are stored in. made: every other term, by name.
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
    format: int = FORMAT

    @property
    def blocks(self) -> int:
        return -(-self.pairs // self.block_size)


def open_for_building(folder: Path, info: StoreInfo) -> None:
    """Create `folder`, or check that what it holds was made under the same terms (DataError names the difference).

    Terms that no block was made under yet are replaced.
    """
    file = folder / INFO
    if file.exists() and has_blocks(folder):
        check_terms(folder, info)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(info), indent=1).encode())


def check_terms(folder: Path, info: StoreInfo) -> None:
    """Raises DataError, naming the difference, unless `folder` is for pairs made under these terms."""
    stored, wanted = asdict(read_info(folder)), json.loads(json.dumps(asdict(info)))
    for name in {**stored["made"], **wanted["made"], **wanted}:
        old, new = ((terms["made"] | terms).get(name) for terms in (stored, wanted))
        if name != "made" and old != new:
            raise DataError(
                f"{folder}: holds pairs made with {name} = {old!r}, now it is {new!r}; "
                "choose another output.dir or delete that folder"
            )


def write_empty_text(folder: Path, text: Tensor) -> None:
    """Store the embedding of the empty prompt, fp32 [tokens, D], which caption dropout needs without the encoder."""
    write_atomically(folder / EMPTY_TEXT, save_tensors({"text": text.contiguous()}))


def has_blocks(folder: Path) -> bool:
    """Whether a block is there or being made."""
    return any(folder.glob("block-*"))


def block_file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.arrow"


def write_block(
    folder: Path,
    block: int,
    pairs: list[Pair],
    skipped: list[Problem] | tuple[()] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Store `pairs` as block number `block`, whole or not at all, latents and text in `dtype`.

    An empty block is stored too: it is done. `skipped` lists what should have been in it and why it is not. What
    processes that were killed left of this block is deleted: only the holder of its lock may call this.
    """
    target = block_file(folder, block)
    for left in folder.glob(f"{target.stem}.partial-*"):
        left.unlink()
    partial = target.with_suffix(f".partial-{uuid.uuid4().hex}")
    features = datasets.Features(
        id=datasets.Value("int64"),
        source=datasets.Value("string"),
        prompt=datasets.Value("string"),
        steps=datasets.Value("int32"),
        strength=datasets.Value("float64"),
        tensors=datasets.Value("binary"),
    )
    listed = target.with_suffix(".skipped.jsonl")
    if skipped:
        write_lines(listed, [asdict(problem) for problem in skipped])
    else:
        listed.unlink(missing_ok=True)
    with datasets.arrow_writer.ArrowWriter(path=str(partial), features=features) as writer:
        for pair in pairs:
            row = {name: getattr(pair, name) for name in ("id", "source", "prompt", "steps", "strength")}
            writer.write(row | {"tensors": save_tensors(_tensors(pair, dtype))})
        writer.finalize()
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, target)


def _tensors(pair: Pair, dtype: torch.dtype) -> dict[str, Tensor]:
    inside = pair.mask.bool().expand_as(pair.loser)
    same_outside = torch.equal(torch.where(inside, pair.winner, pair.loser), pair.winner)
    loser = {"loser_inside": pair.loser[inside]} if same_outside else {"loser": pair.loser}
    latents = {"winner": pair.winner, **loser, "text": pair.text}
    return {name: tensor.to(dtype).contiguous() for name, tensor in latents.items()} | {"mask": pair.mask.contiguous()}


def missing_blocks(folder: Path, info: StoreInfo) -> list[int]:
    """Numbers of the blocks that are not there yet."""
    return [number for number in range(info.blocks) if not block_file(folder, number).exists()]


def skipped_pairs(folder: Path) -> list[Problem]:
    """What finished blocks left out and why."""
    files = sorted(Path(folder).glob("block-*.skipped.jsonl"))
    return [Problem(**json.loads(line)) for file in files for line in file.read_text().splitlines()]


class PairStore:
    """Read access to a folder of pairs: `store[i]` is a Pair, `store.ids` their ids, `store.info` the terms.

    blocks: the blocks to read of a store that is still being built; all of them, and a whole store, unless told.
    """

    def __init__(self, folder: Path, blocks: Sequence[int] | None = None):
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        missing = missing_blocks(self.folder, self.info) if blocks is None else []
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {self.info.blocks} blocks of pairs are not made yet; "
                "run 'alignkit pairs' with this configuration again"
            )
        numbers = range(self.info.blocks) if blocks is None else blocks
        opened = [_open_block(block_file(self.folder, number)) for number in numbers]
        opened = [block for block in opened if len(block)]
        if not opened:
            raise DataError(f"{self.folder}: holds no pairs; the reasons are in its block-*.skipped.jsonl")
        self.rows = datasets.concatenate_datasets(opened)
        self.ids: list[int] = list(self.rows["id"])
        if len(set(self.ids)) != len(self.ids):
            raise DataError(f"{self.folder}: a pair id occurs twice; delete the folder and build the pairs again")

    @property
    def empty_text(self) -> Tensor:
        """Embedding of the empty prompt, fp32 [tokens, D]."""
        return load_tensors((self.folder / EMPTY_TEXT).read_bytes())["text"]

    @property
    def fingerprint(self) -> str:
        """Changes with the terms the pairs were made under and with which pairs there are."""
        return hashlib.sha256(json.dumps([asdict(self.info), self.ids], sort_keys=True).encode()).hexdigest()[:16]

    def select(self, rows: list[int]) -> "PairStore":
        """The same store with these rows alone."""
        chosen = copy.copy(self)
        chosen.rows, chosen.ids = self.rows.select(rows), [self.ids[row] for row in rows]
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        tensors = load_tensors(row["tensors"])
        mask = tensors.pop("mask")
        latents = {name: tensor.float() for name, tensor in tensors.items()}
        winner, loser = latents["winner"], latents.get("loser")
        if loser is None:
            loser = winner.clone()
            loser[mask.bool().expand_as(winner)] = latents["loser_inside"]
        return Pair(
            id=row["id"],
            source=row["source"],
            prompt=row["prompt"],
            text=latents["text"],
            winner=winner,
            loser=loser,
            mask=mask,
            steps=row["steps"],
            strength=row["strength"],
        )


@dataclass(frozen=True)
class PairBatch:
    """Pairs side by side: latents fp32 [B, ...], mask uint8 [B, ...], a text each, ids int64 [B], strength fp64 [B].

    strength is None for pairs that have none.
    """

    ids: Tensor
    winner: Tensor
    loser: Tensor
    mask: Tensor
    text: list[Tensor]
    strength: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)


def collate(pairs: list[Pair]) -> PairBatch:
    strengths = [pair.strength for pair in pairs]
    return PairBatch(
        ids=torch.tensor([pair.id for pair in pairs]),
        winner=torch.stack([pair.winner for pair in pairs]),
        loser=torch.stack([pair.loser for pair in pairs]),
        mask=torch.stack([pair.mask for pair in pairs]),
        text=[pair.text for pair in pairs],
        strength=None if None in strengths else torch.tensor(strengths, dtype=torch.float64),
    )


def _open_block(file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_file(str(file))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"{file}: damaged ({problem}); delete it and run 'alignkit pairs' again") from None


def read_info(folder: Path) -> StoreInfo:
    """The terms of the store in `folder`. Raises DataError where there is none, a damaged one or another format."""
    try:
        info = json.loads((folder / INFO).read_text())
    except OSError:
        raise DataError(f"{folder}: no pairs here; run 'alignkit pairs' with this configuration first") from None
    except ValueError as error:
        raise DataError(f"{folder / INFO}: damaged ({error}); delete the folder and build again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else info
        raise DataError(f"{folder}: written in pair format {found!r}, this version reads {FORMAT}")
    try:
        return StoreInfo(**info)
    except TypeError as error:
        raise DataError(f"{folder / INFO}: damaged ({error}); delete the folder and build again") from None
