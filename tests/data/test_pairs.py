"""The pair store: nothing is lost or mixed, and a killed build leaves whole blocks only."""

import dataclasses

import pytest
import torch

from alignkit.data.pairs import Pair, PairStore, StoreInfo, collate, open_for_building, write_block
from alignkit.errors import DataError

INFO = StoreInfo(
    family="wan",
    model="m",
    vae="v",
    text_encoder="t",
    schedule="s",
    num_inference_steps=50,
    guidance_scale=6.0,
    prompt_prefix="",
    negative_prompt="",
    strengths=[38],
    mask={"blobs": (1, 5)},
    seed=0,
    per_clip=1,
    block_size=2,
    videos={"height": 48},
)


def make_pair(number):
    generator = torch.Generator().manual_seed(number)
    winner = torch.randn(4, 3, 6, 8, generator=generator)
    mask = (torch.rand(1, 3, 6, 8, generator=generator) < 0.2).to(torch.uint8)
    loser = torch.where(mask.bool(), torch.randn(4, 3, 6, 8, generator=generator), winner)
    text = torch.randn(5 + number, 16, generator=generator)
    return Pair(number, f"{number}.mp4", f"prompt {number}", text, winner, loser, mask, 38, 0.76)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def test_pairs_come_back_bit_for_bit(tmp_path):
    pairs = [make_pair(i) for i in range(5)]
    open_for_building(tmp_path, INFO)
    for block in range(3):
        write_block(tmp_path, block, pairs[2 * block : 2 * block + 2])
    store = PairStore(tmp_path)
    assert store.ids == [0, 1, 2, 3, 4]
    assert all(same(got, wanted) for got, wanted in zip(store, pairs, strict=True))
    batch = collate([store[1], store[4]])
    assert torch.equal(batch.loser[1], pairs[4].loser) and batch.strength.tolist() == [0.76, 0.76]


def test_the_loser_is_stored_inside_its_mask_only(tmp_path):
    open_for_building(tmp_path, INFO)
    pair = make_pair(0)
    write_block(tmp_path, 0, [pair])
    stored = len(PairStore(tmp_path).rows[0]["tensors"])
    needed = 4 * (pair.winner.numel() + int(pair.mask.sum()) * 4 + pair.text.numel()) + pair.mask.numel()
    assert stored - needed < 500  # the header of the safetensors format


def test_an_unfinished_block_is_not_seen(tmp_path, monkeypatch):
    open_for_building(tmp_path, INFO)
    write_block(tmp_path, 0, [make_pair(0)])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_block(tmp_path, 1, [make_pair(1)])
    monkeypatch.undo()
    assert PairStore(tmp_path).ids == [0]


def test_other_terms_are_refused_by_name(tmp_path):
    open_for_building(tmp_path, INFO)
    open_for_building(tmp_path, INFO)
    with pytest.raises(DataError, match=r"guidance_scale = 6\.0, now it is 4\.0"):
        open_for_building(tmp_path, dataclasses.replace(INFO, guidance_scale=4.0))


def test_a_repeated_id_is_refused(tmp_path):
    open_for_building(tmp_path, INFO)
    write_block(tmp_path, 0, [make_pair(0)])
    write_block(tmp_path, 1, [make_pair(0)])
    with pytest.raises(DataError, match="occurs twice"):
        PairStore(tmp_path)


def test_a_folder_without_pairs_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run 'alignkit pairs'"):
        PairStore(tmp_path)
    open_for_building(tmp_path, INFO)
    write_block(tmp_path, 0, [])
    with pytest.raises(DataError, match="holds no pairs"):
        PairStore(tmp_path)
