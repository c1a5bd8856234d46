"""`alignkit compare`: what differs between the samples of two runs is said with its chance; unlike ones are refused."""

import json

import numpy as np
import pytest
import torch

from alignkit.config import dump_config, load_config
from alignkit.evaluation.samples import MODELS
from alignkit.files import write_lines
from alignkit.media.videos import write_video
from alignkit.tiny.clips import caption_of
from alignkit.tiny.faults import faulty_clip

COUNT, SEEDS = 6, (0, 1)


@pytest.fixture
def sampled(config_file, tmp_path):
    """`sampled("a", 0.5, "train.steps=3")`: a run's folder with drawn clips for samples; of the aligned ones that share
    is faulty, the base's all are."""

    def write(name: str, share: float, *more: str, prompts: int = COUNT):
        out = tmp_path / name
        config = load_config(config_file, [f"output.dir={out}", f"sample.seeds={list(SEEDS)}", *more])
        rows = []
        for seed in SEEDS:
            for number in range(prompts):
                row = {"seed": seed, "of": "trained"}
                for model in MODELS:
                    faulty = model == "base" or number < share * prompts
                    clip = faulty_clip(7 + seed, number, fault_share=float(faulty), kinds=("glitch",))
                    row |= {"prompt": caption_of(clip.captioned), model: f"{model}/seed{seed}-{number}.mp4"}
                    write_video(out / "samples" / row[model], torch.from_numpy(np.asarray(clip.frames)), 8)
                rows.append(row)
        write_lines(out / "samples" / "samples.jsonl", rows)
        (out / "config.yaml").write_text(dump_config(config))
        return out

    return write


def test_a_run_with_fewer_faults_is_seen_and_what_is_the_same_may_be_chance(sampled, command, tmp_path):
    bad, good = sampled("bad", 1.0), sampled("good", 0.0, "train.learning_rate=2e-6")
    result = command("compare", bad, good, "--out", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    by_name = {each["measure"]: each for each in found["differences"]}
    faults, good_ones = by_name["samples with a fault"], by_name["good samples"]
    assert faults["first"] - faults["second"] > 0.5 and faults["high"] < 0 < good_ones["low"]
    assert found["samples"] == COUNT * len(SEEDS) and found["same_base"]
    assert [*found["settings"]] == ["train.learning_rate"]
    assert "2e-06 in B" in result.stdout
    assert "bases did not draw the same" not in result.stdout
    again = command("compare", good, good)
    assert again.returncode == 0 and again.stdout.count("(may be chance)") == len(by_name)


def test_other_prompts_another_size_and_no_samples_are_refused_in_one_line(sampled, command, tmp_path):
    run = sampled("run", 0.5)
    for other, words in (
        (sampled("fewer", 0.5, prompts=COUNT - 1), "other prompts or seeds"),
        (sampled("smaller", 0.5, "data.height=32", "data.width=32"), "another size"),
        (tmp_path / "nothing", "nothing"),
    ):
        result = command("compare", run, other)
        said = result.stderr.strip().splitlines()
        assert result.returncode == 2 and words in said[-1], result.stderr


def test_bases_that_drew_otherwise_are_said_to(sampled, command):
    one, other = sampled("one", 0.5), sampled("other", 0.5)
    samples = other / "samples"
    (samples / "base" / "seed0-0.mp4").write_bytes((samples / "base" / "seed0-1.mp4").read_bytes())
    assert "the bases did not draw the same" in command("compare", one, other).stdout
