"""Building LocalDPO pairs: the same bytes whoever builds them, pairs that cannot be used left out, own masks used."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from alignkit.data.pairs import PairStore
from alignkit.errors import ConfigError, DataError
from alignkit.localdpo import build
from alignkit.localdpo.build import build_pairs
from alignkit.localdpo.sources import split_clips

CPU = torch.device("cpu")


def blocks(out):
    """Bytes of every block under a run's folder."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("pairs/*/block-*"))}


def test_two_processes_build_what_one_builds(command, config_file, overrides, made_pairs, tmp_path):
    out = tmp_path / "run"
    result = command("pairs", config_file, *overrides(out), "--nproc", "2")
    assert result.returncode == 0, result.stderr
    assert blocks(out) == blocks(made_pairs)
    assert "8 train pairs" in result.stderr and "pairs/s" in result.stderr
    assert len(list(out.glob("pairs/train/previews/*.png"))) == 4
    assert result.stderr.count("8 train pairs") == 1, "the first process speaks for all"


def test_a_killed_build_goes_on_to_the_same_bytes(start_command, command, config_file, overrides, made_pairs, tmp_path):
    out = tmp_path / "run"
    first = start_command("pairs", config_file, *overrides(out))
    while not (blocks(out) or first.poll() is not None):
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert 0 < len(blocks(out)) < len(blocks(made_pairs)), "killed in the middle"
    result = command("pairs", config_file, *overrides(out))
    assert result.returncode == 0, result.stderr
    assert blocks(out) == blocks(made_pairs)


def test_a_pair_whose_loser_is_not_finite_is_left_out_and_listed(small_config, monkeypatch):
    config = small_config()
    real = build.regenerate
    broken = []

    def sometimes_infinite(clean, mask, predict, schedule, key, steps):
        losers = real(clean, mask, predict, schedule, key, steps)
        if not broken:
            broken.append(key.sample_ids[0].item())
            losers[0] = float("inf")
        return losers

    monkeypatch.setattr(build, "regenerate", sometimes_infinite)
    build_pairs(config, CPU)
    store = PairStore(config.output.dir / "pairs" / "train")
    assert len(store) == 7 and broken[0] not in store.ids
    (row,) = map(json.loads, (config.output.dir / "skipped.jsonl").read_text().splitlines())
    assert f"(pair {broken[0]})" in row["video"] and "not finite" in row["reason"]


def test_other_captions_than_those_a_store_was_built_from_are_refused(small_config, clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    config = small_config(f"data.videos={folder}")
    build_pairs(config, CPU)
    captions = folder / "captions.jsonl"
    captions.write_text(captions.read_text().replace("moves", "glides"))
    with pytest.raises(DataError, match="was built from other videos, captions or masks"):
        build_pairs(config, CPU)


def test_own_masks_are_used_and_clips_without_one_left_out(small_config, clips, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    names = sorted(file.stem for file in clips.glob("*.mp4"))
    for name in names[:-1]:
        mask = np.zeros((17, 48, 48), dtype=bool)
        mask[:, :24, 24:] = True
        np.save(masks / f"{name}.npy", mask)
    config = small_config(f"pairs.mask.files={masks}")
    build_pairs(config, CPU)
    (row,) = map(json.loads, (config.output.dir / "skipped.jsonl").read_text().splitlines())
    assert row["video"] == f"{names[-1]}.mp4" and "pairs.mask.files: no mask" in row["reason"]
    wanted = torch.zeros(5, 12, 12, dtype=torch.uint8)
    wanted[:, :6, 6:] = 1
    pairs = [pair for split in ("train", "heldout") for pair in PairStore(config.output.dir / "pairs" / split)]
    assert len(pairs) == 9 and all(torch.equal(pair.mask[0], wanted) for pair in pairs)


def test_masks_that_changed_are_not_mixed_with_the_old_ones(small_config, clips, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for file in clips.glob("*.mp4"):
        (masks / f"{file.stem}.json").write_text('{"static": [[0, 0, 24, 24]]}')
    config = small_config(f"pairs.mask.files={masks}")
    build_pairs(config, CPU)
    next((config.output.dir / "pairs" / "train").glob("block-*.arrow")).unlink()
    for file in masks.iterdir():
        file.write_text('{"static": [[0, 0, 40, 40]]}')
    with pytest.raises(DataError, match="was built from other videos, captions or masks"):
        build_pairs(config, CPU)


def test_guidance_that_a_family_does_not_have_is_refused(small_config):
    with pytest.raises(ConfigError, match=r"dynamic_guidance: Wan2\.1 has none"):
        build_pairs(small_config("pairs.dynamic_guidance=true"), CPU)


def test_latents_are_rounded_before_they_are_corrupted(small_config):
    """Stored in half the size, a pair is still equal outside its mask, and a second reading changes nothing."""
    config = small_config("pairs.dtype=fp16")
    build_pairs(config, CPU)
    for pair in PairStore(config.output.dir / "pairs" / "train"):
        outside = ~pair.mask.bool().expand_as(pair.winner)
        assert torch.equal(pair.winner[outside], pair.loser[outside])
        assert torch.equal(pair.winner, pair.winner.half().float())


def test_the_split_holds_at_least_one_clip_on_each_side():
    for count, share in ((2, 0.01), (2, 0.99), (100, 0.001)):
        train, heldout = split_clips(count, share, seed=0)
        assert train and heldout and sorted(train + heldout) == list(range(count))
