"""Votes of people: what may be compared, and that no vote is ever lost or counted twice."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from alignkit.errors import DataError
from alignkit.rankers.people.comparisons import read_comparisons, write_comparisons
from alignkit.rankers.people.votes import open_votes, rater_name, read_votes, record, take_back, take_skips_back

GOOD = {"id": "000", "prompt": "a ball", "a": "videos/1.mp4", "b": "videos/2.mp4"}


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "ranked"
    (found / "videos").mkdir(parents=True)
    for number in (1, 2):
        (found / "videos" / f"{number}.mp4").write_bytes(b"video %d" % number)
    return found


def test_comparisons_come_back_as_they_were_written(folder):
    rows = [GOOD, GOOD | {"id": "é/../'", "prompt": "two\nlines \u2028", "kind_a": "sft", "kind_b": "dpo"}]
    write_comparisons(folder, rows)
    first, second = read_comparisons(folder)
    assert (first.id, first.video_a, first.kind_a) == ("000", folder / "videos/1.mp4", None)
    assert (second.id, second.prompt, second.kind_a, second.kind_b) == ("é/../'", "two\nlines \u2028", "sft", "dpo")


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no comparison"),
        (json.dumps(GOOD | {"id": "1"})[:-1] + ', "prompt": "another"}', "holds the key 'prompt' twice; keep one"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "b"}), "lacks 'b'"),
        (json.dumps(GOOD), "the id '000' is there twice"),
        (json.dumps(GOOD | {"id": "1", "kindA": "sft"}), "does not know the key 'kindA'"),
        (json.dumps(GOOD | {"id": "1", "kind_a": "sft"}), "one of kind_a and kind_b"),
        (json.dumps(GOOD | {"id": 1}), "'id' is 1; it has to be a text"),
        (json.dumps(GOOD | {"id": ""}), "'id' is ''"),
        (json.dumps(GOOD | {"id": "\ud800"}), "it has to be a text"),
        (json.dumps(GOOD | {"id": "1", "a": "x\0.mp4"}), "it has to be a text"),
        (json.dumps(GOOD | {"id": "1", "a": "x" * 5000}), "there is no video"),
        (json.dumps(GOOD | {"id": "1", "a": "videos"}), "there is no video"),
        (json.dumps(GOOD | {"id": "1", "b": "videos/3.mp4"}), "'b': there is no video 'videos/3.mp4'"),
        (json.dumps(GOOD | {"id": "1", "a": "../outside.mp4"}), "leads out of the folder"),
        (json.dumps(GOOD | {"id": "1", "a": "videos/../videos/1.mp4"}), "leads out of the folder"),
        (json.dumps(GOOD | {"id": "1", "a": "/etc/passwd"}), "leads out of the folder"),
        (json.dumps(GOOD | {"id": "1", "a": "link.mp4"}), "leads out of the folder"),
        (json.dumps(GOOD | {"id": "1", "a": "circle.mp4"}), r"leads out of the folder|there is no video"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_in_one_line(folder, line, said):
    (folder.parent / "outside.mp4").write_bytes(b"secret")
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (folder / "comparisons.jsonl").write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=said) as error:
        read_comparisons(folder)
    assert str(error.value).startswith(f"{folder}/comparisons.jsonl:3: ") and "\n" not in str(error.value)


def test_what_could_not_be_read_is_not_written_either(folder):
    with pytest.raises(DataError, match=r"comparisons.jsonl:2: the id '000' is there twice"):
        write_comparisons(folder, [GOOD, GOOD])
    with pytest.raises(DataError, match="holds no comparison"):
        write_comparisons(folder, [])
    with pytest.raises(DataError, match=r"holds no comparisons.jsonl"):
        read_comparisons(folder)


def counted(folder):
    return [(vote.rater, vote.comparison, vote.answer) for vote in read_votes(folder)]


def rows(folder):
    with sqlite3.connect(folder / "votes.sqlite") as connection:
        return [row[0] for row in connection.execute("select answer from log order by number")]


def test_the_newest_vote_counts_and_the_same_again_is_one(tmp_path):
    assert read_votes(tmp_path) == [] and not (tmp_path / "votes.sqlite").exists()
    for answer in ("a", "a", "b"):
        record(tmp_path, "ada", "0", "digest", answer, "a")
    record(tmp_path, "bo", "0", "digest", "tie", "b")
    record(tmp_path, "ada", "0", "of other videos", "skip", "a")
    assert counted(tmp_path) == [("ada", "0", "b"), ("bo", "0", "tie"), ("ada", "0", "skip")]
    assert rows(tmp_path) == ["a", "b", "tie", "skip"]


def test_undo_takes_the_last_vote_back_then_the_one_before_and_loses_none(tmp_path):
    for comparison in "012":
        record(tmp_path, "ada", comparison, "d", "a", "a")
    record(tmp_path, "bo", "0", "d", "b", "a")
    assert take_back(tmp_path, "ada", "2", "d", "a")
    assert take_back(tmp_path, "ada", "2", "d", "a"), "a second press of the same undo changes nothing"
    assert not take_back(tmp_path, "ada", "0", "d", "a"), "1 was voted on since"
    assert take_back(tmp_path, "ada", "1", "d", "a")
    assert counted(tmp_path) == [("ada", "0", "a"), ("bo", "0", "b")]
    record(tmp_path, "ada", "2", "d", "b", "a")
    assert counted(tmp_path)[-1] == ("ada", "2", "b")
    assert rows(tmp_path) == ["a", "a", "a", "b", "undo", "undo", "b"]


def test_what_a_rater_skipped_is_asked_again_and_nothing_else(tmp_path):
    for rater in ("ada", "bo"):
        for comparison, answer in (("0", "skip"), ("1", "a"), ("2", "skip")):
            record(tmp_path, rater, comparison, "d", answer, "a")
    take_skips_back(tmp_path, "ada")
    take_skips_back(tmp_path, "ada")
    assert counted(tmp_path) == [("ada", "1", "a"), ("bo", "0", "skip"), ("bo", "1", "a"), ("bo", "2", "skip")]
    assert rows(tmp_path).count("undo") == 2 and rows(tmp_path).count("skip") == 4


def test_a_file_system_without_wal_is_one_line_and_no_wait_without_end(tmp_path, monkeypatch):
    class Refusing(sqlite3.Connection):
        def execute(self, statement, *values):
            return super().execute("select 'delete'" if "journal_mode" in statement else statement, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **named: connect(*given, factory=Refusing, **named))
    with pytest.raises(DataError, match=r"votes cannot be written \(its file system has no write-ahead log\)"):
        record(tmp_path, "ada", "0", "d", "a", "a")


def test_the_file_itself_refuses_to_lose_a_vote(tmp_path):
    record(tmp_path, "ada", "0", "d", "a", "a")
    with sqlite3.connect(tmp_path / "votes.sqlite") as connection:
        for statement in ("delete from log", "update log set answer = 'b'"):
            with pytest.raises(sqlite3.IntegrityError, match="votes"):
                connection.execute(statement)
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)


VOTER = """
import sys
from pathlib import Path
from alignkit.rankers.people.votes import record
folder, rater, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    record(folder, rater, str(number), "d", "a", "a")
    print(number, flush=True)
