import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignkit.errors import DataError
from alignkit.given.preferences import Preference, read_preferences

ROWS = [
    {"prompt": "a  cat,\nrunning", "chosen": "good/a.mp4", "rejected": "bad/a.mp4", "mask": None},
    {"prompt": "a dog", "chosen": "/elsewhere/b.mp4", "rejected": "bad/b.mp4", "mask": "masks/b"},
]


def jsonl(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict]) -> Path:
    """The same table in the format that the file's name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        cells = [[f'"{value}"' if value else "" for value in row.values()] for row in rows]
        path.write_text("\n".join(",".join(line) for line in [list(rows[0]), *cells]))
    else:
        jsonl(path, *rows)
    return path


def bad_text() -> bytes:
    """A Parquet file whose prompts are no UTF-8."""
    prompt = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 2], dtype="int32")), pyarrow.py_buffer(b"\xff\xfe")]
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "chosen": ["x"], "rejected": ["y"]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name, first", [("pairs.jsonl", 1), ("pairs.csv", 3), ("pairs.parquet", 1)])
def test_every_format_gives_the_same_rows_with_paths_beside_the_file(tmp_path, name, first):
    preferences, problems = read_preferences(write(tmp_path / name, ROWS))
    chosen, rejected = tmp_path / "good" / "a.mp4", tmp_path / "bad" / "a.mp4"
    assert problems == []
    assert preferences == [
        Preference(0, f"{name}:{first}", "a cat, running", chosen, rejected, None),
        Preference(
            1, f"{name}:{first + 1}", "a dog", Path("/elsewhere/b.mp4"), tmp_path / "bad/b.mp4", tmp_path / "masks/b"
        ),
    ]


def test_mask_column_may_be_absent_and_other_columns_are_ignored(tmp_path):
    row = {"prompt": "a", "chosen": "x.mp4", "rejected": "y.mp4", "score": 3}
    preferences, problems = read_preferences(write(tmp_path / "pairs.parquet", [row]))
    assert preferences[0].mask is None and problems == []


@pytest.mark.parametrize(
    "bad, reason",
    [
        ('{"prompt": "a", "chosen', "is not JSON"),
        ('["a", "x.mp4", "y.mp4"]', "is not a JSON object"),
        ({"chosen": "x.mp4", "rejected": "y.mp4"}, "has no prompt"),
        ({"prompt": "a", "chosen": None, "rejected": "y.mp4"}, "has no chosen"),
        ({"prompt": "a", "chosen": "x.mp4", "rejected": ["y.mp4"]}, r"its rejected is not a text but \['y.mp4'\]"),
        ({"prompt": "half \ud83d", "chosen": "x.mp4", "rejected": "y.mp4"}, "its prompt holds half a character"),
        ({"prompt": " \n", "chosen": "x.mp4", "rejected": "y.mp4"}, "its prompt is empty"),
        ({"prompt": "a", "chosen": "", "rejected": "y.mp4"}, "its chosen is empty"),
        ({"prompt": "a", "chosen": "x.mp4", "rejected": "y.mp4", "mask": 7}, "its mask is not a text but 7"),
        ({"prompt": "a", "chosen": "x.mp4", "rejected": "y.mp4", "mask": 0}, "its mask is not a text but 0"),
        ({"prompt": "a", "chosen": "x.mp4", "rejected": "y.mp4", "mask": False}, "its mask is not a text but False"),
    ],
)
def test_bad_line_is_reported_and_does_not_move_the_numbers_of_the_others(tmp_path, bad, reason):
    preferences, problems = read_preferences(jsonl(tmp_path / "pairs.jsonl", ROWS[0], "", bad, ROWS[1]))
    assert [(row.number, row.where) for row in preferences] == [(0, "pairs.jsonl:1"), (2, "pairs.jsonl:4")]
    assert [problem.video for problem in problems] == ["pairs.jsonl:3"]
    assert re.match(reason, problems[0].reason)


def test_csv_line_with_an_unquoted_comma_is_reported_not_shifted(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,chosen,rejected\na cat, running,x.mp4,y.mp4\na dog,x.mp4,y.mp4,\na cow,x.mp4\n")
    preferences, problems = read_preferences(file)
    assert [row.prompt for row in preferences] == ["a dog"]
    reasons = {problem.video: problem.reason for problem in problems}
    assert reasons["pairs.csv:2"].startswith("has more values than there are columns")
    assert reasons["pairs.csv:4"] == "has no rejected"


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_csv_lines_end_only_where_csv_lines_end(tmp_path, character):
    """Python's own writer leaves these unquoted, and str.splitlines divides at them."""
    file = tmp_path / "pairs.csv"
    file.write_text(f"prompt,chosen,rejected\na cat{character}running,x.mp4,y.mp4\n", encoding="utf-8")
    preferences, problems = read_preferences(file)
    assert [row.prompt for row in preferences] == ["a cat running"] and problems == []


