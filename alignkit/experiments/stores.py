"""The experiment's clips and pair stores: local pairs with either mask, ranked generated pairs, held-out pairs."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from alignkit.config import Config
from alignkit.evaluation.samples import sample_latents
from alignkit.evaluation.summary import attributes_in, thumbnails
from alignkit.experiments.plan import Plan, run_config
from alignkit.localdpo.build import build_pairs
from alignkit.models import load_model, working_dtype
from alignkit.objectives.states.checks import sampler_terms
from alignkit.sharing import one_at_a_time
from alignkit.stores.blocks import Made, build_store
from alignkit.stores.folders import pairs_folder
from alignkit.stores.origins import Origin
from alignkit.stores.pairs import Pair, PairStore
from alignkit.tiny.classifier import log_probability
from alignkit.tiny.clips import write_clips
from alignkit_kernels import Stream

CLIP_SEEDS = {"train": 31_000, "heldout": 32_000}
"""Neither is a seed of the shipped weights' clips, nor of the demo's."""
ROLLOUT_SEEDS = {"train": 33_000, "heldout": 34_000}
OTHER_SPLIT = 1  # `alignkit pairs` wants a clip on either side of its split


def prepare(plan: Plan, out: Path, device: torch.device, show: bool) -> None:
    """Draw the clips and make every store that the plan's arms need; processes share the work."""
    for split, count in (("train", plan.train_clips), ("heldout", plan.heldout_clips)):
        folder = out / "clips" / split
        with one_at_a_time(folder.with_suffix(".lock")):
            if not (folder / "captions.jsonl").exists():
                write_clips(folder, count + OTHER_SPLIT, CLIP_SEEDS[split])
    build_pairs(_store_config(plan, out, "heldout"), device, show)
    for name in plan.stores:
        if name == "generated":
            for split in CLIP_SEEDS:
                _build_generated(plan, out, split, device, show)
        else:
            build_pairs(_store_config(plan, out, name), device, show)


def store_folder(plan: Plan, out: Path, name: str) -> Path:
    """Holds pairs/train for an arm, pairs/heldout for evaluation."""
    return out / plan.family / "stores" / name


def heldout_store(plan: Plan, out: Path, split: str, *, kind: str = "heldout") -> PairStore:
    """The "validation" or the "test" part of the held-out pairs, of about the same size; they share no prompt.

    kind: "heldout", the local pairs of every arm's measures, or "generated", two samples for each of their prompts.
    """
    store = PairStore(pairs_folder(_store_config(plan, out, kind), "heldout"))
    prompts = sorted(set(store.rows["prompt"]))
    wanted = set(prompts[0 if split == "validation" else 1 :: 2])
    return store.select([row for row, prompt in enumerate(store.rows["prompt"]) if prompt in wanted])


def _store_config(plan: Plan, out: Path, name: str) -> Config:
    split = "heldout" if name == "heldout" else "train"
    clips = plan.heldout_clips if name == "heldout" else plan.train_clips
    share = clips / (clips + OTHER_SPLIT) if name == "heldout" else OTHER_SPLIT / (clips + OTHER_SPLIT)
    return run_config(
        plan,
        out,
        store_folder(plan, out, name),
        f"data.videos={json.dumps(str(out / 'clips' / split))}",
        f"data.heldout={share}",
        f"pairs.mask.shape={'rectangle' if name == 'rectangle' else 'bezier'}",
    )


def _build_generated(plan: Plan, out: Path, split: str, device: torch.device, show: bool) -> None:
    """Two videos from the base for each prompt; the one whose prompt the classifier finds likelier wins."""
    config = _store_config(plan, out, "generated")
    local = PairStore(pairs_folder(_store_config(plan, out, "bezier" if split == "train" else split), split))
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device))
    folder, seed = pairs_folder(config, split), ROLLOUT_SEEDS[split]
    made = {"ranked_by": "classifier", **config.sample.model_dump(mode="json"), "seed": seed}
    info = replace(local.info, kind="generated", pairs=len(local), made=made)
    members = [[pair_id, prompt] for pair_id, prompt in zip(local.ids, local.rows["prompt"], strict=True)]
    make = partial(_rank_rows, config, model, local, seed)
    build_store(folder, model, info, members, make, "ranking generated pairs", show=show)


def _rank_rows(config: Config, model, local: PairStore, seed: int, rows: range, advance: Callable[[int], None]) -> Made:
    data = config.data
    prompts = [local.rows[row]["prompt"] for row in rows]
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    sides = []
    for side in range(2):
        latents = sample_latents(config, model, prompts, [2 * row + side for row in rows], seed, shape)
        score = log_probability(thumbnails(model.decode_video(latents)), [attributes_in(prompt) for prompt in prompts])
        sides.append((latents.cpu(), score))
    (first, first_score), (second, second_score) = sides
    pairs = []
    recipe = sampler_terms(config, model) | {"network": model.fingerprint()}
    for i, row in enumerate(rows):
        winner, loser = (first[i], second[i]) if first_score[i] >= second_score[i] else (second[i], first[i])
        mask = torch.ones_like(local[row].mask)
        better = 2 * row + int(first_score[i] < second_score[i])
        origin_w, origin_l = (
            Origin("rollout", (seed, number, 0, int(Stream.ROLLOUT)), recipe=recipe)
            for number in (better, 4 * row + 1 - better)
        )
        pair = Pair(local.ids[row], "generated", prompts[i], local[row].text, winner, loser, mask)
        pairs.append(replace(pair, origin_w=origin_w, origin_l=origin_l))
    advance(len(rows))
    return pairs, []
