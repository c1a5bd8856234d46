"""The pair store: nothing is lost or mixed, and a killed build leaves whole blocks only."""

import dataclasses
import re

import datasets
import pytest
import torch

from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.stores.pairs import (
    FEATURES,
    LATENT_DTYPES,
    Pair,
    PairStore,
    collate,
    fault_of,
    write_block,
    write_texts,
)
from alignkit.stores.store import (
    DIGEST,
    StoreInfo,
    block_file,
    missing_blocks,
    open_for_building,
    read_info,
    skipped_rows,
    write_rows,
)

INFO = StoreInfo(
    kind="local_dpo",
    family="wan",
    model="m",
    vae="v",
    text_encoder="t",
    pairs=5,
    block_size=2,
    made={"mask": {"blobs": (1, 5)}, "seed": 0},
)


def make_pair(number):
    generator = torch.Generator().manual_seed(number)
    winner = torch.randn(4, 3, 6, 8, generator=generator)
    mask = (torch.rand(1, 3, 6, 8, generator=generator) < 0.2).to(torch.uint8)
    loser = torch.where(mask.bool(), torch.randn(4, 3, 6, 8, generator=generator), winner)
    text = torch.randn(5 + number, 16, generator=generator)
    return Pair(number, f"{number}.mp4", f"prompt {number}", text, winner, loser, mask, 38, 0.76)


@pytest.mark.parametrize(
    ("stored", "inside", "words"),
    [
        (torch.float16, 70_000.0, "not finite"),  # beyond fp16's largest number, 65504
        (torch.float16, 1 + 2**-12, "are the same inside"),  # fp16 has 11 digits
        (torch.float32, 70_000.0, None),
        (torch.float32, 1 + 2**-12, None),
    ],
)
def test_a_pair_is_looked_at_as_it_will_be_stored(stored, inside, words):
    pair = make_pair(0)
    winner = torch.ones_like(pair.winner)
    loser = torch.where(pair.mask.bool(), torch.tensor(inside), winner)
    fault = fault_of(dataclasses.replace(pair, winner=winner, loser=loser), stored)
    assert (words in fault) if words else (fault is None)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def write(folder, pairs, **terms):
    """A store of these pairs alone."""
    info = dataclasses.replace(INFO, pairs=len(pairs), **terms)
    open_for_building(folder, info)
    for block in range(info.blocks):
        write_block(folder, block, pairs[2 * block : 2 * block + 2], dtype=LATENT_DTYPES[info.dtype])
    return PairStore(folder)


def test_pairs_come_back_bit_for_bit(tmp_path):
    pairs = [make_pair(i) for i in range(5)]
    store = write(tmp_path, pairs)
    assert store.ids == [0, 1, 2, 3, 4]
    assert all(same(got, wanted) for got, wanted in zip(store, pairs, strict=True))
    batch = collate([store[1], store[4]])
    assert torch.equal(batch.loser[1], pairs[4].loser) and batch.strength.tolist() == [0.76, 0.76]


def test_pairs_without_a_strength_that_differ_everywhere_come_back_too(tmp_path):
    first = make_pair(0)
    pair = dataclasses.replace(first, loser=first.winner + 1, steps=None, strength=None)
    (got,) = write(tmp_path, [pair])
    assert same(got, pair)
    assert collate([got]).strength is None


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stored_in_half_the_size_winner_and_loser_stay_equal_outside_the_mask(tmp_path, dtype):
    pair = make_pair(0)
    (got,) = write(tmp_path, [pair], dtype=dtype)
    inside = pair.mask.bool().expand_as(pair.winner)
    assert torch.equal(got.winner, pair.winner.to(LATENT_DTYPES[dtype]).float())
    assert torch.equal(got.loser[~inside], got.winner[~inside]) and not torch.equal(got.loser, got.winner)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2)])
def test_no_byte_is_stored_twice(tmp_path, dtype, size):
    pair = make_pair(0)
    stored = len(write(tmp_path, [pair], dtype=dtype).rows[0]["tensors"])
    needed = size * (pair.winner.numel() + int(pair.mask.sum()) * 4 + pair.text.numel()) + pair.mask.numel()
    assert stored - needed < 500  # the header of the safetensors format


