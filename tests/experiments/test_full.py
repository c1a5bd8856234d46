"""The experiment on a configuration's own model: the code that a full-size folder takes, on one of random weights."""

import json

import pytest
import torch
import yaml

from alignkit.errors import CheckpointError, ConfigError
from alignkit.experiments import full
from alignkit.models import shipped_model
from alignkit.tiny.clips import write_clips
from alignkit.tiny.recipes import recipe_of

SMALL = {
    "data": {"height": 32, "width": 32, "num_frames": 9, "heldout": 0.4},
    "pairs": {"num_inference_steps": 4, "strengths": [3], "batch_size": 4, "previews": 0},
    "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "checkpoint_every": 2, "learning_rate": 1e-5},
    "sample": {"num_inference_steps": 2, "count": 2, "seeds": [0], "batch_size": 2},
    "evaluation": {"positions": [0.5]},
}


@pytest.fixture
def random_folder(tmp_path):
    """A diffusers folder with the tiny Wan's parts and a network that nobody trained."""
    recipe = recipe_of("wan")
    torch.manual_seed(0)
    pipeline = recipe.PIPELINE.from_pretrained(shipped_model("wan"), transformer=recipe.new_transformer())
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_arm_runs_on_a_folder_and_is_scored_and_a_second_run_makes_nothing_again(
    random_folder, tmp_path, monkeypatch
):
    write_clips(tmp_path / "clips", 5, 7)
    file = tmp_path / "full.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"family": "wan", "path": str(random_folder), "max_sequence_length": 64},
                "objective": {"beta": 500},
            }
            | SMALL
            | {"output": {"dir": "elsewhere"}}
        )
    )
    asked = []

    def judge_them(videos, prompts, work):
        assert all(video.exists() for video in videos) and len(prompts) == len(videos) == 2
        asked.append(videos[0].parent.name)
        return {"score": float(len(asked))}

    monkeypatch.setattr(full, "score", judge_them)
    page = full.run(file, tmp_path / "out", [f"data.videos={tmp_path / 'clips'}"])
    assert asked == ["base", "aligned", "aligned", "aligned"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["base", "sft", "dpo", "local_dpo"]
    assert [row["score"] for row in results.values()] == [1, 2, 3, 4]
    assert results["base"]["region_accuracy"] == 0.5 and all(row["winner_error"] > 0 for row in results.values())
    for title in ("base", "SFT", "DPO on the local pairs", "LocalDPO"):
        assert f"| {title} |" in page.read_text()
    for arm, name in (("sft", "sft"), ("dpo", "dpo"), ("local_dpo", "local_dpo")):
        config = yaml.safe_load((tmp_path / "out" / arm / "config.yaml").read_text())
        assert config["objective"]["name"] == name
    assert (tmp_path / "out" / "pairs").is_dir() and not (tmp_path / "out" / "sft" / "pairs").exists()
    monkeypatch.setattr(full, "run_command", lambda *_: pytest.fail("made again"))
    full.run(file, tmp_path / "out", [f"data.videos={tmp_path / 'clips'}"])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"train\.learning_rate = 1e-05, now it is 0\.01"):
        full.run(file, tmp_path / "out", [f"data.videos={tmp_path / 'clips'}", "train.learning_rate=1e-2"])


def test_a_configuration_of_something_else_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text("objective: {name: dpo}\noutput: {dir: runs}\n")
    with pytest.raises(ConfigError, match="takes a configuration of LocalDPO"):
        full.run(file, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
