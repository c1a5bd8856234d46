"""The pair store: one row a pair, what its two videos came from, and states of their paths where a source needs them.

A folder holds `pairs.json` (what all pairs share), the embeddings of the empty and of the negative prompt and
`block-NNNNN.arrow` files (`alignkit.stores.store`). No byte is stored twice: a loser that equals its winner outside the
mask is kept inside it only, of the text only its tokens. States are fp32 whatever the latents are stored in: the noise
they imply is (state − a·clean) / s, which magnifies their rounding 1/s times.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit.errors import DataError
from alignkit.files import write_atomically
from alignkit.media.captions import Problem
from alignkit.stores.origins import GIVEN, Origin, Trajectory
from alignkit.stores.store import DIGEST, check_row, open_blocks, read_info, with_digest, write_rows

MEMBERS = "rows.json"
TEXTS = EMPTY_TEXT, NEGATIVE_TEXT = "empty_prompt.safetensors", "negative_prompt.safetensors"
SAMPLED, INVERTED, FOLLOWING = "sampled", "inverted", " and following"
LATENT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEATURES = datasets.Features(
    id=datasets.Value("int64"),
    source=datasets.Value("string"),
    prompt=datasets.Value("string"),
    steps=datasets.Value("int32"),
    strength=datasets.Value("float64"),
    origin_w=datasets.Value("string"),
    origin_l=datasets.Value("string"),
    path_rows=datasets.List(datasets.Value("int32")),
    states_w=datasets.Value("string"),  # which there are, as `PairStore.states_of` says
    states_l=datasets.Value("string"),
    error_w=datasets.Value("float64"),
    error_l=datasets.Value("float64"),
    tensors=datasets.Value("binary"),
    digest=datasets.Value("string"),
)


@dataclass(frozen=True)
class Pair:
    """One preference pair in latent space.

    winner, loser: fp32, the model family's layout without the batch axis.
    mask: uint8, the same with one channel (1: where the two are compared as a region; LocalDPO's regenerated part,
    everywhere else the two are equal). text: fp32 [tokens, D], unpadded.
    steps: how many of the schedule's last steps were redone, strength = steps / num_inference_steps; None for
    pairs that were not made that way.
    origin_w, origin_l: what each side came from. path_rows: the rows of the schedule, ascending, that `path_w` and
    `path_l` hold states at; a side without states has None, and without either there are no rows.
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
    origin_w: Origin = GIVEN
    origin_l: Origin = GIVEN
    path_rows: tuple[int, ...] = ()
    path_w: Trajectory | None = None
    path_l: Trajectory | None = None


def fault_of(pair: Pair, stored: torch.dtype) -> str | None:
    """What makes a pair useless for training once its latents are stored in `stored`, None if nothing does."""
    winner, loser = pair.winner.to(stored), pair.loser.to(stored)
    if not (loser.isfinite().all() and winner.isfinite().all()):
        return "its latents are not finite; try model.dtype=fp32, or pairs.dtype=fp32"
    states = [x for path in (pair.path_w, pair.path_l) if path for x in (path.states, path.following) if x is not None]
    if not all(x.isfinite().all() for x in states):
        return "a state of its path is not finite; try model.dtype=fp32"
    inside = pair.mask.bool().expand_as(winner)
    if torch.equal(winner[inside], loser[inside]):
        return "winner and loser are the same inside the mask"
    return None


def write_texts(folder: Path, empty: Tensor, negative: Tensor) -> None:
    """Store what training needs without the encoder, fp32 [tokens, D] each: the embedding of the empty prompt for
    caption dropout, and of the negative prompt for guided predictions."""
    for name, text in ((EMPTY_TEXT, empty), (NEGATIVE_TEXT, negative)):
        write_atomically(folder / name, save_tensors({"text": text.contiguous()}))


