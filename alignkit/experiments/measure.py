"""What is measured of a trained model: held-out pairs, samples, and how well it regenerates real regions."""

from typing import Any

import numpy as np
import torch

from alignkit.config import Config, ModelSection
from alignkit.evaluation.drawn import clip_features, judge
from alignkit.evaluation.measures import edge_energy, frechet_distance, motion_amount, temporal_flicker
from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.regions import again
from alignkit.evaluation.samples import sample_latents
from alignkit.localdpo.build import guided_text
from alignkit.media.videos import decode_clip
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.stores.folders import source_folder, video_spec
from alignkit.stores.pairs import PairStore

REGION_PAIRS = 32
"""As many held-out regions are regenerated: each takes as long as a sample."""


def measure(
    config: Config, section: ModelSection, store: PairStore, seed: int, count: int, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    """The numbers of one model on held-out pairs, and its samples uint8 [count, F, H, W, 3].

    section: the model; `config.model` is the base that it is compared with. store: pairs of clips never trained on,
    whose prompts are sampled `count` times from noise keyed by `seed`, the same for every arm.

    region_accuracy, global_accuracy: share of (pair, noise level) where the real clip is preferred, against the base.
    winner_error: mean denoising error on real clips; winner_error_change: over the base's, minus 1.
    region_error: mean squared difference of latents to the real clip inside regions that the model regenerates.
    The rest is `measure_samples`', and all there is of a few-step student.
    """
    dtype = working_dtype(config.model, device)
    if config.few_step_sampler:  # off its own steps a student's errors say nothing
        return measure_samples(config, section, store, seed, count, device)
    base = load_model(config.model, device=device, dtype=dtype)
    model = load_model(section, device=device, dtype=dtype)
    scores = describe(score_pairs(config, base, store, model.transformer, base.transformer, "scoring pairs", device))
    pictures, frames = measure_samples(config, section, store, seed, count, device)
    numbers = {
        "region_accuracy": scores["region_accuracy"],
        "global_accuracy": scores["global_accuracy"],
        "winner_error": scores["error_w_after"],
        "winner_error_change": scores["error_w_after"] / scores["error_w_before"] - 1,
        "loser_error_change": scores["error_l_after"] / scores["error_l_before"] - 1,
        "region_error": region_error(config, model, store, device),
    }
    return numbers | pictures, frames


def measure_samples(
    config: Config, section: ModelSection, store: PairStore, seed: int, count: int, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    """The numbers of one model's samples, and the samples uint8 [count, F, H, W, 3].

    fault_rate: share with a fault, by the judge; prompt_following: share with shape, colour and direction as prompted;
    good: share with both in order. faulty, followed: the same sample by sample, for paired intervals.
    frechet: Fréchet distance of samples to the real clips of `store`, on the judge's features.
    motion, flicker, edges: levels.
    """
    model = load_model(section, device=device, dtype=working_dtype(config.model, device))
    prompts = list(store.rows["prompt"])
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    frames = _samples(config, model, prompts, seed)
    judged = judge(prompts, frames)
    assert judged is not None
    return {
        "good": float(judged.good.mean()),
        "fault_rate": float(judged.faulty.mean()),
        "prompt_following": float(judged.followed.mean()),
        "frechet": frechet_distance(clip_features(frames), clip_features(_real_clips(config, store))),
        **_picture_numbers(frames),
        "faulty": judged.faulty.astype(int).tolist(),
        "followed": judged.followed.astype(int).tolist(),
    }, frames


def measure_ranking(config: Config, store: PairStore, device: torch.device) -> dict[str, float]:
    """What ranked generated pairs are worth to the judge: shares of winners and of losers that are good samples."""
    model = load_model(config.model, with_transformer=False, device=device)
    good: dict[str, list[bool]] = {"winner": [], "loser": []}
    for first in range(0, len(store), config.sample.batch_size):
        pairs = [store[row] for row in range(first, min(first + config.sample.batch_size, len(store)))]
        for side, found in good.items():
            frames = model.decode_video(torch.stack([getattr(pair, side) for pair in pairs]).to(device))
            judged = judge([pair.prompt for pair in pairs], frames)
            assert judged is not None
            found += judged.good.tolist()
    return {f"good_{side}s": float(np.mean(found)) for side, found in good.items()} | {"pairs": len(store)}


def measure_real(config: Config, store: PairStore, device: torch.device) -> dict[str, dict[str, float]]:
    """The store's real clips, as filmed and after the VAE, which no training changes: what could be reached."""
    model = load_model(config.model, with_transformer=False, device=device)
    filmed = _real_clips(config, store)
    rebuilt = torch.cat([model.decode_video(model.encode_video(part)) for part in filmed.split(16)])
    prompts = list(dict(zip(store.rows["source"], store.rows["prompt"], strict=True)).values())
    found = {}
    for name, clips in (("real clips", filmed), ("real clips after the VAE", rebuilt)):
        judged = judge(prompts, clips)
        assert judged is not None
        shares = {"good": judged.good, "fault_rate": judged.faulty, "prompt_following": judged.followed}
        found[name] = {key: float(value.mean()) for key, value in shares.items()} | _picture_numbers(clips)
    return found


def _real_clips(config: Config, store: PairStore) -> torch.Tensor:
    folder, spec = source_folder(config), video_spec(config)
    return torch.stack([decode_clip(folder / name, spec) for name in dict.fromkeys(store.rows["source"])])


def _picture_numbers(frames: torch.Tensor) -> dict[str, float]:
    measures = {"motion": motion_amount, "flicker": temporal_flicker, "edges": edge_energy}
    return {name: measure_(frames).mean().item() for name, measure_ in measures.items()}


def _samples(config: Config, model: VideoModel, prompts: list[str], seed: int) -> torch.Tensor:
    data, size = config.data, config.sample.batch_size
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    parts = []
    for first in range(0, len(prompts), size):
        chosen = prompts[first : first + size]
        ids = list(range(first, first + len(chosen)))
        parts.append(
            model.decode_video(sample_latents(config, model, chosen, ids, seed, shape, config.few_step_sampler))
        )
    return torch.cat(parts)


def region_error(config: Config, model: VideoModel, store: PairStore, device: torch.device) -> float:
    """Mean over the first REGION_PAIRS pairs of the mean squared latent difference to the real clip, inside the pair's
    mask, after `model` has regenerated the region at the pair's own strength."""
    pairs = sorted((store[row] for row in range(min(REGION_PAIRS, len(store)))), key=lambda pair: pair.steps or 0)
    errors = []
    for steps in dict.fromkeys(pair.steps for pair in pairs):
        group = [pair for pair in pairs if pair.steps == steps]
        for first in range(0, len(group), config.pairs.batch_size):
            batch = group[first : first + config.pairs.batch_size]
            clean = torch.stack([pair.winner for pair in batch]).to(device)
            mask = torch.stack([pair.mask for pair in batch])
            text = guided_text(config, model, [pair.prompt for pair in batch], device)
            redone = again(config, model, batch, text, device)
            inside = mask.to(device).bool().expand_as(clean)
            squares = torch.where(inside, (redone - clean).square(), 0.0).double().flatten(1).sum(1)
            errors += (squares / inside.flatten(1).sum(1)).tolist()
    return float(np.mean(errors))