def test_an_unfinished_block_is_not_seen_and_an_unfinished_store_not_read(tmp_path, monkeypatch):
    open_for_building(tmp_path, INFO)
    write_block(tmp_path, 0, [make_pair(0), make_pair(1)])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_block(tmp_path, 1, [make_pair(2), make_pair(3)])
    monkeypatch.undo()
    assert missing_blocks(tmp_path, INFO) == [1, 2]
    with pytest.raises(DataError, match=r"2 of 3 blocks of pairs are not made yet; run 'alignkit pairs'"):
        PairStore(tmp_path)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"model": "n"}, "model = 'm', now it is 'n'"),
        ({"made": {"mask": {"blobs": (1, 5)}, "seed": 1}}, "seed = 0, now it is 1"),
        ({"made": {"mask": {"blobs": (1, 5)}, "seed": 0, "new": 2}}, "new = None, now it is 2"),
    ],
)
def test_other_terms_are_refused_by_name(tmp_path, terms, words):
    open_for_building(tmp_path, INFO)
    block_file(tmp_path, 0).touch()
    open_for_building(tmp_path, INFO)
    with pytest.raises(DataError, match=words):
        open_for_building(tmp_path, dataclasses.replace(INFO, **terms))


def test_terms_that_no_block_was_made_under_are_replaced(tmp_path):
    open_for_building(tmp_path, INFO)
    other = dataclasses.replace(INFO, model="n")
    open_for_building(tmp_path, other)
    assert read_info(tmp_path).model == "n"


def test_a_block_made_anew_leaves_nothing_of_its_first_try(tmp_path):
    info = dataclasses.replace(INFO, pairs=2)
    open_for_building(tmp_path, info)
    write_block(tmp_path, 0, [make_pair(0)], [Problem("1.mp4", "useless")])
    (tmp_path / "block-00000.partial-of-a-killed-process").write_bytes(b"half")
    block_file(tmp_path, 0).unlink()
    write_block(tmp_path, 0, [make_pair(0), make_pair(1)])
    assert skipped_rows(tmp_path) == []
    assert {file.name for file in tmp_path.iterdir()} == {"pairs.json", "block-00000.arrow"}


def test_a_repeated_id_is_refused(tmp_path):
    with pytest.raises(DataError, match="occurs twice"):
        write(tmp_path, [make_pair(0), make_pair(1), make_pair(0)])


def test_a_folder_without_pairs_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run 'alignkit pairs'"):
        PairStore(tmp_path)
    problem = Problem("a.mp4", "useless")
    open_for_building(tmp_path, dataclasses.replace(INFO, pairs=1))
    write_block(tmp_path, 0, [], [problem])
    assert skipped_rows(tmp_path) == [problem]
    with pytest.raises(DataError, match="holds no pairs; the reasons are in its block"):
        PairStore(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("block-00001.arrow", b"cut off", "block-00001.arrow: damaged"),
        ("pairs.json", b"[]", "written in pair format"),
        ("pairs.json", b"{", "pairs.json: damaged"),
        ("pairs.json", b'{"format": 3, "colour": 1}', "pairs.json: damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    write(tmp_path, [make_pair(i) for i in range(3)])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        PairStore(tmp_path)


def stored(folder):
    """A store of two blocks with its texts."""
    open_for_building(folder, dataclasses.replace(INFO, pairs=4))
    write_texts(folder, torch.zeros(1, 16), torch.ones(2, 16))
    for block in range(2):
        write_block(folder, block, [make_pair(2 * block), make_pair(2 * block + 1)])
    return folder


def test_whatever_bit_of_a_block_is_flipped_nothing_else_is_read_than_was_written(tmp_path):
    """A flipped bit in a stored winner trained in silence. Read or refused, and by its name."""
    folder = stored(tmp_path)
    before = list(PairStore(folder))
    file = block_file(folder, 1)
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 61):  # a prime: through every field of the file's own structure
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        file.write_bytes(hurt)
        try:
            now = list(PairStore(folder))
        except DataError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert len(now) == len(before) and all(map(same, now, before)), f"bit {place % 8} of byte {place}"
    assert refused > 0.9 * len(whole) / 61
    for size in (0, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=re.escape(str(file))):
            list(PairStore(folder))


def test_other_contents_under_the_same_ids_have_another_fingerprint(tmp_path):
    folder = stored(tmp_path)
    first = PairStore(folder).fingerprint
    assert PairStore(folder).fingerprint == first
    pair = make_pair(3)
    write_block(folder, 1, [make_pair(2), dataclasses.replace(pair, winner=pair.winner + pair.mask)])
    second = PairStore(folder).fingerprint
    write_block(folder, 1, [make_pair(2), pair])
    assert PairStore(folder).fingerprint == first != second
    write_texts(folder, torch.zeros(1, 16), torch.zeros(2, 16))
    assert PairStore(folder).fingerprint not in (first, second)


def test_rows_from_before_digests_are_read_and_go_together_with_newer_ones(tmp_path):
    folder = stored(tmp_path)
    before = list(PairStore(folder))
    old = datasets.Dataset.from_file(str(block_file(folder, 0))).remove_columns(DIGEST)
    features = datasets.Features({name: kind for name, kind in FEATURES.items() if name != DIGEST})
    write_rows(folder, 0, old.to_list(), features)
    assert all(map(same, PairStore(folder), before))
