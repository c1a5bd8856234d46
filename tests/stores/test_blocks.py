"""Building a store block by block: once each, by any number of processes, killed or not, with the same bytes."""

import dataclasses
import fcntl
import multiprocessing
import os
import signal
import time

import pytest
import torch

from alignkit import sharing
from alignkit.errors import DataError
from alignkit.media.captions import Problem
from alignkit.sharing import one_at_a_time
from alignkit.stores import blocks
from alignkit.stores.blocks import build_blocks
from alignkit.stores.pairs import Pair, PairStore
from alignkit.stores.store import StoreInfo, block_file, open_for_building, skipped_rows

INFO = StoreInfo("local_dpo", "wan", "m", "v", "t", pairs=11, block_size=2)
BAD = 7


def make(rows, advance, log=None, seconds=0.0):
    """Pairs that depend on their numbers alone; row BAD cannot be made."""
    pairs = []
    for row in rows:
        if log:
            with log.open("a") as stream:
                stream.write(f"{row}\n")
        time.sleep(seconds)
        if row != BAD:
            winner = torch.full((2, 3, 4, 4), float(row))
            mask = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
            mask[..., 0] = 1
            pairs.append(Pair(row, f"{row}.mp4", "", torch.zeros(1, 2), winner, winner + mask, mask))
        advance(1)
    return pairs, [Problem(f"{BAD}.mp4", "bad")] if BAD in rows else []


def build(folder, log=None, seconds=0.0):
    open_for_building(folder, INFO)
    build_blocks(folder, INFO, lambda rows, advance: make(rows, advance, log, seconds), "making", show=False)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)


@pytest.fixture
def whole(tmp_path):
    build(tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_all_pairs_are_made_but_those_that_cannot_be_which_are_listed(tmp_path):
    build(tmp_path)
    assert PairStore(tmp_path).ids == [row for row in range(11) if row != BAD]
    assert skipped_rows(tmp_path) == [Problem("7.mp4", "bad")]
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_makes_each_pair_once_and_the_same_store(tmp_path, whole, quick, count):
    log = tmp_path / "made.txt"
    workers = [multiprocessing.Process(target=build, args=(tmp_path / "shared", log, 0.01)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * count
    assert sorted(map(int, log.read_text().split())) == list(range(11)), "each row once, over all processes"
    assert contents(tmp_path / "shared") == whole


def test_a_killed_process_is_replaced_and_the_bytes_are_those_of_an_unbroken_build(tmp_path, whole, quick):
    folder, log = tmp_path / "shared", tmp_path / "made.txt"
    slow = multiprocessing.Process(target=build, args=(folder, log, 0.3))
    slow.start()
    while not (log.exists() and len(log.read_text().split()) >= 4):  # in the middle of the second block
        time.sleep(0.01)
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    assert block_file(folder, 0).exists() and not block_file(folder, 1).exists()
    build(folder)
    left = {name: content for name, content in contents(folder).items() if ".partial" not in name}
    assert left == whole


def hold(lock, seen):
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        seen.set()
        time.sleep(60)


def test_the_last_process_waits_for_a_block_that_another_one_is_making(tmp_path, whole, quick):
    folder = tmp_path / "shared"
    open_for_building(folder, INFO)
    held = multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(block_file(folder, 3).with_suffix(".lock"), held))
    other.start()
    held.wait()
    worker = multiprocessing.Process(target=build, args=(folder,))
    worker.start()
    while len(list(folder.glob("*.arrow"))) < 5:
        time.sleep(0.01)
    time.sleep(0.1)
    assert worker.is_alive() and not block_file(folder, 3).exists()
    other.kill()  # without having made it
    worker.join(30)
    assert worker.exitcode == 0 and contents(folder) == whole


def test_what_making_raises_is_raised_and_the_block_is_free_again(tmp_path, whole):
    open_for_building(tmp_path / "again", INFO)

    def stumble(rows, advance):
        if 4 in rows:
            raise DataError("no")
        return make(rows, advance)

    with pytest.raises(DataError, match="no"):
        build_blocks(tmp_path / "again", INFO, stumble, "making", show=False)
    build(tmp_path / "again")
    assert contents(tmp_path / "again") == whole


def test_terms_that_another_build_replaced_before_the_first_block_end_this_one(tmp_path):
    open_for_building(tmp_path, INFO)
    other = dataclasses.replace(INFO, made={"seed": 1})
    open_for_building(tmp_path, other)
    with pytest.raises(DataError, match="holds pairs made with seed = 1"):
        build_blocks(tmp_path, INFO, make, "making", show=False)
    assert not list(tmp_path.glob("block-*.arrow"))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"has no locks \(Function not implemented\)"):
        build(tmp_path)


def count_up(file, rounds):
    """Not atomic: loses counts when two are at it."""
    for _ in range(rounds):
        with one_at_a_time(file.with_suffix(".lock")):
            number = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(number + 1))


def test_processes_enter_one_at_a_time(tmp_path):
    file = tmp_path / "count"
    file.write_text("0")
    workers = [multiprocessing.Process(target=count_up, args=(file, 40)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert file.read_text() == "120"


def test_the_bar_counts_what_others_made_too(tmp_path, monkeypatch, quick):
    counts = []

    class Bar:
        def advance(self, amount=1, note=""):
            counts.append(amount)
            assert "pairs/s" in note

    class Progress:
        def __init__(self, title, total, done=0, show=True):
            counts.append(done)

        def __enter__(self):
            return Bar()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(blocks, "progress", Progress)
    build(tmp_path)
    block_file(tmp_path, 0).unlink()
    assert sum(counts) == INFO.pairs
    counts.clear()
    open_for_building(tmp_path, dataclasses.replace(INFO))

    def others_make_the_rest(rows, advance):
        return make(rows, lambda _: None)

    build_blocks(tmp_path, INFO, others_make_the_rest, "making")
    assert counts[0] == INFO.pairs - 2 and sum(counts) == INFO.pairs
