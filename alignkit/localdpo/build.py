"""`alignkit pairs`: a folder of captioned videos in, LocalDPO pairs for training and evaluation out."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from alignkit.config import Config
from alignkit.data.pairs import Pair, StoreInfo, block_file, open_for_building, write_block, write_empty_text
from alignkit.data.videos import Clip, VideoSpec, decode_clip, find_clips, usable_clips
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.localdpo.corruption import regenerate
from alignkit.localdpo.masks import region_mask
from alignkit.models import family_module, load_model, working_dtype
from alignkit.progress import progress, say
from alignkit_kernels import NoiseKey, Stream, keyed_rand

SPLITS = ("train", "heldout")


def pairs_folder(config: Config, split: str) -> Path:
    return config.output.dir / "pairs" / split


def video_spec(config: Config) -> VideoSpec:
    data = config.data
    return VideoSpec(data.height, data.width, data.num_frames, data.fps)


def find_usable(config: Config) -> list[Clip]:
    """The clips of `data.videos` that decode to the wanted size and length, in name order.

    The others go to skipped.jsonl with the reason. Raises DataError when nothing is left.
    """
    if config.data.videos is None:
        raise DataError("data.videos: not set; name the folder that holds the videos")
    clips, problems = find_clips(config.data.videos, config.data.captions)
    good, listed = [], len(clips) + len(problems)
    with progress("checking videos", len(clips)) as bar:
        watched = (bar.advance() or clip for clip in clips)
        for clip, _ in usable_clips(watched, video_spec(config), problems):
            good.append(clip)
    config.output.dir.mkdir(parents=True, exist_ok=True)
    write_lines(config.output.dir / "skipped.jsonl", [asdict(problem) for problem in problems])
    for problem in problems:
        say(f"skipped {problem.video}: {problem.reason}")
    if problems:
        say(f"{len(good)} of {listed} videos can be used")
    if len(good) < 2:
        raise DataError(
            f"data.videos: {len(good)} usable of {listed} in {config.data.videos}, but one to "
            f"train on and one to hold out are needed; the reasons are in {config.output.dir / 'skipped.jsonl'}"
        )
    return good


def split_clips(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, heldout) clip numbers, drawn by `seed`: at least one in each."""
    assert count >= 2
    heldout = min(max(1, round(count * share)), count - 1)
    order = np.random.default_rng([seed, 0x5911]).permutation(count)
    return sorted(order[heldout:].tolist()), sorted(order[:heldout].tolist())


def build_pairs(config: Config, device: torch.device) -> dict[str, int]:
    """Make every pair that is not stored yet; returns how many pairs each split holds.

    A pair's id is its clip's number times `pairs.per_clip` plus a counter, so ids are unique over both splits
    and a pair's mask, strength and noise depend on nothing but its id and the seed.
    """
    say(f"loading {config.model.family} from {config.model.path}")
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device))
    data = config.data
    grid = model.latent_grid(data.num_frames, data.height, data.width)
    clips = find_usable(config)
    counts = {}
    for split, numbers in zip(SPLITS, split_clips(len(clips), data.heldout, config.pairs.seed), strict=True):
        folder = pairs_folder(config, split)
        open_for_building(folder, _store_info(config, model))
        write_empty_text(folder, model.encode_text([""])[0])
        _check_membership(folder, [clips[n].name for n in numbers])
        tasks = [(clips[n], n * config.pairs.per_clip + j) for n in numbers for j in range(config.pairs.per_clip)]
        size = config.pairs.block_size
        blocks = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        done = sum(len(block) for i, block in enumerate(blocks) if block_file(folder, i).exists())
        with progress(f"making {split} pairs", len(tasks), done=done) as bar:
            for number, block in enumerate(blocks):
                if not block_file(folder, number).exists():
                    write_block(folder, number, _make_block(config, model, grid, block, bar))
        counts[split] = len(tasks)
    return counts


