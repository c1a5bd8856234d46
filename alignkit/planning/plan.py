"""A run's plan: each of its stages on so many GPUs of a kind, and what would make it fit where it does not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alignkit.apo.students import teacher_config
from alignkit.config import Config, changed
from alignkit.errors import ConfigError
from alignkit.objectives.preference import needs_reference
from alignkit.planning import work
from alignkit.planning.constants import FILLED, Gpu
from alignkit.planning.counting import Forward, forward_of
from alignkit.planning.memory import Memory, Parameters, memory, parameters
from alignkit.planning.outline import Outline, outline
from alignkit.planning.preset import AUTO, Choice, choose, room_of, with_preset
from alignkit.planning.regime import DTYPES, Regime, regime
from alignkit.stages import STUDENTS, SUPPLIED, stage_configs
from alignkit.training.context import PAIRS_KEY, ROLLOUT_KEY, check_lengths, check_split

MOST_GPUS = 1024


@dataclass(frozen=True)
class Stage:
    """One training run. config: with the preset that `choice` took, where it was left to it. rollouts: how many videos
    it samples along the way and their FLOPs, of all GPUs; None where it samples none or for an unknown number of
    prompts."""

    name: str
    config: Config
    run: Regime
    count: Parameters
    memory: Memory
    step: work.Step
    rollouts: tuple[int, float] | None
    choice: Choice | None = None

    @property
    def seconds(self) -> float:
        return self.config.train.steps * self.step.time


@dataclass(frozen=True)
class Plan:
    config: Config
    gpu: Gpu
    gpus: int
    outline: Outline
    forward: Forward
    stages: list[Stage]
    switches: list[tuple[str, float]] = field(default_factory=list)
    """Where it does not fit: what to turn, one after the other, and the bytes a GPU needs then."""

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool:
        return self.largest.memory.fits(self.gpu)


def plan(config: Config, gpu: Gpu, gpus: int) -> Plan:
    """Raises ConfigError for what a run of `config` on so many GPUs would be refused for, ModelError for a model whose
    sizes are not here."""
    found = outline(config)
    forward = forward_of(found, config, DTYPES[config.model.dtype])
    stages = [
        _stage(name, stage, gpu, gpus, found, forward, later=number > 0)
        for number, (name, stage) in enumerate(_stages(config))
    ]
    whole = Plan(config, gpu, gpus, found, forward, stages)
    return whole if whole.fits else Plan(config, gpu, gpus, found, forward, stages, _switches(whole))


def _stages(config: Config) -> list[tuple[str, Config]]:
    return stage_configs(config) if config.stages else [("train", config)]


def _stage(
    name: str, config: Config, gpu: Gpu, gpus: int, found: Outline, forward: Forward, *, later: bool = False
) -> Stage:
    data = config.data
    count = parameters(found, config, DTYPES[config.model.dtype])
    choice = None
    if config.deepspeed.preset == AUTO:
        choice = choose(config, found, count, room_of(gpu), gpus, later=later)
        config = with_preset(config, choice.preset)
    run = regime(config, gpus, later=later)
    grid = found.model.latent_grid(data.num_frames, data.height, data.width)
    network = found.network(1, run.dtype).config
    check_lengths(config, network, grid)
    for key, degree in ((PAIRS_KEY, config.pairs.context_parallel), (ROLLOUT_KEY, config.rollout.context_parallel)):
        check_split(key, degree, config.model, network, grid)
    step = work.step_work(config, run, count, forward, gpu)
    need, sampled = memory(found, config, run, count), _rollouts(name, config, forward)
    return Stage(name, config, run, count, need, step, sampled, choice)


def _rollouts(name: str, config: Config, forward: Forward) -> tuple[int, float] | None:
    if name not in SUPPLIED or not config.online.prompts:
        return None
    rounds = 1 if name == STUDENTS[0] else -(-config.train.steps // config.online.every)
    videos = rounds * config.online.prompts * config.rollout.per_prompt
    sampled = teacher_config(config) if name == STUDENTS[0] else config
    return videos, videos * work.rollout_flops(sampled, forward)


def _again(whole: Plan, stage: Stage, config: Config, gpus: int) -> Stage | None:
    """`stage` with another configuration, or on other GPUs; None where a batch does not divide."""
    try:
        later = stage is not whole.stages[0]
        return _stage(stage.name, config, whole.gpu, gpus, whole.outline, whole.forward, later=later)
    except ConfigError:
        return None


def _switches(whole: Plan) -> list[tuple[str, float]]:
    """Turned in this order, those that cost least first, until it fits. Of those, the ones without which it fits too
    are left out, and so is what saves nothing."""
    start = whole.largest
    taken = _turned(whole, start, list(_tries(start.config, whole.gpus, chain=bool(whole.config.stages))))
    for dropped in [word for word, _, _ in taken[:-1]]:
        fewer = _turned(whole, start, [(word, change) for word, change, _ in taken if word != dropped])
        if fewer and fewer[-1][2] <= FILLED * whole.gpu.memory:
            taken = fewer
    return [(word, size) for word, _, size in taken]


def _turned(
    whole: Plan, start: Stage, tries: list[tuple[str, dict[str, Any]]]
) -> list[tuple[str, dict[str, Any], float]]:
    """What of `tries` saves memory, each on top of those before, until it fits; with the bytes a GPU needs then."""
    taken, now = [], start
    for word, change in tries:
        stage = _again(whole, start, changed(now.config, change, "plan"), whole.gpus)
        if stage is None or stage.memory.total >= now.memory.total:
            continue
        now = stage
        taken.append((word, change, now.memory.total))
        if now.memory.fits(whole.gpu):
            break
    return taken


def _tries(config: Config, gpus: int, chain: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to write on the command line, and the change to the configuration."""
    if config.train.checkpointing != "full":
        yield "train.checkpointing=full", {"train": {"checkpointing": "full"}}
    if config.train.micro_batch_size > 1:
        yield "train.micro_batch_size=1", {"train": {"micro_batch_size": 1}}
    if config.deepspeed.preset == "zero2":
        yield "deepspeed.preset=zero3", {"deepspeed": {"preset": "zero3"}}
    if config.reference.strategy in ("auto", "copy") and not chain and not config.train.lora:
        yield "reference.strategy=cached", {"reference": {"strategy": "cached"}}
    if config.train.branches == "together" and needs_reference(config.objective):
        yield "train.branches=apart", {"train": {"branches": "apart"}}
    for degree in (2, 4, 8):
        if degree > config.train.context_parallel and gpus % degree == 0:
            yield f"train.context_parallel={degree}", {"train": {"context_parallel": degree}}
    sums = {"deepspeed": {"config": {"data_types": {"grad_accum_dtype": "bf16"}}}}
    yield "deepspeed.config.data_types.grad_accum_dtype=bf16", sums
    if config.deepspeed.preset != "zero3-offload" and config.train.optimizer != "adamw_8bit":
        yield "deepspeed.preset=zero3-offload", {"deepspeed": {"preset": "zero3-offload"}}
    if not config.train.lora:
        yield "train.lora={} (adapters instead of all weights)", {"train": {"lora": {}}}


def gpus_that_fit(whole: Plan) -> int | None:
    """The fewest GPUs of that kind, doubling, on which it fits as it is configured; None where none are enough."""
    gpus = whole.gpus
    while (gpus := gpus * 2) <= MOST_GPUS:
        stages = [_again(whole, stage, stage.config, gpus) for stage in whole.stages]
        found = [stage for stage in stages if stage is not None]
        if len(found) < len(stages):
            return None
        if all(stage.memory.fits(whole.gpu) for stage in found):
            return gpus
    return None
