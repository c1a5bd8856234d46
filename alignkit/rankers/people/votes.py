"""votes.sqlite: every vote that was ever given, in the order in which they came. Nothing in it is changed or deleted.

For each rater and comparison the newest row counts, so the same vote sent twice counts once; a vote that is taken back
is a row as well. Rows name what was compared, as `digests_of` does: votes about other videos are never taken for these.
"""

import sqlite3
import time
import unicodedata
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import DataError

FILE = "votes.sqlite"
SKIP = "skip"
ANSWERS = ("a", "b", "tie", SKIP)
TAKEN_BACK = "undo"
LONGEST_NAME = 40
SECONDS_TO_WAIT = 10.0  # for another process that is writing

TABLES = (  # the last one there says that all are
    f"""create table if not exists log (
        number integer primary key autoincrement,
        at text not null,
        rater text not null,
        comparison text not null,
        digest text not null,
        answer text not null check (answer in {(*ANSWERS, TAKEN_BACK)}),
        "left" text not null check ("left" in ('a', 'b'))
    )""",
    "create index if not exists newest on log (rater, comparison, digest, number)",
    "create trigger if not exists no_change before update on log begin select raise(abort, 'votes never change'); end",
    "create trigger if not exists no_loss before delete on log begin select raise(abort, 'votes are never lost'); end",
)
STANDING = f"""
select rater, comparison, digest, answer, "left", number from log
where number in (select max(number) from log group by rater, comparison, digest) and answer != '{TAKEN_BACK}'
"""


@dataclass(frozen=True)
class Vote:
    """One that counts. answer: of `ANSWERS`; left: the side, "a" or "b", that was shown on the left; number: of the
    row, so a later vote has a higher one."""

    rater: str
    comparison: str
    digest: str
    answer: str
    left: str
    number: int


def rater_name(text: object) -> str:
    """The name by which a rater's votes are kept: small and capital letters are the same.

    Raises DataError for none, for one longer than `LONGEST_NAME` characters and for one that is no text.
    """
    name = " ".join(unicodedata.normalize("NFKC", text).lower().split()) if isinstance(text, str) else ""
    if not 1 <= len(name) <= LONGEST_NAME or any(unicodedata.category(letter)[0] == "C" for letter in name):
        raise DataError(f"a vote needs a rater's name of 1 to {LONGEST_NAME} letters; give yours on the first page")
    return name


def open_votes(folder: Path) -> None:
    """Make the file if there is none. Raises DataError where it cannot be written or is another program's."""
    with _writing(folder):
        pass


def record(folder: Path, rater: str, comparison: str, digest: str, answer: str, left: str) -> None:
    """Keep a vote. It is on disk when this returns. Raises DataError where it cannot be kept."""
    with _writing(folder) as connection:
        if _standing_answer(connection, rater, comparison, digest) != answer:
            _append(connection, rater, comparison, digest, answer, left)


def take_back(folder: Path, rater: str, comparison: str, digest: str, left: str) -> bool:
    """Take a vote back; one that is taken back already stays so. Raises DataError where that cannot be kept.

    False where the rater has voted on something else since: only the last vote is taken back.
    """
    with _writing(folder) as connection:
        if _standing_answer(connection, rater, comparison, digest) is None:
            return True
        own = [vote for vote in _standing(connection) if vote.rater == rater]
        last = max(own, key=lambda vote: vote.number)
        if (last.comparison, last.digest) != (comparison, digest):
            return False
        _append(connection, rater, comparison, digest, TAKEN_BACK, left)
        return True


def take_skips_back(folder: Path, rater: str) -> None:
    """Have all that the rater has skipped asked again. Raises DataError where that cannot be kept."""
    with _writing(folder) as connection:
        for vote in _standing(connection):
            if vote.rater == rater and vote.answer == SKIP:
                _append(connection, rater, vote.comparison, vote.digest, TAKEN_BACK, vote.left)


def read_votes(folder: Path) -> list[Vote]:
    """The votes that count, oldest first; none where there is no file yet. Nothing is written.

    Raises DataError for a file that holds no votes of ours.
    """
    file = folder / FILE
    if not file.exists():
        return []
    with _one_line(file, "read"), closing(_open_to_read(file)) as connection:
        if not connection.execute("select 1 from sqlite_master").fetchone():
            return []  # made a moment ago
        return sorted(_standing(connection), key=lambda vote: vote.number)


def _open_to_read(file: Path) -> sqlite3.Connection:
    address = file.absolute().as_uri() + "?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=SECONDS_TO_WAIT)
    try:
        connection.execute("select 1 from sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        # SQLite wants to write beside a WAL file even to read it; where it may not, nobody else is writing either.
        connection.close()
        journal = file.with_name(file.name + "-wal")
        if journal.exists() and journal.stat().st_size:
            raise
        return sqlite3.connect(address + "&immutable=1", uri=True)


@contextmanager
def _writing(folder: Path) -> Iterator[sqlite3.Connection]:
    """A transaction that no other process writes beside, and that is on disk when it ends without an error."""
    file = folder / FILE
    with (
        _one_line(file, "written"),
        closing(sqlite3.connect(file, timeout=SECONDS_TO_WAIT, isolation_level=None)) as connection,
    ):
        _use_wal(connection)
        connection.execute("pragma synchronous=full")
        connection.execute("begin immediate")
        if not connection.execute("select 1 from sqlite_master where name = 'no_loss'").fetchone():
            for statement in TABLES:
                connection.execute(statement)
        yield connection
        connection.execute("commit")


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait by itself for another process that makes the same file a WAL one at the same time."""
    end = time.monotonic() + SECONDS_TO_WAIT
    while connection.execute("pragma journal_mode").fetchone()[0] != "wal":
        try:
            if connection.execute("pragma journal_mode=wal").fetchone()[0] != "wal":  # how SQLite says that it cannot
                raise sqlite3.OperationalError("its file system has no write-ahead log")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)


@contextmanager
def _one_line(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise DataError(
            f"{file}: votes cannot be {what} ({error}); if it is no file of votes, move it away, else see that the "
            "folder can be written to and the disk has room"
        ) from None


def _standing(connection: sqlite3.Connection) -> list[Vote]:
    return [Vote(*row) for row in connection.execute(STANDING)]


def _standing_answer(connection: sqlite3.Connection, rater: str, comparison: str, digest: str) -> str | None:
    row = connection.execute(
        "select answer from log where rater = ? and comparison = ? and digest = ? order by number desc limit 1",
        (rater, comparison, digest),
    ).fetchone()
    return None if row is None or row[0] == TAKEN_BACK else row[0]


def _append(connection: sqlite3.Connection, *values: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    connection.execute(
        'insert into log (at, rater, comparison, digest, answer, "left") values (?, ?, ?, ?, ?, ?)', (now, *values)
    )
