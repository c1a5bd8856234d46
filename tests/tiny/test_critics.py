"""The judge and the ranker: what they get right on clips that they have not seen, and that they are two."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.errors import ModelError
from alignkit.tiny import classifier, critics, detector
from alignkit.tiny.classifier import NAMED, classify
from alignkit.tiny.clips import render_clip
from alignkit.tiny.critics import (
    HELD_OUT_SEED,
    ROLES,
    WITHHELD,
    Training,
    faulty_cells,
    labelled_rates,
    through_vae,
    train_detector,
)
from alignkit.tiny.detector import fault_maps, fault_scores, load_detector
from alignkit.tiny.faults import KINDS, faulty_clip
from alignkit.tiny.recipes import FAMILIES
from alignkit.tiny.vae import to_unit

LABELLED = Path(__file__).parent / "labelled"


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return np.stack([render_clip(HELD_OUT_SEED, index).frames for index in range(40)])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_few_clean_clips_are_called_faulty_also_after_a_vae(role, family, clean):
    assert (fault_scores(clean, role) > 0.5).sum() <= 2
    assert (fault_scores(through_vae(family, clean, 0), role) > 0.5).sum() <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_finds_each_kind_of_fault_and_its_place(kind):
    clips = [faulty_clip(HELD_OUT_SEED + 1, index, kinds=(kind,)) for index in range(24)]
    frames = np.stack([clip.frames for clip in clips])
    assert (fault_scores(frames) > 0.5).mean() > 0.85
    maps = fault_maps(frames)
    assert maps.shape == (24, 5, 12, 12) and maps.min() >= 0 and maps.max() <= 1
    inside = []
    for clip, cells in zip(clips, maps, strict=True):
        t, y, x = np.unravel_index(int(cells.argmax()), (5, 12, 12))
        near = clip.where[max(0, 4 * t - 4) : 4 * t + 4, max(0, 4 * y - 4) : 4 * y + 8, max(0, 4 * x - 4) : 4 * x + 8]
        inside.append(near.any())
    assert np.mean(inside) > 0.85, "the strongest cell lies on the fault, or beside it"


def test_the_ranker_has_never_seen_one_kind_and_shares_nothing_with_the_judge():
    judge, ranker = ROLES["judge"], ROLES["ranker"]
    assert judge.seed != ranker.seed and WITHHELD in judge.kinds and WITHHELD not in ranker.kinds
    assert set(ranker.kinds) == set(KINDS) - {WITHHELD}
    for module in (classifier, detector):
        assert module.WIDTHS["judge"] != module.WIDTHS["ranker"] and module.FILES["judge"] != module.FILES["ranker"]


def test_the_ranker_names_unseen_clips(clean):
    wanted = [render_clip(HELD_OUT_SEED, index).attributes for index in range(40)]
    named = classify(through_vae("wan", clean, 0), "ranker")
    for name in NAMED:
        assert sum(got == entry[name] for got, entry in zip(named[name], wanted, strict=True)) >= 37, name


def test_the_judge_agrees_with_a_persons_labels_in_most_samples():
    """100 samples of both bases. That the rates agree matters: whoever compares rates needs no more."""
    found = labelled_rates(LABELLED, "judge")
    assert found["labelled"] == 100
    assert abs(found["labelled_faulty_seen"] - found["labelled_faulty"]) <= 0.1
    assert found["labelled_hit"] >= 0.7 and found["labelled_false_alarms"] <= 0.3
    assert found["labelled_followed_agree"] >= 0.8


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ('{"video": "a.mp4", "prompt": "a cat", "fault": true, "followed": true}', "no drawn clip has the prompt"),
        ('{"video": "a.mp4", "prompt": "a cat", "fault": "no", "followed": true}', "fault should be true or false"),
        ('{"video": "a.mp4"}', "prompt should be a text"),
        ("{", "is not JSON"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_read_are_named_by_their_line(tmp_path, capsys, row, line):
    (tmp_path / "labels.jsonl").write_text(row + "\n")
    assert critics.main(["--role", "judge", "--labels", str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: \S+labels\.jsonl: line 1: {re.escape(line)}.*\n", capsys.readouterr().err)


def test_a_detector_learns_where_the_faults_of_its_clips_are(tmp_path, monkeypatch):
    """The same eight clips over and over: after some steps it tells them apart, by place too."""
    monkeypatch.setattr("alignkit.tiny.critics.BATCH", 8)
    training = Training(seed=1, kinds=("glitch",), steps=150)  # the rate rises for the first 100
    made = [faulty_clip(1, index, fault_share=0.5, kinds=("glitch",)) for index in range(8)]
    frames, cells = (
        np.stack([c.frames for c in made]),
        faulty_cells(torch.from_numpy(np.stack([c.where for c in made]))),
    )
    model = train_detector(frames, torch.arange(8), cells, tmp_path, training, 4)
    with torch.no_grad():
        found = model(to_unit(frames))
    assert 0 < cells.flatten(1).amax(1).sum() < 8
    assert found[cells == 1].mean() > found[cells == 0].mean() + 1


def test_clips_of_another_shape_and_missing_weights_are_refused_in_words(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="uint8 clips"):
        fault_scores(np.zeros((2, 9, 48, 48, 3), np.uint8))
    monkeypatch.setitem(detector.FILES, "judge", tmp_path / "gone.safetensors")
    load_detector.cache_clear()
    with pytest.raises(ModelError, match=r"gone\.safetensors: the fault detector's weights are missing"):
        load_detector("judge")
    load_detector.cache_clear()
