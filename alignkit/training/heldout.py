"""Held-out pairs at fixed points of the inference schedule, with fixed noise: what a model is scored by."""

from dataclasses import dataclass

import torch

from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.models import VideoModel
from alignkit.objectives.states import States, evaluation_states
from alignkit.stores.pairs import PairBatch, PairStore
from alignkit.training.run import load_rows
from alignkit_kernels import NoiseKey, Stream


@dataclass(frozen=True)
class Point:
    """Rows `pairs` of a store, which go through a network at once, at row `row` of the schedule, with noise `draw`."""

    row: int
    draw: int
    pairs: range


def points(config: Config, model: VideoModel, store: PairStore) -> list[Point]:
    """All that pairs are scored at: by position, then draw, then pair."""
    section, size = config.evaluation, config.evaluation.batch_size
    return [
        Point(row, number * section.draws + draw, range(first, min(first + size, len(store))))
        for number, row in enumerate(rows_of(config, model))
        for draw in range(section.draws)
        for first in range(0, len(store), size)
    ]


def rows_of(config: Config, model: VideoModel) -> list[int]:
    """The rows of the schedule that `evaluation.positions` are; of two experts, those of the trained one. Raises
    ConfigError where none is."""
    timesteps = model.schedule(config.sample.num_inference_steps).timesteps
    first, end = model.own_timesteps
    rows = [int(position * len(timesteps)) for position in config.evaluation.positions]
    own = [row for row in rows if first <= timesteps[row] < end]
    if not own:
        raise ConfigError(
            f"evaluation.positions: none is in the range of model.expert {model.expert}; add "
            f"{'lower' if model.expert == 'high' else 'higher'} ones"
        )
    return own


def shape_of(config: Config, model: VideoModel, store: PairStore) -> tuple[int, int, int]:
    """(positions, draws, pairs) of what is joined from all `points`."""
    return len(rows_of(config, model)), config.evaluation.draws, len(store)


def shown_at(
    config: Config, model: VideoModel, store: PairStore, point: Point, device: torch.device, dtype: torch.dtype
) -> tuple[PairBatch, States]:
    """The pairs of a point, and what a network in `dtype` is shown of them: noise keyed by (seed, pair id, draw)."""
    schedule = model.schedule(config.sample.num_inference_steps)
    batch = load_rows(store, list(point.pairs), device)
    key = NoiseKey(config.evaluation.seed, batch.ids, point.draw, Stream.EVALUATION)
    coefficients = schedule.coefficients[point.row].expand(len(batch), 4)
    timesteps = schedule.timesteps[point.row].expand(len(batch))
    return batch, evaluation_states(model, batch, coefficients, timesteps, key, dtype)