def test_csv_as_people_write_it(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text(
        '\n\nprompt, chosen, rejected, mask\r\n"a cat, running", x.mp4, y.mp4, \r\na 2" nail,x.mp4,y.mp4\r\n'
    )
    preferences, problems = read_preferences(file)
    assert [(row.prompt, row.chosen.name, row.mask) for row in preferences] == [
        ("a cat, running", "x.mp4", None),
        ('a 2" nail', "x.mp4", None),
    ]
    assert problems == []


def test_parquet_columns_that_are_not_asked_for_may_hold_anything(tmp_path):
    far = pyarrow.array([2**52], pyarrow.timestamp("ms"))  # no Python date
    columns = {"prompt": ["a"], "chosen": ["x.mp4"], "rejected": ["y.mp4"], "filmed": far}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    preferences, problems = read_preferences(tmp_path / "pairs.parquet")
    assert len(preferences) == 1 and problems == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_missing_column_names_what_was_found_and_what_is_needed(tmp_path, suffix):
    file = write(tmp_path / f"pairs.{suffix}", [{"prompt": "a", "winner": "x.mp4", "rejected": "y.mp4"}])
    message = "it has the columns prompt, winner, rejected; prompt, chosen, rejected are needed"
    with pytest.raises(DataError, match=message) as error:
        read_preferences(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("pairs.jsonl", None, "cannot be read as UTF-8 text"),
        ("pairs.csv", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("pairs.parquet", None, "cannot be read as Parquet"),
        ("pairs.parquet", b"PAR1 and then nothing", "cannot be read as Parquet"),
        ("pairs.txt", b"", r"expected \.jsonl, \.csv or \.parquet, not '\.txt'"),
        ("pairs.jsonl", b"", r"columns \(none\); prompt, chosen, rejected are needed"),
        ("pairs.jsonl", b"hello\nthere", r"columns \(none\).*pairs\.jsonl:1: is not JSON.* and 1 more such lines"),
        ("pairs.csv", b"prompt,chosen,rejected\n", "holds no row that can be used"),
        ("pairs.csv", b'prompt,chosen,rejected\n"a,x,y\nb,x,y\n', "line 3: unexpected end of data"),
        ("pairs.csv", b"prompt,chosen,chosen,rejected\n", "two columns with the name 'chosen'"),
        ("pairs.jsonl", b"[" * 100_000, r"pairs\.jsonl:1: is not JSON"),
        ("pairs.parquet", bad_text(), "cannot be read as Parquet"),
        (
            "pairs.csv",
            b"prompt,chosen,rejected\n,x,y\n",
            r"no row that can be used \(pairs\.csv:2: its prompt is empty\)",
        ),
    ],
)
def test_file_that_cannot_be_used_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_preferences(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_no_file_system_takes_is_one_rows_problem(tmp_path):
    strange = {"prompt": "a", "chosen": "x" * 5000 + ".mp4", "rejected": "b\0.mp4"}
    table = jsonl(tmp_path / "pairs.jsonl", strange, {"prompt": "b", "chosen": "1.mp4", "rejected": "2.mp4"})
    preferences, _ = read_preferences(table)
    assert [row.prompt for row in preferences] == ["a", "b"]


def test_a_tilde_is_the_users_folder_unless_there_is_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.mp4").touch()
    row = {"prompt": "a", "chosen": " ~/a.mp4", "rejected": "~/b.mp4", "mask": "~nobody-here/m.npy"}
    ((preference,), _) = read_preferences(jsonl(tmp_path / "pairs.jsonl", row))
    assert preference.chosen == tmp_path / "home" / "a.mp4"
    assert preference.rejected == tmp_path / "~" / "b.mp4"
    assert preference.mask == tmp_path / "~nobody-here" / "m.npy"


@pytest.mark.parametrize("column", ["masks", "Mask", "msk"])
def test_a_column_that_is_nearly_called_mask_is_not_ignored(tmp_path, column):
    row = {"prompt": "a", "chosen": "x.mp4", "rejected": "y.mp4"}
    with pytest.raises(DataError, match=rf"unknown column '{column}'; did you mean 'mask'"):
        read_preferences(jsonl(tmp_path / "pairs.jsonl", row, row | {column: "m.png"}))
    others = {"task": 1, "mask_area": 2, "chosen_score": 3, "": 4}
    assert not read_preferences(jsonl(tmp_path / "pairs.jsonl", row | others))[1]
