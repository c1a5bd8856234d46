"""Prompts for rollouts: from texts and tables, and what is wrong with them is named with its line."""

import json

import pytest

from alignkit.apo.prompts import read_prompts
from alignkit.errors import DataError

PROMPTS = ["a red circle", "a blue square, on stripes", "ein grünes Dreieck"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "a red circle\na blue square, on  stripes \r\nein grünes Dreieck"),
        ("prompts.txt", "\ufeffa red circle\na blue square, on stripes\nein grünes Dreieck\n"),
        ("prompts.jsonl", lines(*({"prompt": prompt} for prompt in PROMPTS))),
        ("both.jsonl", lines(*({"caption": "another", "prompt": prompt} for prompt in PROMPTS))),
        ("captions.jsonl", lines(*({"video": f"{i}.mp4", "caption": p} for i, p in enumerate(PROMPTS)))),
        (
            "captions.csv",
            'video,text\n0.mp4,a red circle\n1.mp4,"a blue square, on stripes"\n2.mp4,ein grünes Dreieck\n',
        ),
    ],
)
def test_prompts_come_from_texts_and_captions_files(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n", "p.txt:1: the prompt is empty"),
        ("p.txt", "a\n \nb\n", "p.txt:2: the prompt is empty"),
        ("p.txt", "a\nb\n a  \n", "p.txt:3: the same prompt as line 1"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", lines({"prompt": "a"}, {"prompt": ""}), "p.jsonl:2: the prompt is empty"),
        ("p.jsonl", lines({"prompt": "a"}, {"caption": "a"}), "p.jsonl:2: the same prompt as line 1"),
        ("p.jsonl", lines({"prompt": "a"}, {"promt": "b"}), "p.jsonl:2: holds no prompt .one of: prompt"),
        ("p.jsonl", lines({"prompt": 5}), "p.jsonl:1: the prompt is not a text but 5"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "p.jsonl:2: is not JSON"),
        ("p.jsonl", '"a"\n', "p.jsonl:1: is not a JSON object"),
        ("p.csv", "prompt\na\n\nb\na\n", "p.csv:5: the same prompt as line 2"),
        ("p.csv", "words\na\n", "p.csv:2: holds no prompt"),
        ("p.yaml", "- a", "expected .txt, .jsonl or .csv"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(file)
    assert "data.prompts" in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.prompts: not set"):
        read_prompts(None)
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=name):
            read_prompts(tmp_path / name)
