"""What a run and the one that resumes it must share, and what its pairs must fit."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from alignkit.config import OBJECTIVES, Config, ObjectiveSection, Section, TrainSection
from alignkit.errors import DataError
from alignkit.stores.folders import check_size
from alignkit.stores.pairs import PairStore

if TYPE_CHECKING:
    from alignkit.models import VideoModel

VERSION = 2
PATH = "scheduler"
FREE = {
    "steps", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "max_bad_steps", "restart", "accept",
    "reshape", "stuck_seconds", "validate_every", "validate_samples", "max_winner_error",
}  # fmt: skip
"""Of `train`: how long, how often to save and to look at it, and what to do when something is wrong."""


def run_terms(config: Config, store: PairStore | None, model: "VideoModel") -> dict[str, Any]:
    """By name; how long to train, unless the learning rate depends on it, and how often to save are free. store: None
    where pairs are made along the way.

    Raises DataError for pairs of another model.
    """
    if store is not None:
        _check_store(store, model, config)
    train = config.train.model_dump(mode="json", exclude=FREE)
    return {
        "version": VERSION,
        "model": model.fingerprint(),
        **({"model.expert": model.expert} if model.expert else {}),
        **({"pairs": store.fingerprint} if store is not None else {}),
        **{f"train.{key}": value for key, value in train.items()},
        **({"train.steps": config.train.steps} if config.train.schedule == "cosine" else {}),
        **{f"objective.{key}": value for key, value in config.objective.model_dump(mode="json").items()},
        **_changed_from_default("noise", config.noise, "source", "timesteps"),
        **({"noise.guidance": config.sampler.guidance} if config.noise.guided else {}),
        **_changed_from_default("reference", config.reference.model_copy(update={"cache": None}), "strategy"),
        "schedule": _schedule_of(config, model),
        PATH: _path_of(model),
        "model.max_sequence_length": config.model.max_sequence_length,
        "dtype": config.model.dtype,
        "deepspeed": config.deepspeed.model_dump(mode="json"),
    }


def _schedule_of(config: Config, model: "VideoModel") -> str | None:
    """Of the sampler's steps, where the run trains at them."""
    on_it = config.noise.timesteps in ("schedule", "adaptive") or config.noise.source != "shared"
    return model.schedule(config.sampler.num_steps).fingerprint if on_it else None


def _path_of(model: "VideoModel") -> str:
    """Of the noise levels that the model's scheduler gives a run to train at, its flow_shift for example."""
    coefficients, timesteps = model.training_path((torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    return hashlib.sha256(coefficients.numpy().tobytes() + timesteps.numpy().tobytes()).hexdigest()[:16]


def _changed_from_default(name: str, section: Section, *always: str) -> dict[str, Any]:
    """The keys of a section that are not at their defaults, and `always`: a key that is new changes no older run."""
    return {
        f"{name}.{key}": value
        for key, value in section.model_dump(mode="json").items()
        if key in always or key in section.model_dump(mode="json", exclude_defaults=True)
    }


def difference(stored: dict[str, Any], now: dict[str, Any], accept: tuple[str, ...] = ()) -> str | None:
    """The first term that is not what it was, in words, of those that are not in `accept`; None where all are."""
    for change in _changes(stored, now):
        if change["term"] not in accept:
            return f"{change['term']} = {change['was']!r}, now it is {change['now']!r}"
    return None


def accepted(stored: dict[str, Any], now: dict[str, Any], accept: tuple[str, ...]) -> list[dict[str, Any]]:
    """The terms in `accept` that are not what they were: {"term", "was", "now"} each."""
    return [change for change in _changes(stored, now) if change["term"] in accept]


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    if "train.gradient_checkpointing" in stored:  # as it was called, and was either
        stored = stored | {"train.checkpointing": "full" if stored["train.gradient_checkpointing"] else "none"}
    # what is now at its default
    left_out = [key for key in stored if key not in now and key.startswith(("noise.", "reference."))]
    changes = []
    for key in [*now, *left_out]:
        # a key that the version which wrote them did not have: as now by default
        was = stored[key] if key in stored else _default(key, now)
        if was != now.get(key) and not (key == "version" and stored.get(key, 1) < now[key]):
            changes.append({"term": key, "was": was, "now": now.get(key)})
    return changes


def _default(key: str, now: dict[str, Any]) -> Any:
    if key == PATH:
        return now[PATH]
    section, _, name = key.partition(".")
    if section == "objective" and name in OBJECTIVES.get(now.get("objective.name", ""), {}):
        return OBJECTIVES[now["objective.name"]][name]
    sections: dict[str, type[Section]] = {"objective": ObjectiveSection, "train": TrainSection}
    field = sections[section].model_fields.get(name) if section in sections else None
    return field.default if field else None


def _check_store(store: PairStore, model: "VideoModel", config: Config) -> None:
    """Pairs must come from this family's VAE, be of the size that the plan, validation and samples go by, and come from
    this network where a network made them."""
    for name in ("family", "model", "vae"):
        theirs = getattr(store.info, name)
        ours = model.family if name == "family" else model.fingerprint("transformer" if name == "model" else name)
        if theirs not in (None, ours):
            raise DataError(
                f"{store.folder}: its pairs were made with {name} {theirs!r}, but model.path "
                f"{config.model.path!r} is {ours!r}; build the pairs again with this model"
            )
    check_size(config, model, store)
    length, theirs = config.model.max_sequence_length, store.info.made.get("max_sequence_length")
    if theirs is not None and length < theirs and store.longest_text > length:
        raise DataError(
            f"{store.folder}: holds a caption of {store.longest_text} tokens, more than model.max_sequence_length, "
            f"{length}; put that back to {theirs}, with which the pairs were made"
        )
    if "strength_range" in OBJECTIVES[config.objective.name]:
        low, high = config.objective.strength_range
        for strength in {value for value in store.rows["strength"] if value is not None}:
            if not low <= strength <= high:
                raise DataError(
                    f"{store.folder}: has pairs of strength {strength:g}, outside objective.strength_range "
                    f"[{low:g}, {high:g}]; widen it, or build the pairs with other pairs.strengths"
                )