def write_block(
    folder: Path,
    block: int,
    pairs: list[Pair],
    skipped: list[Problem] | tuple[()] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Store `pairs` as block number `block`, as `write_rows` does, latents and text in `dtype`."""
    write_rows(folder, block, (_row(pair, dtype) for pair in pairs), FEATURES, skipped)


def _row(pair: Pair, dtype: torch.dtype) -> dict[str, Any]:
    row = {name: getattr(pair, name) for name in ("id", "source", "prompt", "steps", "strength")}
    row |= {
        "origin_w": pair.origin_w.to_json(),
        "origin_l": pair.origin_l.to_json(),
        "path_rows": list(pair.path_rows),
        "states_w": _states_of(pair.path_w),
        "states_l": _states_of(pair.path_l),
        "error_w": pair.path_w and pair.path_w.error,
        "error_l": pair.path_l and pair.path_l.error,
        "tensors": save_tensors(_tensors(pair, dtype)),
    }
    return with_digest(row)


def _states_of(path: Trajectory | None) -> str:
    if path is None:
        return ""
    return (SAMPLED if path.error is None else INVERTED) + (FOLLOWING if path.following is not None else "")


def _tensors(pair: Pair, dtype: torch.dtype) -> dict[str, Tensor]:
    inside = pair.mask.bool().expand_as(pair.loser)
    same_outside = torch.equal(torch.where(inside, pair.winner, pair.loser), pair.winner)
    loser = {"loser_inside": pair.loser[inside]} if same_outside else {"loser": pair.loser}
    latents = {"winner": pair.winner, **loser, "text": pair.text}
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in latents.items()}
    for side, path in (("w", pair.path_w), ("l", pair.path_l)):
        if path:
            stored[f"states_{side}"] = path.states.float().contiguous()
            if path.following is not None:
                stored[f"following_{side}"] = path.following.float().contiguous()
    return stored | {"mask": pair.mask.contiguous()}


class PairStore:
    """Read access to a folder of pairs: `store[i]` is a Pair, `store.ids` their ids, `store.info` the terms.

    blocks: the blocks to read of a store that is still being built; all of them, and a whole store, unless told.
    """

    def __init__(self, folder: Path, blocks: Sequence[int] | None = None):
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        self.rows = open_blocks(self.folder, self.info, FEATURES, blocks)
        self.ids: list[int] = list(self.rows["id"])
        if len(set(self.ids)) != len(self.ids):
            for row in self.rows:  # which one is not as it was written
                check_row(self.folder, self.info, row)
            raise DataError(f"{self.folder}: a pair id occurs twice; delete the folder and build the pairs again")

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest caption, off the heads of the rows' tensors: their length in 8 bytes, then JSON."""
        longest = 0
        for chunk in self.rows.data.column("tensors").chunks:
            for cell in chunk:
                stored = memoryview(cell.as_buffer())
                head = json.loads(bytes(stored[8 : 8 + int.from_bytes(stored[:8], "little")]))
                longest = max(longest, head["text"]["shape"][0])
        return longest

    @cached_property
    def empty_text(self) -> Tensor:
        """Embedding of the empty prompt, fp32 [tokens, D]."""
        return _text_in(self.folder / EMPTY_TEXT)

    @cached_property
    def negative_text(self) -> Tensor:
        """Embedding of the negative prompt that the videos were sampled with, fp32 [tokens, D]."""
        return _text_in(self.folder / NEGATIVE_TEXT)

    @cached_property
    def origins(self) -> tuple[list[Origin], list[Origin]]:
        """Of every winner and of every loser, in the order of the rows."""
        stored = self.rows.column_names
        columns = [self.rows[name] if name in stored else [None] * len(self) for name in ("origin_w", "origin_l")]
        winners, losers = ([_origin(text) for text in column] for column in columns)
        return winners, losers

    @cached_property
    def states_of(self) -> list[tuple[str, str]]:
        """Of every pair, which states its winner and its loser have: "" for none, SAMPLED or INVERTED, with FOLLOWING
        behind it where those after them are there too."""
        if "states_w" not in self.rows.column_names:
            return [("", "")] * len(self)
        return [(w or "", l or "") for w, l in zip(self.rows["states_w"], self.rows["states_l"], strict=True)]

    @cached_property
    def path_rows(self) -> list[tuple[int, ...]]:
        """Of every pair, the rows of the schedule that its states are at."""
        if "path_rows" not in self.rows.column_names:
            return [()] * len(self)
        return [tuple(rows or ()) for rows in self.rows["path_rows"]]

    @cached_property
    def inversion_errors(self) -> list[float | None]:
        """Of every pair, the larger round-trip error of its inversions; None where it has none."""
        if "error_w" not in self.rows.column_names:
            return [None] * len(self)
        both = zip(self.rows["error_w"], self.rows["error_l"], strict=True)
        return [max((error for error in pair if error is not None), default=None) for pair in both]

    @cached_property
    def inverted(self) -> bool:
        """Whether any pair has an inversion."""
        return any(error is not None for error in self.inversion_errors)

    @property
    def fingerprint(self) -> str:
        """Changes with the terms the pairs were made under, with every byte of them, and of ranked rollouts with which
        is better. Of a store from before its rows had digests, with which pairs there are instead of every byte."""
        content: list[Any] = [asdict(self.info), self.ids]
        if DIGEST in self.rows.column_names:
            content.append(self.rows[DIGEST][:])
            content += [hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in TEXTS]
        members = self.folder / MEMBERS
        if self.info.kind == "rollouts" and members.exists():
            content.append(json.loads(members.read_text()))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def content(self) -> dict[str, str]:
        """Digests of the pairs themselves ("pairs") and of their masks ("regions"). Reads every byte."""
        digests = {"pairs": hashlib.sha256(), "regions": hashlib.sha256()}
        for row in self.rows:
            check_row(self.folder, self.info, row)
            row.pop(DIGEST, None)
            tensors = load_tensors(row.pop("tensors"))
            mask = tensors.pop("mask")
            digests["regions"].update(json.dumps([row["id"], *mask.shape]).encode() + mask.numpy().tobytes())
            digests["pairs"].update(json.dumps(row, sort_keys=True).encode())
            for name, tensor in sorted(tensors.items()):
                digests["pairs"].update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        return {name: digest.hexdigest()[:16] for name, digest in digests.items()}

    def select(self, rows: list[int]) -> "PairStore":
        """The same store with these rows alone."""
        chosen = copy.copy(self)
        for cached in ("origins", "states_of", "path_rows", "inversion_errors", "inverted"):
            chosen.__dict__.pop(cached, None)
        chosen.rows, chosen.ids = self.rows.select(rows), [self.ids[row] for row in rows]
        return chosen

    @classmethod
    def joined(cls, stores: "Sequence[PairStore]") -> "PairStore":
        """The rows of several stores of the same terms one after the other, under the first one's."""
        whole = stores[0].select(list(range(len(stores[0]))))
        whole.rows = datasets.concatenate_datasets([store.rows for store in stores])
        whole.ids = [number for store in stores for number in store.ids]
        return whole

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        check_row(self.folder, self.info, row)
        tensors = load_tensors(row["tensors"])
        mask = tensors.pop("mask")
        latents = {name: tensor.float() for name, tensor in tensors.items()}
        winner, loser = latents["winner"], latents.get("loser")
        if loser is None:
            loser = winner.clone()
            loser[mask.bool().expand_as(winner)] = latents["loser_inside"]

        def path(side: str) -> Trajectory | None:
            states = latents.get(f"states_{side}")
            if states is None:
                return None
            return Trajectory(states, latents.get(f"following_{side}"), row[f"error_{side}"])

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
            origin_w=_origin(row.get("origin_w")),
            origin_l=_origin(row.get("origin_l")),
            path_rows=tuple(row.get("path_rows") or ()),
            path_w=path("w"),
            path_l=path("l"),
        )


