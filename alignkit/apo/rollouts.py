"""`alignkit rollout`: K videos for each prompt, from keyed noise, with states of their paths where training needs them.

Also from inside a training run, through the engine's own weights (`roll_out`).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.apo.inversions import versions
from alignkit.apo.prompts import read_prompts
from alignkit.config import Config
from alignkit.media.captions import Problem
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.models.context import TokenGroup, context_terms
from alignkit.objectives.laws import Law, stored_rows
from alignkit.objectives.states.checks import check_noise, sampler_terms
from alignkit.progress import say
from alignkit.stores.blocks import build_blocks, build_together, one_thread
from alignkit.stores.folders import check_membership, latent_grid
from alignkit.stores.origins import Origin, Trajectory
from alignkit.stores.rollouts import Rollout, RolloutStore, write_rollouts
from alignkit.stores.store import StoreInfo, check_terms, has_blocks, open_for_building
from alignkit_kernels import NoiseKey, Stream, keyed_randn

FIRST_DRAW = 1
"""Draw 0 of the stream is what `alignkit sample` starts from, to judge by; training has its own noise."""


def rollouts_folder(config: Config) -> Path:
    return config.rollout.folder or config.output.dir / "rollouts"


@dataclass(frozen=True)
class Sampling:
    """What rollouts are sampled by: the model with its network, the law that draws which states are kept, and what each
    rollout's origin says of it. rows: of the schedule, whose states are kept of all rollouts, instead of drawn ones."""

    config: Config
    model: VideoModel
    law: Law
    prompts: list[str]
    recipe: dict[str, Any]
    rows: tuple[int, ...] | None = None

    @property
    def draw(self) -> int:
        return FIRST_DRAW + self.config.rollout.round


def build_rollouts(
    config: Config,
    device: torch.device,
    show: bool = True,
    preview: Callable[[VideoModel, RolloutStore], None] | None = None,
    group: TokenGroup | None = None,
) -> int:
    """Sample every rollout that is not stored yet; returns how many are planned.

    Any number of processes may call this at once: they share the blocks between them. Rollout k of prompt number p (the
    order of `data.prompts`) has the id p·K + k and starts from the noise of key (rollout.seed, id, 1 + rollout.round,
    stream "rollout"): the same bits whoever makes it, in one regime of engine, dtype, attention and batch. preview is
    called with the first block and with the whole store. group: this process's, whose first it is, where others follow
    its network.

    Raises ConfigError, DataError or ModelError for what cannot be sampled, and DataError for a folder that holds
    rollouts of other prompts, weights, schedule or versions.
    """
    prompts = read_prompts(config.data.prompts)
    latent_grid(config)
    check_noise(config, load_model(config.model, with_transformer=False, with_encoders=False))
    folder, members = rollouts_folder(config), [[prompt] for prompt in prompts]
    if has_blocks(folder):
        check_membership(folder, members, "prompts")  # before weights load
    if show:
        say(f"{len(prompts)} prompts; loading {config.model.family} from {config.model.path}")
    model = load_model(config.model, device=device, dtype=working_dtype(config.model, device), group=group)
    sampling = start_sampling(config, model, prompts, engine="module", network=model.fingerprint())
    info = store_info(sampling)
    open_for_building(folder, info)
    check_membership(folder, members, "prompts")

    def look(blocks: tuple[int, ...] | None = None) -> None:
        if preview is not None:
            preview(model, RolloutStore(folder, blocks))

    def make(rows: range, advance: Callable[[int], None]) -> tuple[list[Rollout], list[Problem]]:
        return sample_rows(sampling, rows, advance), []

    with one_thread(device):
        build_blocks(folder, info, make, "sampling", write=write_rollouts, first=partial(look, (0,)), show=show)
    look()
    return info.pairs


def roll_out(
    config: Config,
    process: Any,
    model: VideoModel,
    engine: Any,
    prompts: list[str],
    folder: Path,
    *,
    network: str,
    agree: Callable[[Callable[[], list[int]]], list[int]],
    rows: tuple[int, ...] | None = None,
    between: Callable[[], None] = lambda: None,
    show: bool = True,
) -> RolloutStore:
    """Rollouts of `prompts` in `folder` through a training engine's own weights; every process calls this.

    model: its parts beside the network, text encoder included. engine: DeepSpeed's, of whatever ZeRO stage: all
    processes run equally many forwards, however many prompts there are, and no weights are copied. network: what tells
    these weights from others, for the rollouts' origins. agree and between: as in `build_together`. rows: as in
    `Sampling`.
    """
    sampler = copy.copy(model)
    sampler.transformer, sampler.dtype = engine, next(engine.parameters()).dtype
    sampler.attention = getattr(model, "attention", None)
    kind = f"zero{engine.zero_optimization_stage()}" if hasattr(engine, "zero_optimization_stage") else "module"
    sampling = replace(start_sampling(config, sampler, prompts, engine=kind, network=network), rows=rows)
    info = store_info(sampling)

    def prepare() -> list[int]:
        open_for_building(folder, info)
        check_membership(folder, [[prompt] for prompt in prompts], "prompts")
        return []

    agree(prepare)  # refused on all of them
    training = engine.training
    engine.eval()
    try:
        with one_thread(model.vae.device):
            build_together(
                folder,
                info,
                partial(_whole_block, sampling),
                "sampling",
                write=write_rollouts,
                rank=process.rank,
                world_size=process.world_size,
                agree=agree,
                check=lambda: check_terms(folder, info),
                between=between,
                side_by_side=config.train.context_parallel,
                show=show and process.main,
            )
    finally:
        engine.train(training)
    return RolloutStore(folder)


