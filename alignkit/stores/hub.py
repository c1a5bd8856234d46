"""Pair stores on the Hugging Face hub: what `datasets` reads there, with what training needs beside it."""

from dataclasses import replace
from pathlib import Path

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from alignkit.errors import DataError
from alignkit.files import put_in_place, write_atomically
from alignkit.moment import listed
from alignkit.stores.pairs import EMPTY_TEXT, NEGATIVE_TEXT, PairStore
from alignkit.stores.store import block_file, open_for_building, read_info, terms_file

FILES = (terms_file(Path(), "pairs").name, EMPTY_TEXT, NEGATIVE_TEXT)
"""What a store holds beside its blocks."""


def push_to_hub(folder: Path, repo_id: str, split: str, *, private: bool = True) -> None:
    """Upload the store in `folder` as split `split` of the dataset `repo_id`; `datasets.load_dataset` reads its rows.

    Needs `hf auth login`. Raises DataError for a store that is not whole.
    """
    store = PairStore(folder)
    store.rows.push_to_hub(repo_id, split=split, private=private)
    for name in (name for name in FILES if (Path(folder) / name).exists()):
        HfApi().upload_file(
            path_or_fileobj=Path(folder) / name,
            path_in_repo=f"{split}/{name}",
            repo_id=repo_id,
            repo_type="dataset",
        )


def pull_from_hub(repo_id: str, split: str, folder: Path, *, revision: str | None = None) -> PairStore:
    """Download split `split` of `repo_id` into `folder`, for training to read; returns the store.

    Raises DataError if `folder` holds other pairs already.
    """
    folder = Path(folder)
    if listed(folder, "block-*"):
        raise DataError(f"{folder}: holds pairs already; choose another folder or delete it")
    parts = {}
    for name in FILES:
        try:
            parts[name] = Path(hf_hub_download(repo_id, f"{split}/{name}", repo_type="dataset", revision=revision))
        except EntryNotFoundError:
            if name != NEGATIVE_TEXT:  # which stores of before guided training have not
                raise
    rows = datasets.load_dataset(repo_id, split=split, revision=revision)
    info = replace(read_info(parts[FILES[0]].parent), pairs=len(rows))
    open_for_building(folder, info)
    for name in set(FILES[1:]) & parts.keys():
        write_atomically(folder / name, parts[name].read_bytes())
    for block in range(info.blocks):
        chosen = info.rows(block)
        partial = block_file(folder, block).with_suffix(".partial")
        with datasets.arrow_writer.ArrowWriter(path=str(partial), features=rows.features) as writer:
            for row in rows.select(chosen):
                writer.write(row)
            writer.finalize()
        put_in_place(partial, block_file(folder, block))
    return PairStore(folder)