def _text_in(file: Path) -> Tensor:
    try:
        return load_tensors(file.read_bytes())["text"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{file}: damaged ({error}); delete the folder and run 'alignkit pairs' again") from None


def _side_by_side(rows: list[tuple[int, ...]]) -> Tensor | None:
    """int64 [B, S], zeros for a pair that has none; None where none has any."""
    size = max(map(len, rows))
    return torch.tensor([one or (0,) * size for one in rows]) if size else None


def _origin(text: str | None) -> Origin:
    """Pairs that were stored before origins were have none."""
    try:
        return GIVEN if text is None else Origin.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"a pair's origin is damaged ({error}): {text!r:.60}; delete its block and build again"
        ) from None


@dataclass(frozen=True)
class Side:
    """One side of B pairs beside its latents: an origin each, and the states of its path, None where it has none."""

    origins: list[Origin]
    paths: list[Trajectory | None]


@dataclass(frozen=True)
class PairBatch:
    """Pairs side by side: latents fp32 [B, ...], mask uint8 [B, ...], a text each, ids int64 [B], strength fp64 [B].

    strength is None for pairs that have none. path_rows: rows of the schedule for each pair, int64 [B, S], at which
    sides have states; zeros of a pair without states, None where no pair has any. side_w, side_l: what each side came
    from; None of pairs that were put together by hand.
    """

    ids: Tensor
    winner: Tensor
    loser: Tensor
    mask: Tensor
    text: list[Tensor]
    strength: Tensor | None
    path_rows: Tensor | None = None
    side_w: Side | None = None
    side_l: Side | None = None

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
        path_rows=_side_by_side([pair.path_rows for pair in pairs]),
        side_w=Side([pair.origin_w for pair in pairs], [pair.path_w for pair in pairs]),
        side_l=Side([pair.origin_l for pair in pairs], [pair.path_l for pair in pairs]),
    )
