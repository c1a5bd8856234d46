"""What is measured of a trained model: held-out pairs, samples, and how well it regenerates real regions."""

import numpy as np
import torch

from alignkit.config import Config, ModelSection
from alignkit.evaluation.measures import edge_energy, frechet_distance, motion_amount, temporal_flicker
from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.samples import sample_latents
from alignkit.evaluation.summary import attributes_in, clip_features, thumbnails
from alignkit.localdpo.build import guided_network
from alignkit.localdpo.corruption import regenerate
from alignkit.media.videos import decode_clip
from alignkit.models import load_model, working_dtype
from alignkit.stores.folders import source_folder, video_spec
from alignkit.stores.pairs import PairStore
from alignkit.tiny.classifier import NAMED, classify, log_probability
from alignkit_kernels import NoiseKey, Stream

REGION_DRAW = 1  # other noise than that of draw 0, which made the stored losers


def measure(
    config: Config,
    section: ModelSection,
    store: PairStore,
    generated: PairStore | None,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, float], torch.Tensor]:
    """The numbers of one model on held-out pairs, and its samples uint8 [count, F, H, W, 3].

    section: the model; `config.model` is the base that it is compared with. store: pairs of clips never trained on,
    whose prompts are sampled from noise keyed by `seed`, the same for every arm. generated: ranked samples for the same
    prompts.

    region_accuracy, global_accuracy: share of (pair, noise level) where the real clip is preferred, against the base.
    generated_accuracy: share of (generated pair, noise level) where the winner is preferred, against the base.
    winner_error: mean denoising error on real clips; winner_error_change: over the base's, minus 1.
    region_error: mean squared difference of latents to the real clip inside regions that the model regenerates.
    frechet: Fréchet distance of samples to the real clips of `store`, on the shipped classifier's features.
    motion, flicker, edges: levels; named: share of samples with shape, colour and motion as prompted.
    """
    dtype = working_dtype(config.model, device)
    base = load_model(config.model, device=device, dtype=dtype)
    model = load_model(section, device=device, dtype=dtype)
    compared = {"local": store} | ({"generated": generated} if generated else {})
    scores = {
        name: describe(score_pairs(config, base, pairs, model.transformer, base.transformer, f"scoring {name}", device))
        for name, pairs in compared.items()
    }
    prompts = list(store.rows["prompt"])
    prompts = [prompts[i % len(prompts)] for i in range(config.sample.count)]
    frames = _samples(config, model, prompts, seed)
    real = _real_clips(config, store)
    right = _as_prompted(thumbnails(frames), [attributes_in(prompt) for prompt in prompts])
    numbers = {
        "region_accuracy": scores["local"]["region_accuracy"],
        "global_accuracy": scores["local"]["global_accuracy"],
        **({"generated_accuracy": scores["generated"]["global_accuracy"]} if generated else {}),
        "winner_error": scores["local"]["error_w_after"],
        "winner_error_change": scores["local"]["error_w_after"] / scores["local"]["error_w_before"] - 1,
        "region_error": region_error(config, model, store, device),
        "frechet": frechet_distance(clip_features(frames), clip_features(real)),
        **_picture_numbers(frames),
        "named": float(np.mean(right)),
    }
    return numbers, frames


def measure_ranking(config: Config, store: PairStore, device: torch.device) -> dict[str, float]:
    """What ranked generated pairs are worth: share whose loser follows its prompt too, and the median of the margin, in
    nats, by which the classifier finds the winner's prompt likelier."""
    model = load_model(config.model, with_transformer=False, device=device)
    margins, followed = [], []
    for first in range(0, len(store), config.sample.batch_size):
        pairs = [store[row] for row in range(first, min(first + config.sample.batch_size, len(store)))]
        wanted = [attributes_in(pair.prompt) for pair in pairs]
        winners, losers = (
            thumbnails(model.decode_video(torch.stack([getattr(pair, side) for pair in pairs]).to(device)))
            for side in ("winner", "loser")
        )
        margins += (log_probability(winners, wanted) - log_probability(losers, wanted)).tolist()
        followed += _as_prompted(losers, wanted)
    return {"losers_that_follow": float(np.mean(followed)), "median_margin": float(np.median(margins))}


def measure_real(config: Config, store: PairStore, device: torch.device) -> dict[str, dict[str, float]]:
    """Motion, flicker and edges of the store's real clips, as filmed and after the VAE, which no training changes."""
    model = load_model(config.model, with_transformer=False, device=device)
    filmed = _real_clips(config, store)
    rebuilt = torch.cat([model.decode_video(model.encode_video(part)) for part in filmed.split(16)])
    return {"real clips": _picture_numbers(filmed), "real clips after the VAE": _picture_numbers(rebuilt)}


def _real_clips(config: Config, store: PairStore) -> torch.Tensor:
    folder, spec = source_folder(config), video_spec(config)
    return torch.stack([decode_clip(folder / name, spec) for name in dict.fromkeys(store.rows["source"])])


def _as_prompted(frames: torch.Tensor, wanted: list[dict[str, str]]) -> list[bool]:
    seen = classify(frames)
    return [all(seen[name][i] == entry[name] for name in NAMED) for i, entry in enumerate(wanted)]


def _picture_numbers(frames: torch.Tensor) -> dict[str, float]:
    measures = {"motion": motion_amount, "flicker": temporal_flicker, "edges": edge_energy}
    return {name: measure_(frames).mean().item() for name, measure_ in measures.items()}


def _samples(config: Config, model, prompts: list[str], seed: int) -> torch.Tensor:
    data, size = config.data, config.sample.batch_size
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    parts = []
    for first in range(0, len(prompts), size):
        chosen = prompts[first : first + size]
        ids = list(range(first, first + len(chosen)))
        parts.append(model.decode_video(sample_latents(config, model, chosen, ids, seed, shape)))
    return torch.cat(parts)


def region_error(config: Config, model, store: PairStore, device: torch.device) -> float:
    """Mean over pairs of the mean squared latent difference to the real clip, inside the pair's mask, after `model`
    has regenerated the region at the pair's own strength."""
    pairs = sorted(store, key=lambda pair: pair.steps)
    schedule = model.schedule(config.pairs.num_inference_steps)
    errors = []
    for steps in dict.fromkeys(pair.steps for pair in pairs):
        group = [pair for pair in pairs if pair.steps == steps]
        for first in range(0, len(group), config.pairs.batch_size):
            batch = group[first : first + config.pairs.batch_size]
            clean = torch.stack([pair.winner for pair in batch]).to(device)
            mask = torch.stack([pair.mask for pair in batch])
            key = NoiseKey(config.pairs.seed, torch.tensor([pair.id for pair in batch]), REGION_DRAW, Stream.CORRUPTION)
            predict = guided_network(config, model, [pair.prompt for pair in batch], device)
            again = regenerate(clean, mask, predict, schedule, key, steps)
            inside = mask.to(device).bool().expand_as(clean)
            squares = torch.where(inside, (again - clean).square(), 0.0).double().flatten(1).sum(1)
            errors += (squares / inside.flatten(1).sum(1)).tolist()
    return float(np.mean(errors))
