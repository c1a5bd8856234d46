"""Tables that users write: no value is lost or cut without a word."""

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
