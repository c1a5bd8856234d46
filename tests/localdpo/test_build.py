"""Building LocalDPO pairs: the same bytes whoever builds them, pairs that cannot be used left out, own masks used."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from alignkit.commands import validate
from alignkit.errors import ConfigError, DataError
from alignkit.localdpo import build
from alignkit.localdpo.build import build_pairs
from alignkit.localdpo.corruption import regenerate
from alignkit.localdpo.masks import region_mask
from alignkit.localdpo.sources import find_usable, split_clips
from alignkit.media.videos import VideoSpec, decode_clip, write_video
from alignkit.models.wan import guided
from alignkit.stores import folders
from alignkit.stores.pairs import Pair, PairStore
from alignkit_kernels import NoiseKey, Stream, keyed_rand

CPU = torch.device("cpu")


def blocks(out):
    """A digest of every block under a run's folder."""
    files = sorted(out.glob("pairs/*/block-*.arrow"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_processes_build_what_one_builds(command, config_file, overrides, made_pairs, tmp_path):
    out = tmp_path / "run"
    result = command("pairs", config_file, *overrides(out), "--nproc", "2")
    assert result.returncode == 0, result.stderr
    assert blocks(out) == blocks(made_pairs)
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


WHOLE = ("data.height=48", "data.width=48", "data.num_frames=17")  # the clips as they are


def test_a_stored_pair_is_what_the_public_parts_make_of_its_clip(small_config, clips, half_wan):
    """Prompts, guidance, strength, noise, mask and text of every pair, put together again by hand."""
    config = small_config(
        'pairs.prompt_prefix="sharp, "', "pairs.negative_prompt=blurred", "pairs.guidance_scale=3.0", "pairs.seed=7",
        "pairs.strengths=[6,7]", "pairs.batch_size=1", "pairs.per_clip=2", "pairs.num_inference_steps=8", *WHOLE,
    )  # fmt: skip
    build_pairs(config, CPU)
    captions = {row["video"]: row["caption"] for row in map(json.loads, (clips / "captions.jsonl").open())}
    names, seen = sorted(captions), set()
    for pair in PairStore(config.output.dir / "pairs" / "heldout"):
        name = names[pair.id // 2]
        assert (pair.source, pair.prompt) == (name, captions[name])
        assert torch.equal(pair.text, half_wan.encode_text([captions[name]])[0])
        clean = half_wan.encode_video(decode_clip(clips / name, VideoSpec(48, 48, 17))[None])
        assert torch.equal(pair.winner, clean[0])
        mask = region_mask((5, 12, 12), (48, 48), config.pairs.mask, seed=7, pair_id=pair.id)
        assert torch.equal(pair.mask, mask[None])
        u = keyed_rand(
            (1, 1), NoiseKey(7, torch.tensor([pair.id]), 0, Stream.STRENGTH), device=CPU, dtype=torch.float64
        )
        steps = (6, 7)[int(2 * u.item())]
        assert (pair.steps, pair.strength) == (steps, steps / 8)
        seen.add(steps)
        text, negative = (half_wan.pad_text(half_wan.encode_text([p])) for p in (f"sharp, {captions[name]}", "blurred"))
        predict = partial(guided, half_wan.transformer, text=text, negative=negative, guidance=3.0)
        key = NoiseKey(7, torch.tensor([pair.id]), 0, Stream.CORRUPTION)
        loser = regenerate(clean, mask[None, None], predict, half_wan.schedule(8), key, steps)
        assert torch.equal(pair.loser, loser[0])
    assert seen == {6, 7}, "both strengths were drawn"


def test_a_clip_that_cannot_be_read_any_more_costs_its_own_pairs_only(small_config, monkeypatch):
    real = build.decode_with_facts

    def failing(path, spec):
        if path.name == "clip_000004.mp4":
            raise DataError(f"{path}: the disk is gone")
        return real(path, spec)

    monkeypatch.setattr(build, "decode_with_facts", failing)
    config = small_config()
    build_pairs(config, CPU)
    (row,) = map(json.loads, (config.output.dir / "skipped.jsonl").read_text().splitlines())
    assert row["video"].startswith("clip_000004.mp4 (pair ") and "the disk is gone" in row["reason"]
    assert sum(len(PairStore(config.output.dir / "pairs" / split)) for split in ("train", "heldout")) == 9


def test_a_build_takes_one_thread_whatever_the_caller_has_and_leaves_the_caller_its_own(small_config, monkeypatch):
    """On some processors the bits of a convolution depend on the number of threads."""
    real, threads = build.regenerate, []

    def regenerate_and_count(*arguments):
        threads.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(build, "regenerate", regenerate_and_count)
    torch.set_num_threads(2)
    build_pairs(small_config(), CPU)
    assert set(threads) == {1} and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ("data.num_frames=16", r"data\.num_frames: must be 4·n \+ 1"),
        ("data.height=50", r"data\.height: must be a multiple of 8"),
        ("pairs.mask.area=[0.9999,1.0]", r"pairs\.mask\.area: none of 2048 masks"),
        ("pairs.dynamic_guidance=true", r"dynamic_guidance: Wan has none"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_video_is_looked_at(small_config, settings, words):
    config = small_config(settings)
    with pytest.raises(ConfigError, match=words):
        build_pairs(config, CPU)
    assert not config.output.dir.exists()


def test_terms_that_change_the_bytes_are_refused_by_name(small_config):
    config = small_config()
    build_pairs(config, CPU)
    changes = "pairs.batch_size=1", "model.max_sequence_length=32", "pairs.seed=1", "model.attention=native_flash"
    for change in (*changes, "model.vae_tiling=true"):
        with pytest.raises(DataError, match=f"holds pairs made with {change.split('.')[1].split('=')[0]} = "):
            build_pairs(small_config(change), CPU)


def test_previews_are_there_when_the_first_block_is(small_config):
    config = small_config()
    looked = []
    build_pairs(config, CPU, preview=lambda model, store: looked.append((store.folder.name, len(store))))
    assert looked == [("train", 4), ("train", 8), ("heldout", 2), ("heldout", 2)]


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


def blocks_of(config) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted((config.output.dir / "pairs").rglob("*.arrow"))}


def stored_pairs(config) -> dict[int, Pair]:
    return {pair.id: pair for split in ("train", "heldout") for pair in PairStore(config.output.dir / "pairs" / split)}


@pytest.mark.parametrize("mended", ["caption", "mask", "video"])
def test_what_was_mended_is_made_again_and_nothing_else(small_config, clips, tmp_path, mended, monkeypatch, capfd):
    folder, masks = tmp_path / "clips", tmp_path / "masks"
    shutil.copytree(clips, folder)
    masks.mkdir()
    for file in clips.glob("*.mp4"):
        (masks / f"{file.stem}.json").write_text('{"static": [[0, 0, 24, 24]]}')
    config = small_config(f"data.videos={folder}", f"pairs.mask.files={masks}", "pairs.block_size=2")
    build_pairs(config, CPU)
    before, blocks = stored_pairs(config), blocks_of(config)
    train = [pair for pair in before.values() if pair.id in PairStore(config.output.dir / "pairs" / "train").ids]
    source = train[0].source
    match mended:
        case "caption":
            captions = folder / "captions.jsonl"
            rows = [json.loads(line) for line in captions.read_text().splitlines()]
            rows = [row | {"caption": "another one"} if row["video"] == source else row for row in rows]
            captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "mask":
            (masks / source).with_suffix(".json").write_text('{"static": [[0, 0, 40, 40]]}')
        case "video":
            write_video(folder / source, decode_clip(folder / source, VideoSpec(48, 48, 17)).flip(1), 8)
    monkeypatch.setattr(folders, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):  # at the worst moment
        build_pairs(config, CPU)
    monkeypatch.undo()
    build_pairs(config, CPU)
    assert f"video, caption or mask changed of {source}: 1 of" in capfd.readouterr().err
    after = stored_pairs(config)
    assert after.keys() == before.keys()
    changed = {name for name, content in blocks_of(config).items() if content != blocks[name]}
    assert len(changed) == 1
    for number, pair in after.items():
        same = torch.equal(pair.winner, before[number].winner) and torch.equal(pair.loser, before[number].loser)
        same = same and torch.equal(pair.text, before[number].text) and pair.prompt == before[number].prompt
        assert same == (pair.source != source), pair.source
    fresh = small_config(*(f"{key}={value}" for key, value in {
        "data.videos": folder, "pairs.mask.files": masks, "pairs.block_size": 2, "output.dir": tmp_path / "fresh",
    }.items()))  # fmt: skip
    build_pairs(fresh, CPU)
    assert [*blocks_of(fresh).values()] == [*blocks_of(config).values()], "as if it had always been so"


def killed(*_):
    raise KeyboardInterrupt


def test_videos_that_came_or_went_are_named(small_config, clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    config = small_config(f"data.videos={folder}")
    build_pairs(config, CPU)
    before = blocks_of(config)
    (folder / "clip_000003.mp4").unlink()
    with pytest.raises(DataError, match=r"was built from other videos.*\(.*(more|fewer): .*\); put them back"):
        build_pairs(config, CPU)
    assert blocks_of(config) == before


def test_a_store_that_holds_no_pair_protects_nothing(small_config, clips, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for file in clips.glob("*.mp4"):
        (masks / f"{file.stem}.json").write_text('{"static": [[0, 0, 1, 1]]}')  # nothing on the latent grid
    config = small_config(f"pairs.mask.files={masks}")
    with contextlib.suppress(DataError):
        build_pairs(config, CPU)
    for file in masks.iterdir():
        file.write_text('{"static": [[0, 0, 40, 40]]}')
    other = config.model_copy(update={"pairs": config.pairs.model_copy(update={"seed": 5})})
    build_pairs(other, CPU)
    assert len(stored_pairs(other)) == 10


def test_own_masks_are_used_and_clips_without_one_left_out(small_config, clips, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    names = sorted(file.stem for file in clips.glob("*.mp4"))
    for name in names[:-1]:
        mask = np.zeros((17, 48, 48), dtype=bool)
        mask[:, :24, 24:] = True
        np.save(masks / f"{name}.npy", mask)
    config = small_config(f"pairs.mask.files={masks}", *WHOLE)
    build_pairs(config, CPU)
    (row,) = map(json.loads, (config.output.dir / "skipped.jsonl").read_text().splitlines())
    assert row["video"] == f"{names[-1]}.mp4" and "pairs.mask.files: no mask" in row["reason"]
    wanted = torch.zeros(5, 12, 12, dtype=torch.uint8)
    wanted[:, :6, 6:] = 1
    pairs = [pair for split in ("train", "heldout") for pair in PairStore(config.output.dir / "pairs" / split)]
    assert len(pairs) == 9 and all(torch.equal(pair.mask[0], wanted) for pair in pairs)


def test_a_clip_whose_mask_is_not_its_alone_is_left_out(small_config, clips, tmp_path):
    folder, masks = tmp_path / "clips", tmp_path / "masks"
    shutil.copytree(clips, folder)
    masks.mkdir()
    (twin,) = (row for row in map(json.loads, (folder / "captions.jsonl").open()) if row["video"] == "clip_000001.mp4")
    write_video(folder / "clip_000001.mov", decode_clip(folder / "clip_000002.mp4", VideoSpec(48, 48, 17)), 8)
    with (folder / "captions.jsonl").open("a") as stream:
        stream.write(json.dumps(twin | {"video": "clip_000001.mov"}) + "\n")
    for file in clips.glob("*.mp4"):
        (masks / f"{file.stem}.json").write_text('{"static": [[0, 0, 24, 24]]}')
    np.save(masks / "clip_000000.npy", np.ones((17, 48, 48), bool))
    _, problems = find_usable(small_config(f"data.videos={folder}", f"pairs.mask.files={masks}"))
    found = {problem.video: problem.reason for problem in problems}
    assert found.keys() == {"clip_000000.mp4", "clip_000001.mp4", "clip_000001.mov"}
    assert "more than one mask: clip_000000.npy, clip_000000.json" in found["clip_000000.mp4"]
    for name in ("clip_000001.mp4", "clip_000001.mov"):
        assert "clip_000001.json is the mask of 2 clips" in found[name]


def test_validate_wants_a_clip_for_either_split(small_config, clips, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(clips / "clip_000000.mp4", tmp_path / "one")
    (tmp_path / "one" / "clip_000000.txt").write_text("a red circle")
    with pytest.raises(DataError, match=r"1 usable of 1 .* one to train on and one to hold out"):
        validate(small_config(f"data.videos={tmp_path / 'one'}"))


def test_a_missing_folder_of_masks_is_named(small_config, tmp_path):
    with pytest.raises(DataError, match=r"pairs\.mask\.files: .*nowhere does not exist"):
        find_usable(small_config(f"pairs.mask.files={tmp_path / 'nowhere'}"))


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
    build_pairs(config, CPU)
    assert len({pair.mask.sum().item() for pair in stored_pairs(config).values()}) == 1


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


def test_held_out_pairs_of_other_terms_are_refused_before_those_to_train_on_are_made(
    made_pairs, small_config, tmp_path
):
    shutil.copytree(made_pairs, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pairs" / "train")
    with pytest.raises(DataError, match="heldout: holds pairs made with guidance_scale"):
        build_pairs(small_config(f"output.dir={tmp_path / 'run'}", "pairs.guidance_scale=3"), torch.device("cpu"))
    assert not list((tmp_path / "run" / "pairs" / "train").glob("block-*"))
