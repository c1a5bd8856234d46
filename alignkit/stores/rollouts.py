"""The rollout store: one row a sampled video, with the key of its noise and, where asked for, states of its path.

A folder holds `rollouts.json` (what all have in common) and `block-NNNNN.arrow` files (`alignkit.stores.store`). All is
fp32: noise is solved for from the states and the video.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.stores.origins import Origin, Trajectory
from alignkit.stores.store import check_row, open_blocks, read_info, with_digest, write_rows

FEATURES = datasets.Features(
    id=datasets.Value("int64"),
    prompt_id=datasets.Value("int64"),
    prompt=datasets.Value("string"),
    origin=datasets.Value("string"),
    path_rows=datasets.List(datasets.Value("int32")),
    tensors=datasets.Value("binary"),
    digest=datasets.Value("string"),
)


@dataclass(frozen=True)
class Rollout:
    """A sampled video: latents fp32 in the family's layout. id: its noise's sample id, unique in the store.

    path: the network's inputs at rows `path_rows` of the schedule, ascending and the same for all rollouts of a prompt;
    None where none were kept.
    """

    id: int
    prompt_id: int
    prompt: str
    latents: Tensor
    origin: Origin
    path_rows: tuple[int, ...] = ()
    path: Trajectory | None = None


def write_rollouts(
    folder: Path,
    block: int,
    rollouts: list[Rollout],
    skipped: list[Problem] | tuple[()] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Store `rollouts` as block number `block`, as `write_rows` does."""
    write_rows(folder, block, map(_row, rollouts), FEATURES, skipped)


def _row(rollout: Rollout) -> dict[str, Any]:
    tensors = {"latents": rollout.latents.float().contiguous()}
    if rollout.path is not None:
        tensors["states"] = rollout.path.states.float().contiguous()
        if rollout.path.following is not None:
            tensors["following"] = rollout.path.following.float().contiguous()
    row = {name: getattr(rollout, name) for name in ("id", "prompt_id", "prompt")}
    return with_digest(
        row
        | {
            "origin": rollout.origin.to_json(),
            "path_rows": list(rollout.path_rows),
            "tensors": save_tensors(tensors),
        }
    )


class RolloutStore:
    """Read access to a folder of rollouts: `store[i]` is a Rollout, `store.by_id(id)` too, `store.info` the terms.

    blocks: as for `PairStore`. Raises DataError for a store that is not whole, damaged or none.
    """

    def __init__(self, folder: Path, blocks: Sequence[int] | None = None):
        self.folder = Path(folder)
        self.info = read_info(self.folder, "rollouts")
        self.rows = open_blocks(self.folder, self.info, FEATURES, blocks)
        self.ids: list[int] = list(self.rows["id"])
        self._prompts: list[str] = list(self.rows["prompt"])
        self._places = {number: row for row, number in enumerate(self.ids)}
        if len(self._places) != len(self.ids):
            for row in self.rows:  # which one is not as it was written
                check_row(self.folder, self.info, row)
            raise DataError(f"{self.folder}: a rollout's id occurs twice; delete the folder and sample again")

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __iter__(self) -> Iterator[Rollout]:
        return (self[i] for i in range(len(self)))

    def by_id(self, number: int) -> Rollout:
        return self[self._places[number]]

    def prompt_of(self, number: int) -> str:
        return self._prompts[self._places[number]]

    def __getitem__(self, index: int) -> Rollout:
        row = self.rows[index]
        check_row(self.folder, self.info, row)
        tensors = load_tensors(row["tensors"])
        path = Trajectory(tensors["states"], tensors.get("following")) if "states" in tensors else None
        try:
            origin, rows = Origin.from_json(row["origin"]), tuple(row["path_rows"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.folder}: rollout {row['id']} is damaged ({error}); delete its block's file"
            ) from None
        return Rollout(row["id"], row["prompt_id"], row["prompt"], tensors["latents"], origin, rows, path)
