"""The experiment's clips and pair stores: local pairs with either mask, ranked generated pairs, held-out pairs."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alignkit.config import Config
from alignkit.evaluation.regions import again
from alignkit.evaluation.samples import sample_latents
from alignkit.experiments.plan import Plan, run_config
from alignkit.localdpo.build import build_pairs, guided_text
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.objectives.states.checks import sampler_terms
from alignkit.rankers.measures import small_world_score
from alignkit.sharing import one_at_a_time
from alignkit.stores.blocks import Made, build_store
from alignkit.stores.folders import pairs_folder
from alignkit.stores.origins import Origin
from alignkit.stores.pairs import Pair, PairStore
from alignkit.tiny.clips import write_clips
from alignkit_kernels import Stream

CLIP_SEEDS = {"train": 31_000, "few": 31_000, "heldout": 32_000}
"""None is a seed of the shipped weights' clips, nor of the demo's."""
SEED = 33_000  # of the noise that ranked samples start from
TIMED_PAIRS = 16
FEW_CLIPS = 16  # of the store "few"
OTHER_SPLIT = 1  # `alignkit pairs` wants a clip on either side of its split


def prepare(plan: Plan, out: Path, device: torch.device, show: bool) -> None:
    """Draw the clips and make every store that the plan's arms need; processes share the work."""
    prepare_clips(plan, out, device, show)
    for name in plan.stores:
        if name == "generated":
            _build_generated(plan, out, "train", device, show)
        else:
            build_pairs(store_config(plan, out, name), device, show)


def prepare_clips(plan: Plan, out: Path, device: torch.device, show: bool) -> None:
    """The clips, and the held-out pairs that every arm is measured on."""
    for split, count in _clip_counts(plan).items():
        folder = out / "clips" / split
        with one_at_a_time(folder.with_suffix(".lock")):
            if not (folder / "captions.jsonl").exists():
                write_clips(folder, count + OTHER_SPLIT, CLIP_SEEDS[split])
    build_pairs(store_config(plan, out, "heldout"), device, show)


def _clip_counts(plan: Plan) -> dict[str, int]:
    counts = {"train": plan.train_clips, "heldout": plan.heldout_clips}
    return counts | ({"few": min(FEW_CLIPS, plan.train_clips)} if "few" in plan.stores else {})


def store_folder(plan: Plan, out: Path, name: str) -> Path:
    """Holds pairs/train for an arm, pairs/heldout for evaluation."""
    return out / plan.folder / "stores" / name


def heldout_store(plan: Plan, out: Path, split: str) -> PairStore:
    """The "validation" or the "test" part of the held-out local pairs, of about the same size; they share no prompt."""
    store = PairStore(pairs_folder(store_config(plan, out, "heldout"), "heldout"))
    prompts = sorted(set(store.rows["prompt"]))
    wanted = set(prompts[0 if split == "validation" else 1 :: 2])
    return store.select([row for row, prompt in enumerate(store.rows["prompt"]) if prompt in wanted])


def store_config(plan: Plan, out: Path, name: str) -> Config:
    split = name if name in ("heldout", "few") else "train"
    clips = _clip_counts(plan)[split]
    share = clips / (clips + OTHER_SPLIT) if name == "heldout" else OTHER_SPLIT / (clips + OTHER_SPLIT)
    return run_config(
        plan,
        out,
        store_folder(plan, out, name),
        f"data.videos={json.dumps(str(out / 'clips' / split))}",
        f"data.heldout={share}",
        *plan.store_settings.get(name, ()),
    )


def _build_generated(plan: Plan, out: Path, split: str, device: torch.device, show: bool) -> None:
    """Several videos from the base for each prompt: that which the ranker finds best wins, the worst loses."""
    config = store_config(plan, out, "generated")
    local = PairStore(pairs_folder(store_config(plan, out, "bezier"), split))
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device))
    folder = pairs_folder(config, split)
    made = {"ranked_by": "ranker", "rollouts": plan.rollouts, **config.sample.model_dump(mode="json"), "seed": SEED}
    info = replace(local.info, kind="generated", pairs=len(local), made=made)
    members = [[pair_id, prompt] for pair_id, prompt in zip(local.ids, local.rows["prompt"], strict=True)]
    make = partial(_rank_rows, config, model, local, plan.rollouts)
    build_store(folder, model, info, members, make, "ranking generated pairs", show=show)


def _rank_rows(
    config: Config, model: VideoModel, local: PairStore, rollouts: int, rows: range, advance: Callable[[int], None]
) -> Made:
    data = config.data
    prompts = [local.rows[row]["prompt"] for row in rows]
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    made, scores = [], []
    for number in range(rollouts):
        latents = sample_latents(config, model, prompts, [rollouts * row + number for row in rows], SEED, shape)
        scores.append(small_world_score(prompts, model.decode_video(latents)))
        made.append(latents.cpu())
    order = np.argsort(np.stack(scores), axis=0, kind="stable")
    pairs = []
    recipe = sampler_terms(config, model) | {"network": model.fingerprint()}
    for i, row in enumerate(rows):
        worst, best = int(order[0, i]), int(order[-1, i])
        origin_w, origin_l = (
            Origin("rollout", (SEED, rollouts * row + number, 0, int(Stream.ROLLOUT)), recipe=recipe)
            for number in (best, worst)
        )
        mask = torch.ones_like(local[row].mask)
        pair = Pair(local.ids[row], "generated", prompts[i], local[row].text, made[best][i], made[worst][i], mask)
        pairs.append(replace(pair, origin_w=origin_w, origin_l=origin_l))
    advance(len(rows))
    return pairs, []


def time_pairs(plan: Plan, out: Path, device: torch.device) -> dict[str, float]:
    """Seconds that a local and a ranked pair take, one block of each in turn, twice over; the faster of the two."""
    local_config, config = store_config(plan, out, "bezier"), store_config(plan, out, "generated")
    store = PairStore(pairs_folder(local_config, "train"))
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device))
    count = min(TIMED_PAIRS, len(store))
    seconds: dict[str, list[float]] = {"local": [], "ranked": []}
    for _ in range(2):
        start = time.perf_counter()
        first = [store[row] for row in range(count)]
        for steps in {pair.steps for pair in first}:
            group = [pair for pair in first if pair.steps == steps]
            again(
                local_config, model, group, guided_text(local_config, model, [p.prompt for p in group], device), device
            )
        seconds["local"].append((time.perf_counter() - start) / count)
        start = time.perf_counter()
        _rank_rows(config, model, store, plan.rollouts, range(count), lambda done: None)
        seconds["ranked"].append((time.perf_counter() - start) / count)
    return {name: min(found) for name, found in seconds.items()} | {"rollouts": plan.rollouts}