"""


def voter(folder, rater, count):
    started = subprocess.Popen(
        [sys.executable, "-c", VOTER, folder, rater, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert started.stdout.readline() == b"ready\n"
    return started


def test_a_process_killed_while_it_votes_loses_no_vote_that_it_confirmed(tmp_path):
    process = voter(tmp_path, "ada", 100_000)
    process.stdin.write(b"\n")
    process.stdin.flush()
    confirmed = [int(process.stdout.readline()) for _ in range(25)]
    os.kill(process.pid, signal.SIGKILL)
    confirmed += [int(line) for line in process.stdout.read().splitlines()]  # communicate() leaves out what is buffered
    process.wait()
    kept = {int(vote.comparison) for vote in read_votes(tmp_path)}
    assert set(confirmed) <= kept and len(kept) <= len(confirmed) + 1
    with sqlite3.connect(tmp_path / "votes.sqlite") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    record(tmp_path, "ada", "after", "d", "b", "a")
    assert counted(tmp_path)[-1] == ("ada", "after", "b")


def test_two_processes_that_vote_at_once_into_a_new_file_lose_nothing(tmp_path):
    both = [voter(tmp_path, rater, 20) for rater in ("ada", "bo")]
    for process in both:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sorted(counted(tmp_path)) == sorted((rater, str(n), "a") for rater in ("ada", "bo") for n in range(20))


@pytest.mark.parametrize("content", [b"no database at all, just a text\n" * 40, "another program's", "a folder"])
def test_a_file_that_holds_no_votes_is_one_line_and_stays_as_it_is(tmp_path, content):
    file = tmp_path / "votes.sqlite"
    if content == "a folder":
        file.mkdir()
    elif isinstance(content, str):
        with sqlite3.connect(file) as connection:
            connection.execute("create table log (line text)")
    else:
        file.write_bytes(content)
    before = file.read_bytes() if file.is_file() else None
    for use in (open_votes, read_votes):
        with pytest.raises(DataError, match=r"votes.sqlite: votes cannot be (read|written) \(.*\); .*") as error:
            use(tmp_path)
        assert "\n" not in str(error.value)
    assert before is None or isinstance(content, str) or file.read_bytes() == before


def test_an_empty_file_that_a_crash_left_is_no_obstacle(tmp_path):
    (tmp_path / "votes.sqlite").touch()
    assert read_votes(tmp_path) == []
    record(tmp_path, "ada", "0", "d", "a", "a")
    assert counted(tmp_path) == [("ada", "0", "a")]


def test_votes_in_a_folder_that_nobody_may_write_to_can_be_read(tmp_path):
    record(tmp_path, "ada", "0", "d", "a", "a")
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert counted(tmp_path) == [("ada", "0", "a")]
        with pytest.raises(DataError, match=r"votes.sqlite: votes cannot be written \(.*\); .* can be written to"):
            record(tmp_path, "ada", "1", "d", "a", "a")
    finally:
        tmp_path.chmod(0o755)


def test_a_rater_is_one_person_however_the_name_is_typed():
    assert rater_name("  Ada   Lovelace ") == rater_name("ada lovelace") == "ada lovelace"
    assert rater_name("小林") == "小林"
    for name in ("", "  ", None, 3, "x" * 41, "a\u202eb", "a\x07", "\ud800", ["ada"]):
        with pytest.raises(DataError, match="a vote needs a rater's name"):
            rater_name(name)
