"""Whether a base knows the videos it is to be aligned on: said before anything slow starts, and by the verdict."""

import json
import types

import numpy as np
import pytest
import torch

from alignkit.commands import run_command
from alignkit.config import load_config
from alignkit.evaluation.readiness import LEAST_EXPLAINED, explained_share
from alignkit.media.videos import write_video
from alignkit.tiny.clips import render_clip
from alignkit.tiny.recipes import recipe_of


def filmed(seed: int, frames: int = 17, size: int = 48) -> torch.Tensor:
    """A video of what no tiny model has seen: smooth textures that drift, uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(24, 3)) * (0.25, 0.35, 0.35)
    phases, colours = rng.uniform(0, 6.28, 24), rng.normal(size=(24, 3))
    t, y, x = np.meshgrid(np.arange(frames), np.arange(size), np.arange(size), indexing="ij")
    picture = sum(
        np.cos(w[0] * t + w[1] * y + w[2] * x + p)[..., None] * c
        for w, p, c in zip(waves, phases, colours, strict=True)
    )
    return torch.from_numpy(np.clip(128 + 30 * picture, 0, 255).astype(np.uint8))


def text_of(model, captions: list[str]) -> torch.Tensor:
    return model.pad_text(model.encode_text(captions))


@pytest.fixture(scope="module")
def drawn():
    clips = [render_clip(777, index) for index in range(4)]
    return torch.from_numpy(np.stack([clip.frames for clip in clips])), [clip.caption for clip in clips]


def test_a_base_explains_the_videos_it_knows_and_no_others(wan, drawn):
    clips, captions = drawn
    known = explained_share(wan, wan.encode_video(clips), text_of(wan, captions))
    other = torch.stack([filmed(seed) for seed in range(4)])
    unknown = explained_share(wan, wan.encode_video(other), text_of(wan, ["a street in the rain"] * 4))
    assert known > LEAST_EXPLAINED + 0.2 and unknown < LEAST_EXPLAINED - 0.1


def test_a_network_that_guesses_blindly_explains_nothing(wan, drawn):
    """The best linear guess from the noisy state, which the share is measured against, itself has the share 0."""
    _, captions = drawn
    latents = torch.randn(4, 8, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    variance = latents.double().square().mean().item()

    def guess(hidden_states, timestep, **given):
        schedule = wan.schedule(50)
        row = int((schedule.timesteps - timestep[0]).abs().argmin())
        a, s, c, d = schedule.coefficients[row].double().tolist()
        return (hidden_states * ((a * d * variance + s * c) / (a * a * variance + s * s)),)

    class Guess(torch.nn.Module):
        config = recipe_of("wan").new_transformer().config

        def forward(self, *arguments, **given):
            return guess(*arguments, **given)

    blind = types.SimpleNamespace(family="wan", dtype=wan.dtype, schedule=wan.schedule, transformer=Guess())
    # 4 clips x 5760 elements: a variance's deviation is √(2/23040) = 0.9 %; four positions average that.
    assert abs(explained_share(blind, latents, text_of(wan, captions))) < 0.03


def six_clips(folder, make) -> None:
    folder.mkdir()
    for number in range(6):
        write_video(folder / f"{number}.mp4", make(number), 8)
    rows = [{"video": f"{number}.mp4", "caption": "a street in the rain"} for number in range(6)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_six_filmed_clips_are_said_to_be_unjudged_before_a_pair_is_made_and_by_the_verdict(
    overrides, config_file, tmp_path, capsys, monkeypatch
):
    six_clips(tmp_path / "clips", filmed)
    more = (f"data.videos={tmp_path / 'clips'}", "data.heldout=0.4", "data.height=48", "data.width=48", "train.steps=1")
    config = load_config(config_file, overrides(tmp_path / "run", *more, "data.num_frames=17"))
    run_command("pairs", config)
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    reasons = [number for number, line in enumerate(lines) if "this alignment cannot be judged" in line]
    assert len(reasons) == 2
    first_pair = next(number for number, line in enumerate(lines) if "making" in line)
    assert max(reasons) < first_pair
    assert any("model.path" in lines[number] for number in reasons) and any("data.heldout" in lines[n] for n in reasons)
    for name in ("train", "sample", "eval"):
        run_command(name, config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["verdict"] == "cannot be judged" and summary["reached"] is False and len(summary["unjudged"]) == 2
    assert summary["fault_rate"] is None and summary["prompt_following"] is None
