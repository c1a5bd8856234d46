"""What was found out once is found again by whom it concerns, and what stands in its way stops nobody."""

import os
import time

import pytest

from alignkit.remembered import memory, name_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_noted_is_there_for_the_next_and_for_no_other_question():
    with memory("things", ["a", 1]) as known:
        assert "x" not in known
        known.note("x", [None, "why"])
        known.note("x", [None, "why else"])
        assert known["x"] == [None, "why else"]
    with memory("things", ["a", 1]) as known, memory("things", ["a", 2]) as other:
        assert known["x"] == [None, "why else"] and "x" not in other


def test_what_other_code_found_is_not_taken_for_it(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("1")
    with memory("things", "a", [module]) as known:
        known.note("x", 1)
    with memory("things", "a", [module]) as known:
        assert "x" in known
    module.write_text("2")
    with memory("things", "a", [module]) as known:
        assert "x" not in known


def test_a_line_that_is_cut_off_costs_itself(cache):
    with memory("things", "a") as known:
        known.note("x", 1)
    (file,) = cache.rglob("*.jsonl")
    with file.open("ab") as stream:
        stream.write(b'["y", 1]\n"z"\n3\n[[1], 2]\n\xff\xfe\n["w", ')
    with memory("things", "a") as known:
        assert "x" in known and "y" in known and "w" not in known


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_without_a_home_everything_is_found_out_anew(monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    for _ in range(2):
        with memory("things", "a") as known:
            assert "x" not in known
            known.note("x", 1)
            assert known["x"] == 1


def test_a_full_disk_stops_nobody(cache):
    with memory("things", "a") as known:
        known.note("x", 1)
        (file,) = cache.rglob("*.jsonl")
        file.unlink()
        file.symlink_to("/dev/full")
        known.note("y", 2)
        assert known["y"] == 2


def test_an_error_of_who_looks_is_not_taken_for_one_of_the_cache():
    with pytest.raises(OSError, match="of the one who looks"), memory("things", "a"):
        raise OSError("of the one who looks")


def test_a_file_of_the_same_size_and_time_has_another_name(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    before, times = name_of(file), file.stat()
    file.write_bytes(b"2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert name_of(file) != before


def test_who_waits_for_another_one_says_so(start_command, cache, tmp_path, monkeypatch):
    code = """
import sys, time
from pathlib import Path
from alignkit.remembered import memory
entered, heard = map(Path, sys.argv[1:])
with memory("videos", "a"):
    entered.touch()
    while not heard.exists():
        time.sleep(0.01)
"""
    entered, heard, said = tmp_path / "entered", tmp_path / "heard", []
    other = start_command(entered, heard, code=code, env={"XDG_CACHE_HOME": str(cache)})
    while not entered.exists():
        assert other.poll() is None
        time.sleep(0.01)
    monkeypatch.setattr("alignkit.sharing.say", lambda text: said.append(text) or heard.touch())
    with memory("videos", "a"):
        (line,) = said
    assert line.startswith(f"waiting for another process, which looks at the same videos and holds {cache}")
    with memory("videos", "a"):
        assert said == [line]
