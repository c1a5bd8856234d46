"""`alignkit pairs` from a folder of captioned videos: LocalDPO pairs for training and evaluation."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.apo.inversions import add_inversions, inversion_terms
from alignkit.config import Config
from alignkit.config.sections import HANDLING
from alignkit.errors import ConfigError, DataError
from alignkit.localdpo.corruption import Predict, regenerate
from alignkit.localdpo.masks import region_mask
from alignkit.localdpo.sources import Source, check_count, find_usable, split_clips
from alignkit.media.captions import Problem
from alignkit.media.finding import Clip
from alignkit.media.masks import mask_digest, mask_on_grid, read_mask
from alignkit.media.videos import VideoFacts, decode_with_facts
from alignkit.models import VideoModel, family_module, load_model, working_dtype
from alignkit.models.context import TokenGroup, context_terms
from alignkit.objectives.laws import Law
from alignkit.objectives.states.checks import check_noise, expert_terms
from alignkit.progress import say
from alignkit.stores.blocks import Made, build_store, check_store
from alignkit.stores.folders import (
    SPLITS,
    add_skipped_pairs,
    encoding_terms,
    latent_grid,
    pairs_folder,
    say_skipped,
    stored_dtype,
    video_spec,
    write_skipped,
)
from alignkit.stores.origins import REAL, Origin
from alignkit.stores.pairs import LATENT_DTYPES, Pair, PairStore, fault_of
from alignkit.stores.store import StoreInfo
from alignkit_kernels import NoiseKey, Stream, keyed_rand


class Task(NamedTuple):
    """A pair to be made: its id, its clip, the winner's latents and the mask, both in the family's layout."""

    pair_id: int
    clip: Clip
    winner: Tensor
    mask: Tensor


def check_settings(config: Config) -> None:
    """What can be wrong with the settings, before a video is looked at or weights are loaded: raises ConfigError."""
    grid, data, pairs = latent_grid(config), config.data, config.pairs
    if config.noise.source == "path":
        raise ConfigError(
            "noise.source: 'path' is for rollouts; a regenerated region has no path of its own from noise: use "
            "initial, inversion or shared"
        )
    check_noise(config, load_model(config.model, with_transformer=False, with_encoders=False))
    if pairs.dynamic_guidance:
        family_module(config.model.family).dynamic_guidance(pairs.guidance_scale, 0, pairs.num_inference_steps)
    if pairs.mask.files is None:
        region_mask(grid, (data.height, data.width), pairs.mask, seed=pairs.seed, pair_id=0)


def build_pairs(
    config: Config,
    device: torch.device,
    show: bool = True,
    preview: Callable[[VideoModel, PairStore], None] | None = None,
    foresee: Callable[[VideoModel, list[Source], int], None] | None = None,
    group: TokenGroup | None = None,
) -> dict[str, int]:
    """Make every pair that is not stored yet; returns how many pairs are planned for each split.

    Any number of processes may call this at once: they share the blocks between them. A pair's id is its clip's
    number times `pairs.per_clip` plus a counter, so ids are unique over both splits and a pair's mask, strength and
    noise depend on nothing but its id and the seed. preview(model, store) is called with the first block of each split
    when it is there, and with the whole store at the end. foresee(model, usable clips, how many are held out) is called
    before the first pair is made. group: this process's, whose first it is, where others follow its network.
    """
    check_settings(config)
    sources, problems = find_usable(config, show)
    if show:
        say_skipped(problems)
        if problems:
            say(f"{len(sources)} videos can be used")
    check_count(config, sources, problems)
    if show:
        say(f"loading {config.model.family} from {config.model.path}")
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device), group=group)
    law = check_noise(config, model)
    per_clip, shared = config.pairs.per_clip, _store_info(config, model)
    parts = split_clips(len(sources), config.data.heldout, config.pairs.seed)
    planned = {}
    for split, numbers in zip(SPLITS, parts, strict=True):
        tasks = [(sources[n], n * per_clip + j) for n in numbers for j in range(per_clip)]
        used = [sources[n] for n in numbers]
        members = [[s.clip.name, s.digest, s.clip.caption, mask_digest(s.mask)] for s in used]
        info = replace(shared, pairs=len(tasks))
        check_store(pairs_folder(config, split), info, members)
        planned[split] = info, members, partial(_make_rows, config, model, law, tasks)
    if foresee:
        foresee(model, sources, len(parts[1]))
    for split, (info, members, make) in planned.items():
        build_store(
            pairs_folder(config, split), model, info, members, make, f"making {split} pairs",
            negative_prompt=config.pairs.negative_prompt, preview=preview,
            accepted=partial(write_skipped, config, problems if show and split == SPLITS[0] else None), show=show,
        )  # fmt: skip
    if show:
        add_skipped_pairs(config)
    return {split: info.pairs for split, (info, _, _) in planned.items()}


def _store_info(config: Config, model: VideoModel) -> StoreInfo:
    pairs = config.pairs
    unlike: Any = dict.fromkeys(HANDLING | {"block_size", "dtype"}, True)
    terms = pairs.model_dump(mode="json", exclude=unlike | {"mask": {"files"}})
    return StoreInfo(
        kind="local_dpo",
        family=model.family,
        model=model.fingerprint(),
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        pairs=0,
        block_size=pairs.block_size,
        dtype=stored_dtype(config, model.dtype),
        made=terms
        | {
            "network_dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.attention,
            "max_sequence_length": config.model.max_sequence_length,
            "schedule": model.schedule(pairs.num_inference_steps).fingerprint,
            **expert_terms(config),
            **context_terms(model),
            **encoding_terms(config.model),
            "videos": config.data.model_dump(mode="json", include={"height", "width", "num_frames", "fps", "heldout"}),
        }
        | (inversion_terms(config, model) if config.noise.source == "inversion" else {}),
    )


def _make_rows(
    config: Config,
    model: VideoModel,
    law: Law,
    tasks: list[tuple[Source, int]],
    rows: range,
    advance: Callable[[int], None],
) -> Made:
    """The pairs of one block, in id order. Pairs of equal strength are regenerated together."""
    spec, pairs = video_spec(config), config.pairs
    stored = LATENT_DTYPES[stored_dtype(config, model.dtype)]
    by_strength: dict[int, list[Task]] = defaultdict(list)
    problems, decoded = [], {}
    for source, pair_id in (tasks[row] for row in rows):
        clip = source.clip
        try:
            if clip.name not in decoded:
                frames, facts = decode_with_facts(clip.path, spec)
                latents = model.encode_video(frames[None])[0].to(stored).float()  # as the store gives it back
                decoded = {clip.name: (latents, facts)}  # a clip's pairs are neighbours
            latents, facts = decoded[clip.name]
            mask = _mask_of(config, model, source, facts, pair_id)
        except (DataError, ConfigError) as error:  # the file changed, or no mask of this pair has pairs.mask.area
            problems.append(Problem(f"{clip.name} (pair {pair_id})", str(error)))
            continue
        by_strength[_draw_strength(config, pair_id)].append(Task(pair_id, clip, latents, model.region_layout(mask)))
    made: list[Pair] = []
    for steps, group in sorted(by_strength.items()):
        for first in range(0, len(group), pairs.batch_size):
            batch = group[first : first + pairs.batch_size]
            for pair in add_inversions(config, model, law, _make_batch(config, model, steps, batch)):
                fault = fault_of(pair, stored)
                if fault:
                    problems.append(Problem(f"{pair.source} (pair {pair.id})", fault))
                else:
                    made.append(pair)
            advance(len(batch))
    return sorted(made, key=lambda pair: pair.id), problems


def _mask_of(config: Config, model: VideoModel, source: Source, facts: VideoFacts, pair_id: int) -> Tensor:
    options, spec = config.pairs.mask, video_spec(config)
    grid = model.latent_grid(spec.num_frames, spec.height, spec.width)
    if source.mask is not None:
        return mask_on_grid(read_mask(source.mask, facts, spec), grid)
    return region_mask(grid, (spec.height, spec.width), options, seed=config.pairs.seed, pair_id=pair_id)


def _draw_strength(config: Config, pair_id: int) -> int:
    strengths = config.pairs.strengths
    key = NoiseKey(config.pairs.seed, torch.tensor([pair_id]), 0, Stream.STRENGTH)
    u = keyed_rand((1, 1), key, device="cpu", dtype=torch.float64).item()
    return strengths[min(int(u * len(strengths)), len(strengths) - 1)]


def _make_batch(config: Config, model: VideoModel, steps: int, batch: list[Task]) -> list[Pair]:
    pairs = config.pairs
    clean, masks = (torch.stack(side) for side in zip(*((task.winner, task.mask) for task in batch), strict=True))
    captions = [task.clip.caption for task in batch]
    predict = guided_network(config, model, guided_text(config, model, captions, clean.device))
    key = NoiseKey(pairs.seed, torch.tensor([task.pair_id for task in batch]), 0, Stream.CORRUPTION)
    losers = regenerate(clean, masks, predict, model.schedule(pairs.num_inference_steps), key, steps)
    texts = model.encode_text(captions)
    recipe = _recipe(config, model)
    return [
        Pair(
            id=task.pair_id,
            source=task.clip.name,
            prompt=task.clip.caption,
            text=texts[i],
            winner=task.winner.cpu(),
            loser=losers[i].cpu(),
            mask=task.mask,
            steps=steps,
            strength=steps / pairs.num_inference_steps,
            origin_w=REAL,
            origin_l=Origin(
                "regenerated",
                (pairs.seed, task.pair_id, 0, int(Stream.CORRUPTION)),
                first=pairs.num_inference_steps - steps,
                recipe=recipe,
            ),
        )
        for i, task in enumerate(batch)
    ]


def _recipe(config: Config, model: VideoModel) -> dict[str, Any]:
    """How losers are regenerated, for their origins."""
    pairs = config.pairs
    return {
        "schedule": model.schedule(pairs.num_inference_steps).fingerprint,
        "solver": "first_order",
        "steps": pairs.num_inference_steps,
        "guidance": pairs.guidance_scale,
        "dynamic": pairs.dynamic_guidance,
        "negative_prompt": pairs.negative_prompt,
        "network": model.fingerprint(),
        "regime": {
            "engine": "module",
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.attention,
            "batch": pairs.batch_size,
            **context_terms(model),
        },
    }


class Guided(NamedTuple):
    """Text of B prompts and of the negative prompt as the network takes it, [B, tokens, D] each."""

    text: Tensor
    negative: Tensor


def guided_text(config: Config, model: VideoModel, captions: list[str], device: torch.device) -> Guided:
    """What regions are regenerated by: the captions with the prefix of `pairs`, and its negative prompt."""
    pairs = config.pairs
    prompts = model.encode_text([pairs.prompt_prefix + caption for caption in captions])
    negative = model.encode_text([pairs.negative_prompt] * len(captions))
    return Guided(*(model.pad_text(text).to(device, model.dtype) for text in (prompts, negative)))


def guided_network(config: Config, model: VideoModel, guided: Guided) -> Predict:
    """`model`'s guided prediction for these texts, with the scale of `pairs`."""
    pairs, family = config.pairs, family_module(model.family)

    def predict(state: Tensor, timesteps: Tensor) -> Tensor:
        scale = pairs.guidance_scale
        if pairs.dynamic_guidance:
            scale = family.dynamic_guidance(scale, timesteps[0].item(), pairs.num_inference_steps)
        return family.guided(model.transformer, state, timesteps, *guided, scale).float()

    return predict