def start_sampling(config: Config, model: VideoModel, prompts: list[str], *, engine: str, network: str) -> Sampling:
    rollout, data = config.rollout, config.data
    regime = {
        "engine": engine,
        "device": model.vae.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention,
        "batch": rollout.batch_size,
        **context_terms(model),
        "max_sequence_length": config.model.max_sequence_length,
        "latents": list(model.latent_shape(data.num_frames, data.height, data.width)),
    }
    recipe = sampler_terms(config, model) | {"network": network, "regime": regime, "versions": versions()}
    return Sampling(config, model, check_noise(config, model), prompts, recipe)


def store_info(sampling: Sampling) -> StoreInfo:
    config, model = sampling.config, sampling.model
    rollout, noise = config.rollout, config.noise
    kept = ("source", "timesteps", "interval", "path_steps", "path_between")
    states = {key: noise.model_dump(mode="json")[key] for key in kept} if noise.stores_states else None
    if states and config.model.expert:
        states["expert"] = config.model.expert  # whose steps they are at
    if sampling.rows is not None:
        states = {"source": "path", "rows": list(sampling.rows), "path_between": noise.path_between}
    regime, libraries = sampling.recipe["regime"], sampling.recipe["versions"]
    return StoreInfo(
        kind="rollout",
        family=model.family,
        model=sampling.recipe["network"],
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        pairs=len(sampling.prompts) * rollout.per_prompt,
        block_size=rollout.block_size,
        made={key: value for key, value in sampling.recipe.items() if key not in ("network", "regime", "versions")}
        | {f"regime.{key}": value for key, value in regime.items()}
        | {f"version of {key}": value for key, value in libraries.items()}
        | {"per_prompt": rollout.per_prompt, "seed": rollout.seed, "round": rollout.round, "states": states},
        holds="rollouts",
    )


def sample_rows(
    sampling: Sampling, rows: Sequence[int], advance: Callable[[int], None] = lambda count: None
) -> list[Rollout]:
    """The rollouts of planned rows `rows`, `rollout.batch_size` at once; the last batch is filled up, since on most
    devices the bits of a batch depend on its size."""
    size, made = sampling.config.rollout.batch_size, []
    for first in range(0, len(rows), size):
        numbers = list(rows[first : first + size])
        filled = numbers + [numbers[-1]] * (size - len(numbers))
        made += _sample(sampling, filled)[: len(numbers)]
        advance(len(numbers))
    return made


def _whole_block(sampling: Sampling, rows: range) -> list[Rollout]:
    """The same with as many forwards for the last block, which may be shorter, as for every other."""
    full = rows.start + sampling.config.rollout.block_size
    last = len(sampling.prompts) * sampling.config.rollout.per_prompt - 1
    return sample_rows(sampling, [min(row, last) for row in range(rows.start, full)])[: len(rows)]


def _sample(sampling: Sampling, numbers: list[int]) -> list[Rollout]:
    config, model, sampler = sampling.config, sampling.model, sampling.config.sampler
    device, per_prompt = model.vae.device, config.rollout.per_prompt
    prompts = [sampling.prompts[number // per_prompt] for number in numbers]
    kept = [_kept_rows(sampling, number // per_prompt) for number in numbers]
    states: list[dict[int, Tensor]] = [{} for _ in numbers]

    def watch(row: int, state: Tensor) -> None:
        for own, rows, one in zip(states, kept, state, strict=True):
            if row in rows or (config.noise.path_between and row - 1 in rows):
                own[row] = one.float().cpu()

    key = NoiseKey(config.rollout.seed, torch.tensor(numbers), sampling.draw, Stream.ROLLOUT)
    latents = model.sample(
        keyed_randn((len(numbers), *sampling.recipe["regime"]["latents"]), key, device=device),
        model.pad_text(model.encode_text(prompts)).to(device, model.dtype),
        model.pad_text(model.encode_text([sampler.negative_prompt] * len(numbers))).to(device, model.dtype),
        num_steps=sampler.num_steps,
        guidance=sampler.guidance,
        dynamic=sampler.dynamic,
        solver=sampler.solver,
        watch=watch,
    )
    return [
        Rollout(
            id=number,
            prompt_id=number // per_prompt,
            prompt=prompt,
            latents=video.float().cpu(),
            origin=Origin(
                "rollout", (config.rollout.seed, number, sampling.draw, int(Stream.ROLLOUT)), recipe=sampling.recipe
            ),
            path_rows=rows,
            path=_trajectory(own, rows, config.noise.path_between),
        )
        for number, prompt, video, rows, own in zip(numbers, prompts, latents, kept, states, strict=True)
    ]


def _kept_rows(sampling: Sampling, prompt: int) -> tuple[int, ...]:
    """Drawn by the timestep law for the prompt, so that any two of its rollouts share them."""
    config = sampling.config
    if sampling.rows is not None:
        return sampling.rows
    if not config.noise.stores_states:
        return ()
    return stored_rows(sampling.law, config.noise.path_steps, config.rollout.seed, prompt, sampling.draw)


def _trajectory(states: dict[int, Tensor], rows: tuple[int, ...], between: bool) -> Trajectory | None:
    if not rows:
        return None
    following = torch.stack([states[row + 1] for row in rows]) if between else None
    return Trajectory(torch.stack([states[row] for row in rows]), following)
