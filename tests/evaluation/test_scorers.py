"""Scorers that do not come with alignkit are asked the way their own documentation does, where they are installed.

None of them can be installed here; stand-ins with the names that are called are put on the path.
"""

import json
import sys
import types

import numpy as np
import pytest
import torch

from alignkit.evaluation import scorers
from alignkit.evaluation.scorers import installed, score
from alignkit.media.videos import write_video


@pytest.fixture
def videos(tmp_path):
    files = [tmp_path / "videos" / f"{number}.mp4" for number in range(2)]
    for number, file in enumerate(files):
        write_video(file, torch.full((9, 16, 16, 3), 100 * number, dtype=torch.uint8), 8)
    return files


def stand_in(monkeypatch, name: str, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members, __spec__=types.SimpleNamespace(name=name), __file__=f"/stand-in/{name}.py")
    monkeypatch.setitem(sys.modules, name, module)


def test_without_any_of_them_nothing_is_scored(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "MODULES", dict.fromkeys(scorers.SCORERS, "no_such_module_anywhere"))
    assert installed() == {} and score(videos, ["a", "b"], tmp_path) == {}


def test_hpsv2_scores_frames_with_the_videos_own_prompt(videos, tmp_path, monkeypatch):
    asked = []

    def pictures(images, prompt, hps_version):
        asked.append((len(images), images[0].size, prompt, hps_version))
        return [np.float32(np.asarray(image).mean() / 1000) for image in images]

    stand_in(monkeypatch, "hpsv2", score=pictures)
    found = score(videos, ["black", "grey"], tmp_path)
    assert asked == [(8, (16, 16), "black", "v2.1"), (8, (16, 16), "grey", "v2.1")]
    assert found["hpsv2.1"] == pytest.approx(0.05, abs=0.002)


def test_vbench_is_given_the_folder_and_each_files_prompt(videos, tmp_path, monkeypatch):
    class Bench:
        def __init__(self, device, full_info, output):
            self.output = output

        def evaluate(self, *, videos_path, name, prompt_list, dimension_list, mode):
            assert videos_path == str(videos[0].parent) and mode == "custom_input"
            assert prompt_list == {str(videos[0]): "a", str(videos[1]): "b"}
            results = {dimension: [0.5, []] for dimension in dimension_list}
            with open(f"{self.output}/{name}_eval_results.json", "w") as stream:
                json.dump(results, stream)

    stand_in(monkeypatch, "vbench", VBench=Bench)
    found = score(videos, ["a", "b"], tmp_path / "work")
    assert found["vbench/imaging_quality"] == 0.5 and len(found) == len(scorers.DIMENSIONS)


def test_videoalign_gives_its_four_numbers(videos, tmp_path, monkeypatch):
    class Rewards:
        def __init__(self, checkpoints, device, dtype):
            assert checkpoints == "/stand-in/checkpoints"

        def reward(self, files, prompts, use_norm):
            assert use_norm and prompts == ["a", "b"]
            return [
                {"VQ": 1.0, "MQ": 2.0, "TA": 3.0, "Overall": 6.0},
                {"VQ": 3.0, "MQ": 2.0, "TA": 1.0, "Overall": 6.0},
            ]

    stand_in(monkeypatch, "inference", VideoVLMRewardInference=Rewards)
    found = score(videos, ["a", "b"], tmp_path)
    assert found == {"videoalign/VQ": 2.0, "videoalign/MQ": 2.0, "videoalign/TA": 2.0, "videoalign/Overall": 6.0}
