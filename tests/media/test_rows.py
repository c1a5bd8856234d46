"""Tables that users write: no value is lost or cut without a word."""

import pyarrow
import pyarrow.parquet
import pytest

from alignkit.errors import DataError
from alignkit.media.rows import read_table


def test_a_key_that_stands_twice_in_a_line_is_said_and_the_others_are_read(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text(
        '{"video": "a.mp4", "caption": "red", "caption": "blue"}\n{"video": "b.mp4", "more": {"k": 1, "k": 2}}\n'
    )
    table = read_table(file, "captions file", (".jsonl", ".csv"))
    assert [line for line, _ in table.rows] == [1, 2]
    assert [row for _, row in table.rows] == [
        "holds the key 'caption' twice; keep one",
        "holds the key 'k' twice; keep one",
    ]


def test_a_field_of_a_csv_may_be_of_any_length(tmp_path):
    """Python's own limit is 131,072 characters."""
    text = "word " * 40_000
    file = tmp_path / "captions.csv"
    file.write_text(f'video,caption\na.mp4,"{text}"\n')
    assert read_table(file, "captions file", (".jsonl", ".csv")).rows == [(2, {"video": "a.mp4", "caption": text})]


@pytest.mark.parametrize(
    "text, lines",
    [
        ('prompt,chosen,rejected\n"a cat,a.mp4,b.mp4\ntwo,c.mp4,d.mp4\nthree",e.mp4,f.mp4\nfour,g.mp4,h.mp4\n', [4]),
        ('video,caption\na.mp4,"a cat\nb.mp4,a dog"\nc.mp4,a cow\n', [3]),
        ('caption,video\n"a cat,a.mp4\ra dog",b.mp4\r', [3]),
        ('video,caption\na.mp4,"a cat,\nin the style of clip.mp4"\n', []),
        ('video,caption,more\na.mp4,a cat,"{""from"": ""b.mp4"",\n""fps"": 8}"\n', []),
    ],
)
def test_a_quote_that_is_missing_swallows_no_rows(tmp_path, text, lines):
    (tmp_path / "t.csv").write_bytes(text.encode())
    rows = read_table(tmp_path / "t.csv", "captions file", (".jsonl", ".csv")).rows
    assert [line for line, row in rows if isinstance(row, str)] == lines
    assert all("a double quote is missing" in row for _, row in rows if isinstance(row, str))


def test_a_column_that_stands_twice_is_said_of_parquet_as_of_csv(tmp_path):
    file = tmp_path / "pairs.parquet"
    table = pyarrow.table([["a"], ["b"], ["c"], ["c"]], names=["prompt", "chosen", "more", "more"])
    pyarrow.parquet.write_table(table, file)
    assert read_table(file, "pairs", (".parquet",), ("prompt", "chosen")).rows == [(1, {"prompt": "a", "chosen": "b"})]
    with pytest.raises(DataError, match=r"pairs .*pairs\.parquet: has two columns with the name 'more'$"):
        read_table(file, "pairs", (".parquet",), ("prompt", "more"))
