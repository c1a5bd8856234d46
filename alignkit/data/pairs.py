"""The pair store: one row a pair, Arrow files that Hugging Face `datasets` maps into memory.

A folder holds `pairs.json` (what all pairs share), the empty prompt's embedding and `block-NNNNN.arrow` files.
A block is a fixed range of pair ids; it is written whole or not at all, so a killed build continues with the
blocks that are missing.
No byte is stored twice: of the loser only the latents inside the mask are kept, of the text only its tokens.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit.errors import DataError
from alignkit.files import write_atomically

FORMAT = 2
EMPTY_TEXT = "empty_prompt.safetensors"


@dataclass(frozen=True)
class Pair:
    """One preference pair in latent space.

    winner, loser: fp32, the model family's layout without the batch axis; equal outside the mask.
    mask: uint8, broadcastable to the latents (1: regenerated). text: fp32 [tokens, D], unpadded.
    steps: how many of the schedule's last steps were redone; strength = steps / num_inference_steps.
    """

    id: int
    source: str
    prompt: str
    text: Tensor
    winner: Tensor
    loser: Tensor
    mask: Tensor
    steps: int
    strength: float


@dataclass(frozen=True)
class StoreInfo:
    """What every pair of a store has in common; a store made under other terms is refused, never mixed."""

    family: str
    model: str
    vae: str
    text_encoder: str
    schedule: str
    num_inference_steps: int
    guidance_scale: float
    prompt_prefix: str
    negative_prompt: str
    strengths: list[int]
    mask: dict
    seed: int
    per_clip: int
    block_size: int
    videos: dict
    format: int = FORMAT


def open_for_building(folder: Path, info: StoreInfo) -> None:
    """Create `folder`, or check that what it holds was made under the same terms (DataError names the difference)."""
    file = folder / "pairs.json"
    if file.exists():
        stored = _read_info(folder)
        for key, value in json.loads(json.dumps(asdict(info))).items():
            if stored.get(key) != value:
                raise DataError(
                    f"{folder}: holds pairs made with {key} = {stored.get(key)!r}, now it is {value!r}; "
                    "choose another output.dir or delete that folder"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(info), indent=1).encode())


def write_empty_text(folder: Path, text: Tensor) -> None:
    """Store the embedding of the empty prompt, fp32 [tokens, D], which caption dropout needs without the encoder."""
    write_atomically(folder / EMPTY_TEXT, save_tensors({"text": text.contiguous()}))


def block_file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.arrow"


def write_block(folder: Path, block: int, pairs: list[Pair]) -> None:
    """Store `pairs` as block number `block`, whole or not at all. An empty block is stored too: it is done."""
    target = block_file(folder, block)
    partial = target.with_suffix(f".partial-{os.getpid()}")
    features = datasets.Features(
        id=datasets.Value("int64"),
        source=datasets.Value("string"),
        prompt=datasets.Value("string"),
        steps=datasets.Value("int32"),
        strength=datasets.Value("float64"),
        tensors=datasets.Value("binary"),
    )
    with datasets.arrow_writer.ArrowWriter(path=str(partial), features=features) as writer:
        for pair in pairs:
            inside = pair.mask.bool().expand_as(pair.loser)
            tensors = {
                "winner": pair.winner.contiguous(),
                "loser_inside": pair.loser[inside],
                "mask": pair.mask.contiguous(),
                "text": pair.text.contiguous(),
            }
            writer.write(
                {
                    "id": pair.id,
                    "source": pair.source,
                    "prompt": pair.prompt,
                    "steps": pair.steps,
                    "strength": pair.strength,
                    "tensors": save_tensors(tensors),
                }
            )
        writer.finalize()
    os.replace(partial, target)


class PairStore:
    """Read access to a folder of pairs: `store[i]` is a Pair, `store.ids` their ids, `store.info` the terms."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        blocks = [datasets.Dataset.from_file(str(file)) for file in sorted(self.folder.glob("block-*.arrow"))]
        blocks = [block for block in blocks if len(block)]
        if not blocks:
            raise DataError(f"{self.folder}: holds no pairs; run 'alignkit pairs' first")
        self.rows = datasets.concatenate_datasets(blocks)
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
        return hashlib.sha256(json.dumps([self.info, self.ids], sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        tensors = load_tensors(row["tensors"])
        winner, mask = tensors["winner"], tensors["mask"]
        loser = winner.clone()
        loser[mask.bool().expand_as(winner)] = tensors["loser_inside"]
        return Pair(
            id=row["id"],
            source=row["source"],
            prompt=row["prompt"],
            text=tensors["text"],
            winner=winner,
            loser=loser,
            mask=mask,
            steps=row["steps"],
            strength=row["strength"],
        )


@dataclass(frozen=True)
class PairBatch:
    """Pairs side by side: latents fp32 [B, ...], mask uint8 [B, ...], a text each, ids int64 [B], strength fp64 [B]."""

    ids: Tensor
    winner: Tensor
    loser: Tensor
    mask: Tensor
    text: list[Tensor]
    strength: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def collate(pairs: list[Pair]) -> PairBatch:
    return PairBatch(
        ids=torch.tensor([pair.id for pair in pairs]),
        winner=torch.stack([pair.winner for pair in pairs]),
        loser=torch.stack([pair.loser for pair in pairs]),
        mask=torch.stack([pair.mask for pair in pairs]),
        text=[pair.text for pair in pairs],
        strength=torch.tensor([pair.strength for pair in pairs], dtype=torch.float64),
    )


def _read_info(folder: Path) -> dict:
    try:
        info = json.loads((folder / "pairs.json").read_text())
    except OSError:
        raise DataError(f"{folder}: no pairs here; run 'alignkit pairs' with this configuration first") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{folder / 'pairs.json'}: damaged ({error}); delete the folder and build again") from None
    if info.get("format") != FORMAT:
        raise DataError(f"{folder}: written in pair format {info.get('format')!r}, this version reads {FORMAT}")
    return info
