"""At which states a pair is compared: its point of the path, its noise and its caption.

Each noise source is a file of this package; a new one is its file, a line in SOURCES and a name in `noise.source`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alignkit.config import Config
from alignkit.models import VideoModel, family_module
from alignkit.objectives.laws import Law, PathPoints
from alignkit.objectives.states.noised import Noised, noise_alike
from alignkit.objectives.states.own import own
from alignkit.objectives.states.shared import shared
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import NoiseKey, NoiseSource, Stream, keyed_rand

Source = Callable[[Config, Law, PairBatch, Tensor], Noised]
"""From the run's settings and timestep law, B pairs and the epochs they are in (int64 [B]) to their noised videos."""

SOURCES: dict[str, Source] = {"shared": shared, "initial": own, "path": own, "inversion": own}
"""By `noise.source`."""


@dataclass(frozen=True)
class States:
    """What the network is shown for B pairs, winners first, and what the errors are taken against.

    inputs: [2B, ...]; timesteps: fp32 [2B]; text: [2B, L, D]; coefficients: fp64 [B, 4], of both sides.
    noise_w, noise_l: of each side, None for the winner's own. weight: fp64 [B], by which a pair's loss is multiplied;
    None for 1. rows: int64 [B], the rows of the sampler's schedule that the pairs are at; None off it. negative:
    [2B, L, D], where predictions are guided, by `guidance`; else None.
    """

    inputs: Tensor
    timesteps: Tensor
    text: Tensor
    coefficients: Tensor
    noise_w: NoiseSource
    noise_l: NoiseSource | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    negative: Tensor | None = None
    guidance: float = 1.0


def predictions(model: VideoModel, network: nn.Module, states: States, part: slice = slice(None)) -> Tensor:
    """What `network`, which may be an engine, answers to `states`, or to a `part` of its inputs: [2B, ...].

    Guided states take both branches in one forward, uncond + g·(cond − uncond); the sampler takes them one after the
    other, which differs by rounding.
    """
    predict = family_module(model.family).predict
    inputs, timesteps, text = (x[part] for x in (states.inputs, states.timesteps, states.text))
    if states.negative is None:
        return predict(network, inputs, timesteps, text)
    both = torch.cat([inputs] * 2), torch.cat([timesteps] * 2), torch.cat([states.negative[part], text])
    unconditional, conditional = predict(network, *both).float().chunk(2)
    return unconditional + states.guidance * (conditional - unconditional)


def show(model: VideoModel, noised: Noised, text: list[Tensor], dtype: torch.dtype) -> States:
    """The states of noised pairs with a text each, as a network in `dtype` takes them."""
    device = noised.winner.device
    padded = model.pad_text(text).to(device, dtype)
    return States(
        inputs=torch.cat([noised.winner, noised.loser]).to(dtype),
        timesteps=noised.timesteps.to(device, torch.float32).repeat(2),
        text=padded.repeat(2, 1, 1),
        **{name: getattr(noised, name) for name in ("coefficients", "noise_w", "noise_l", "weight", "rows")},
    )


def training_states(
    config: Config, model: VideoModel, law: Law, batch: PairBatch, epochs: Tensor, empty_text: Tensor,
    dtype: torch.dtype, negative_text: Tensor | None = None,
) -> States:  # fmt: skip
    """The states that training visits in `epochs` (int64 [B]), by the noise source and timestep law of the run.

    A share `train.caption_dropout` of pairs is shown with `empty_text` [tokens, D], winner and loser together:
    a function of (seed, pair id, epoch). negative_text [tokens, D] is what `noise.guided` guides away from.
    """
    key = NoiseKey(config.train.seed, batch.ids, epochs, Stream.CAPTION_DROPOUT)
    dropped = keyed_rand((len(batch), 1), key, device="cpu", dtype=torch.float64)[:, 0] < config.train.caption_dropout
    text = [empty_text if drop else own for own, drop in zip(batch.text, dropped.tolist(), strict=True)]
    noised = SOURCES[config.noise.source](config, law, batch, epochs)
    states = show(model, noised, text, dtype)
    if not config.noise.guided:
        return states
    assert negative_text is not None
    negative = model.pad_text([negative_text]).to(states.text).expand_as(states.text)
    return replace(states, negative=negative, guidance=config.sampler.guidance)


def evaluation_states(
    model: VideoModel, batch: PairBatch, coefficients: Tensor, timesteps: Tensor, key: NoiseKey, dtype: torch.dtype
) -> States:
    """Both videos of each pair with the noise of `key` at one point, coefficients [B, 4], timesteps [B]."""
    return show(model, noise_alike(batch, PathPoints(coefficients, timesteps), key), batch.text, dtype)