def _check_membership(folder: Path, names: list[str]) -> None:
    """Blocks made from other clips than today's would carry the wrong ids: refuse them."""
    file = folder / "clips.json"
    if not file.exists():
        write_json(file, names)
    elif json.loads(file.read_text()) != names:
        raise DataError(
            f"{folder}: was built from other clips than data.videos holds now; choose another "
            "output.dir or delete that folder"
        )


def _store_info(config: Config, model) -> StoreInfo:
    pairs = config.pairs
    return StoreInfo(
        family=model.family,
        model=model.fingerprint(),
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        schedule=model.schedule(pairs.num_inference_steps).fingerprint,
        num_inference_steps=pairs.num_inference_steps,
        guidance_scale=pairs.guidance_scale,
        prompt_prefix=pairs.prompt_prefix,
        negative_prompt=pairs.negative_prompt,
        strengths=list(pairs.strengths),
        mask=pairs.mask.model_dump(mode="json"),
        seed=pairs.seed,
        per_clip=pairs.per_clip,
        block_size=pairs.block_size,
        videos=config.data.model_dump(mode="json", exclude={"videos", "captions"}),
    )


def _make_block(config: Config, model, grid: tuple, block: list[tuple[Clip, int]], bar) -> list[Pair]:
    """The pairs of one block, in id order. Pairs of equal strength are regenerated together."""
    spec, pairs = video_spec(config), config.pairs
    winners = {}
    for clip in {clip.name: clip for clip, _ in block}.values():
        winners[clip.name] = model.encode_video(decode_clip(clip.path, spec)[None])[0]
    by_strength = defaultdict(list)
    for clip, pair_id in block:
        by_strength[_draw_strength(config, pair_id)].append((clip, pair_id))
    made: list[Pair] = []
    for steps, group in sorted(by_strength.items()):
        for first in range(0, len(group), pairs.batch_size):
            batch = group[first : first + pairs.batch_size]
            made += _make_batch(config, model, grid, steps, batch, winners)
            bar.advance(len(batch))
    return sorted(made, key=lambda pair: pair.id)


def _draw_strength(config: Config, pair_id: int) -> int:
    strengths = config.pairs.strengths
    key = NoiseKey(config.pairs.seed, torch.tensor([pair_id]), 0, Stream.STRENGTH)
    u = keyed_rand((1, 1), key, device="cpu", dtype=torch.float64).item()
    return strengths[min(int(u * len(strengths)), len(strengths) - 1)]


def _make_batch(config: Config, model, grid: tuple, steps: int, batch, winners) -> list[Pair]:
    pairs = config.pairs
    clean = torch.stack([winners[clip.name] for clip, _ in batch])
    pixels = (config.data.height, config.data.width)
    masks = torch.stack(
        [
            model.region_layout(region_mask(grid, pixels, pairs.mask, seed=pairs.seed, pair_id=pair_id))
            for _, pair_id in batch
        ]
    )
    prompts = model.encode_text([pairs.prompt_prefix + clip.caption for clip, _ in batch])
    text = model.pad_text(prompts).to(clean.device, model.dtype)
    negative = model.pad_text(model.encode_text([pairs.negative_prompt] * len(batch))).to(clean.device, model.dtype)
    guided = family_module(model.family).guided

    def predict(state, timesteps):
        return guided(model.transformer, state, timesteps, text, negative, pairs.guidance_scale).float()

    ids = torch.tensor([pair_id for _, pair_id in batch])
    key = NoiseKey(pairs.seed, ids, 0, Stream.CORRUPTION)
    schedule = model.schedule(pairs.num_inference_steps)
    losers = regenerate(clean, masks, predict, schedule, key, steps)
    captions = model.encode_text([clip.caption for clip, _ in batch])
    return [
        Pair(
            id=pair_id,
            source=clip.name,
            prompt=clip.caption,
            text=captions[i],
            winner=clean[i].cpu(),
            loser=losers[i].cpu(),
            mask=masks[i],
            steps=steps,
            strength=steps / pairs.num_inference_steps,
        )
        for i, (clip, pair_id) in enumerate(batch)
    ]
