"""Rankers that measure, and those that a user brings."""

import asyncio
import math
import sys
import types

import pytest
import torch

from alignkit.config import RankerSection
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation import scorers
from alignkit.media.videos import write_video
from alignkit.rankers import names, open_ranker
from alignkit.rankers.measures import ByScore
from alignkit.rankers.protocol import Comparison
from alignkit.tiny.clips import caption_of, random_attributes, render_clip
from alignkit.tiny.faults import faulty_clip


def compare(ranker, prompt, a, b):
    return asyncio.run(ranker.compare(prompt, a, b))


def ranker(by, tmp_path):
    return open_ranker(RankerSection(by=by), tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three drawn clips with their captions, and the same with a fault."""
    folder, found = tmp_path_factory.mktemp("drawn"), []
    for number in range(3):
        clean, faulty = render_clip(11, number), faulty_clip(11, number, fault_share=1.0)
        for name, clip in (("clean", clean), ("faulty", faulty)):
            write_video(folder / f"{number}-{name}.mp4", torch.from_numpy(clip.frames), 8)
        found.append((clean.caption, folder / f"{number}-clean.mp4", folder / f"{number}-faulty.mp4"))
    return found


def test_the_small_worlds_ranker_prefers_what_was_prompted_and_is_whole(drawn, tmp_path):
    by = ranker("small_world", tmp_path)
    for caption, clean, faulty in drawn:
        answer = compare(by, caption, clean, faulty)
        assert answer > 0.5 and compare(by, caption, faulty, clean) == pytest.approx(1 - answer)
    (first, one, _), (_, other, _), *_ = drawn
    assert compare(by, first, one, other) > 0.9, "the other clip is of another prompt"


def test_the_small_worlds_ranker_refuses_prompts_that_it_cannot_read(drawn, tmp_path):
    with pytest.raises(DataError, match="knows drawn clips only, not 'a cat on a sofa'"):
        compare(ranker("small_world", tmp_path), "a cat on a sofa", *drawn[0][1:])


def test_motion_and_flicker_are_shares(tmp_path):
    """A square that jumps twice as far changes twice as much; every second frame dark flickers, a still does not."""
    files = {}
    for name, step in (("slow", 4), ("fast", 8)):
        frames = torch.zeros(9, 64, 160, 3, dtype=torch.uint8)
        for t in range(9):
            frames[t, 16:48, 8 + step * t : 40 + step * t] = 200
        files[name] = tmp_path / f"{name}.mp4"
        write_video(files[name], frames, 8)
    assert compare(ranker("motion", tmp_path), "", files["fast"], files["slow"]) == pytest.approx(2 / 3, abs=0.03)
    blinking = torch.full((9, 32, 32, 3), 60, dtype=torch.uint8)
    blinking[::2] = 180
    for name, frames in (("blinking", blinking), ("still", blinking[:1].expand(9, -1, -1, -1))):
        files[name] = tmp_path / f"{name}.mp4"
        write_video(files[name], frames, 8)
    assert compare(ranker("flicker", tmp_path), "", files["still"], files["blinking"]) > 0.99


def test_each_video_is_scored_once_and_together(tmp_path):
    asked = []

    def scores(prompts, files):
        asked.append([file.stem for file in files])
        return [float(file.stem) for file in files]

    by = ByScore("numbers", scores)
    files = [tmp_path / f"{number}.mp4" for number in range(3)]
    comparisons = [Comparison(f"{a}-{b}", "p", files[a], files[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    asyncio.run(by.prepare(comparisons))
    answers = [compare(by, "p", c.video_a, c.video_b) for c in comparisons]
    assert asked == [["0", "1", "2"]]
    assert answers == pytest.approx([1 / (1 + math.exp(d)) for d in (1, 2, 1)])


def test_a_score_that_is_no_number_names_the_video(tmp_path):
    with pytest.raises(DataError, match=r"numbers: scored .*0.mp4 as nan"):
        compare(ByScore("numbers", lambda prompts, files: [math.nan] * 2), "p", tmp_path / "0.mp4", tmp_path / "1.mp4")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_function_is_given_the_prompt_and_both_videos_frames(drawn, tmp_path, monkeypatch, kind):
    seen = []

    def plain(prompt, video_a, video_b):
        seen.append((prompt, video_a.shape, video_a.dtype, (video_a != video_b).any().item()))
        return 0.75

    async def later(prompt, video_a, video_b):
        return plain(prompt, video_a, video_b)

    module = types.ModuleType("my_rankers")
    module.better = plain if kind == "plain" else later
    monkeypatch.setitem(sys.modules, "my_rankers", module)
    caption, clean, faulty = drawn[0]
    assert compare(ranker("my_rankers:better", tmp_path), caption, clean, faulty) == 0.75
    assert seen == [(caption, (17, 48, 48, 3), torch.uint8, True)]


def test_a_function_that_fails_is_one_line(drawn, tmp_path, monkeypatch):
    module = types.ModuleType("my_rankers")
    module.better = lambda *_: 1 / 0
    monkeypatch.setitem(sys.modules, "my_rankers", module)
    with pytest.raises(DataError, match=r"^my_rankers:better: failed on .* \(ZeroDivisionError: division by zero\)$"):
        compare(ranker("my_rankers:better", tmp_path), *drawn[0])


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (None, "ranker.by: not set; one of people, endpoint, small_world"),
        ("nowhere:better", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("small-world", "cannot be imported"),
        ("math:pi", "is no function but float"),
        ("VideoAlign", "is not installed"),
    ],
)
def test_a_ranker_that_is_not_there_is_refused(tmp_path, monkeypatch, by, words):
    monkeypatch.setattr(scorers, "MODULES", dict.fromkeys(scorers.SCORERS, "no_such_module_anywhere"))
    with pytest.raises(ConfigError, match=words) as caught:
        ranker(by, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_published_scorer_ranks_where_it_is_installed(drawn, tmp_path, monkeypatch):
    def score(images, prompt, hps_version):
        return [0.3 if prompt == "good" else 0.2 for _ in images]

    module = types.ModuleType("hpsv2")
    module.__dict__.update(score=score, __spec__=types.SimpleNamespace(name="hpsv2"))
    monkeypatch.setitem(sys.modules, "hpsv2", module)
    assert "HPSv2" in names()
    assert compare(ranker("HPSv2", tmp_path), "good", *drawn[0][1:]) == 0.5


def test_captions_of_the_small_world_are_what_its_ranker_reads():
    assert caption_of(random_attributes(11, 0)) == render_clip(11, 0).caption
