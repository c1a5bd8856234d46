"""Whole runs, and the verdict that each deserves: an alignment, a collapse, and one clip."""

import json
import shutil
from pathlib import Path

import pytest

from alignkit.commands import run_command
from alignkit.config import load_config
from alignkit.errors import DataError
from alignkit.tiny.clips import write_clips

CLIPS = 64
# 48 pairs of 64 clips, 16 of which are held out: as few as can be judged.
SIZES = (
    "data.heldout=0.25",
    "pairs.previews=0",
    "train.micro_batch_size=16",
    "train.checkpoint_every=1000",
    "sample.count=16",
    "sample.seeds=[0,1]",
    "sample.num_inference_steps=8",
)


@pytest.fixture(scope="module")
def drawn_pairs(config_file, tmp_path_factory):
    """A folder with 64 drawn clips and the pairs of the demo's kind that the shipped base makes of them."""
    folder = tmp_path_factory.mktemp("drawn")
    write_clips(folder / "clips", CLIPS, 4711)
    run_command("pairs", settings(config_file, folder, "pairs"))
    return folder


def settings(config_file, folder, name: str, *more: str):
    places = f"data.videos={folder / 'clips'}", f"output.dir={folder / name}", f"pairs.folder={folder / 'stored'}"
    return load_config(config_file, [*places, *SIZES, *more])


def summary_of(config, drawn: Path) -> dict:
    """drawn: where the samples of the base are kept, which are the same for every run."""
    run_command("train", config)
    base = config.output.dir / "samples" / "base"
    if drawn.exists():
        shutil.copytree(drawn, base)
    run_command("sample", config)
    if not drawn.exists():
        shutil.copytree(base, drawn)
    run_command("eval", config)
    return json.loads((config.output.dir / "summary.json").read_text())


def test_an_alignment_on_drawn_clips_is_reached(config_file, drawn_pairs):
    config = settings(config_file, drawn_pairs, "aligned", "train.steps=16")
    summary = summary_of(config, drawn_pairs / "base")
    failed = [check["text"] for check in summary["criteria"] if not check["reached"]]
    assert summary["verdict"] == "reached" and summary["reached"] is True, failed
    for name in ("fault_rate", "prompt_following"):
        assert summary[name].keys() == {"base", "aligned", "interval", "samples"} and summary[name]["samples"] == 32
    assert summary["fault_rate"]["aligned"] <= summary["fault_rate"]["base"] / 2


def test_a_collapse_is_not_reached(config_file, drawn_pairs):
    """A rate that ruins the network in a few steps: pairs may be told apart all the same."""
    collapse = "objective={beta: 5000, strength_range: [0.75, 1.0]}", "train.learning_rate=1e-3", "train.steps=8"
    summary = summary_of(settings(config_file, drawn_pairs, "collapsed", *collapse), drawn_pairs / "base")
    assert summary["verdict"] == "not reached" and summary["unjudged"] == []
    failed = {check["name"] for check in summary["criteria"] if not check["reached"]}
    assert {"winner error", "Fréchet distance"} <= failed


def test_one_clip_is_refused_with_what_a_verdict_needs(config_file, tmp_path):
    write_clips(tmp_path / "clips", 1, 4711)
    with pytest.raises(DataError, match=r"1 usable of 1 .*16 held out for a verdict"):
        run_command("pairs", settings(config_file, tmp_path, "one"))
    assert not (tmp_path / "stored").exists()
