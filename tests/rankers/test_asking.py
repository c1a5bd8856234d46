"""Asking: every answer is kept, none is asked for twice, and what is no answer is one line."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from alignkit.errors import DataError
from alignkit.media.videos import write_video
from alignkit.rankers.asking import ask, read_answers
from alignkit.rankers.protocol import Comparison


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_video(folder / f"{number}.mp4", torch.full((3, 16, 16, 3), 40 * number, dtype=torch.uint8), 8)
    sides = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    return [Comparison(f"{a}-{b}", "a prompt", folder / f"{a}.mp4", folder / f"{b}.mp4") for a, b in sides]


class Scripted:
    """Answers from a list; counts what it is asked and how many questions were open at once."""

    def __init__(self, *answers, who="scripted", at_once=1):
        self.who, self.at_once, self.answers = who, at_once, list(answers)
        self.asked, self.open, self.most = [], 0, 0

    async def prepare(self, comparisons):
        self.prepared = [c.id for c in comparisons]

    async def compare(self, prompt, video_a, video_b):
        self.asked.append(f"{video_a.stem}-{video_b.stem}")
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.01)
        self.open -= 1
        answer = self.answers.pop(0) if self.answers else 0.5
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_answer_is_asked_for_once_and_stored_with_who_gave_it(comparisons, tmp_path):
    file, first = tmp_path / "answers.jsonl", Scripted(1, 0.25)
    found = ask(first, comparisons[:2], file, show=False)
    assert found == {"0-1": 1.0, "0-2": 0.25} and first.prepared == ["0-1", "0-2"]
    again, other = Scripted(0), Scripted(0, 0, 0, who="another")
    assert ask(again, comparisons[:3], file, show=False) == {"0-1": 1.0, "0-2": 0.25, "0-3": 0.0}
    assert again.asked == again.prepared == ["0-3"]
    assert ask(other, comparisons[:3], file, show=False) == dict.fromkeys(("0-1", "0-2", "0-3"), 0.0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stored = [(row["id"], row["who"], row["p"]) for row in rows[:2]]
    assert stored == [("0-1", "scripted", 1.0), ("0-2", "scripted", 0.25)]


def test_an_answer_about_other_videos_or_another_prompt_is_not_taken(comparisons, tmp_path):
    file = tmp_path / "answers.jsonl"
    ask(Scripted(1), comparisons[:1], file, show=False)
    first = comparisons[0]
    for changed in (
        Comparison(first.id, "another prompt", first.video_a, first.video_b),
        Comparison(first.id, first.prompt, first.video_b, first.video_a),
        Comparison(first.id, first.prompt, first.video_a, comparisons[1].video_b),
    ):
        asked = Scripted(0)
        assert ask(asked, [changed], file, show=False) == {first.id: 0.0} and asked.asked


@pytest.mark.parametrize("answer", [math.nan, None, -0.1, 1.1, math.inf, "0.5", True, [0.5]])
def test_what_is_no_probability_is_refused_in_one_line_and_the_rest_is_kept(comparisons, tmp_path, answer):
    file = tmp_path / "answers.jsonl"
    with pytest.raises(DataError, match=r"^scripted: answered .* about 0.mp4 and 2.mp4; .* from 0 to 1$"):
        ask(Scripted(1, answer), comparisons[:3], file, show=False)
    assert len(read_answers(file)) == 1
    assert ask(Scripted(0, 0), comparisons[:3], file, show=False)["0-1"] == 1.0


def test_only_so_many_are_open_at_once_and_an_error_ends_all_of_them(comparisons, tmp_path):
    ranker = Scripted(at_once=3)
    assert len(ask(ranker, comparisons, tmp_path / "a.jsonl", show=False)) == 6 and ranker.most == 3
    failing = Scripted(DataError("the ranker is gone"), 1, at_once=2)
    with pytest.raises(DataError, match="the ranker is gone"):
        ask(failing, comparisons, tmp_path / "b.jsonl", show=False)
    assert len(failing.asked) <= 3 and len(read_answers(tmp_path / "b.jsonl")) >= 1, "what was under way is kept"


def test_answers_stand_in_the_order_of_the_questions_however_they_come_in(comparisons, tmp_path):
    """Pairs get their numbers, and so their noise, by it."""

    class Slower(Scripted):
        async def compare(self, prompt, video_a, video_b):
            self.asked.append(prompt)
            await asyncio.sleep(0.06 - 0.01 * len(self.asked))
            return 1.0

    found = ask(Slower(at_once=6), comparisons, tmp_path / "a.jsonl", show=False)
    assert list(found) == [c.id for c in comparisons]
    assert list(ask(Scripted(), comparisons, tmp_path / "a.jsonl", show=False)) == list(found)


def test_a_line_that_a_crash_cut_off_is_asked_for_again_and_any_other_damage_is_said(comparisons, tmp_path):
    file = tmp_path / "answers.jsonl"
    ask(Scripted(1, 1), comparisons[:2], file, show=False)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    again = Scripted(0)
    assert ask(again, comparisons[:2], file, show=False) == {"0-1": 1.0, "0-2": 0.0} and again.asked == ["0-2"]
    assert len(read_answers(file)) == 2
    file.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(DataError, match=r"answers.jsonl:1: is no answer of a ranker"):
        ask(Scripted(), comparisons[:2], file, show=False)


def test_a_video_that_is_gone_is_one_line(comparisons, tmp_path):
    gone = Comparison("x", "a prompt", tmp_path / "none.mp4", comparisons[0].video_b)
    with pytest.raises(DataError, match=r"none.mp4: a video to be ranked cannot be read"):
        ask(Scripted(), [gone], tmp_path / "a.jsonl", show=False)


def test_a_killed_process_has_kept_every_answer_that_it_was_given(comparisons, tmp_path):
    code = f"""
import asyncio, pathlib
from alignkit.rankers.asking import ask
from alignkit.rankers.protocol import Comparison
class Slow:
    who, at_once = "scripted", 1
    async def prepare(self, comparisons): pass
    async def compare(self, prompt, a, b):
        print("asked", flush=True)
        await asyncio.sleep(0.05)
        return 1.0
sides = {[(c.id, str(c.video_a), str(c.video_b)) for c in comparisons]!r}
ask(Slow(), [Comparison(i, "a prompt", pathlib.Path(a), pathlib.Path(b)) for i, a, b in sides],
    pathlib.Path({str(tmp_path / "answers.jsonl")!r}), show=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    for _ in range(4):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.05)
    rest = Scripted(0, 0, 0)
    found = ask(rest, comparisons, tmp_path / "answers.jsonl", show=False)
    assert list(found.values()).count(1.0) >= 3 and len(rest.asked) == 6 - list(found.values()).count(1.0)
