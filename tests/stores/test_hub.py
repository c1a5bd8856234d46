"""A store goes to the hub and comes back the same; the hub is a folder here, laid out as the hub does it."""

import dataclasses
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi

from alignkit.errors import DataError
from alignkit.stores import hub
from alignkit.stores.pairs import PairStore


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """What is sent to the dataset "me/pairs" lies here."""
    root = tmp_path / "hub"

    def push(rows, repo_id, split, private):
        assert repo_id == "me/pairs" and private
        (root / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))

    def upload(_, path_or_fileobj, path_in_repo, repo_id, repo_type):
        assert (repo_id, repo_type) == ("me/pairs", "dataset")
        (root / path_in_repo).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, root / path_in_repo)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    monkeypatch.setattr(HfApi, "upload_file", upload)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, name, repo_type, revision: str(root / name))

    def local(repo_id, split, revision):
        files = {split: str(root / "data" / f"{split}-*.parquet")}
        return load("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    return root


def test_a_store_comes_back_from_the_hub_pair_by_pair(made_pairs, hub_folder, tmp_path):
    folder = made_pairs / "pairs" / "train"
    hub.push_to_hub(folder, "me/pairs", "train")
    store, again = PairStore(folder), hub.pull_from_hub("me/pairs", "train", tmp_path / "again")
    assert again.ids == store.ids and again.fingerprint == store.fingerprint
    assert torch.equal(again.empty_text, store.empty_text)
    for one, other in zip(store, again, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    with pytest.raises(DataError, match="holds pairs already"):
        hub.pull_from_hub("me/pairs", "train", tmp_path / "again")


def test_an_unfinished_store_is_not_sent(made_pairs, hub_folder, tmp_path):
    folder = Path(shutil.copytree(made_pairs / "pairs" / "train", tmp_path / "part"))
    next(folder.glob("block-*.arrow")).unlink()
    with pytest.raises(DataError, match="are not made yet"):
        hub.push_to_hub(folder, "me/pairs", "train")
    assert not hub_folder.exists()
