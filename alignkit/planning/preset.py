"""`deepspeed.preset: auto`: the fastest preset under which a run fits, by the plan's numbers, chosen once for a run."""

import json
from dataclasses import dataclass

import torch

from alignkit.config import Config
from alignkit.doctor.places import memory_limit
from alignkit.errors import ConfigError
from alignkit.models import load_model, working_dtype
from alignkit.planning.constants import FILLED, GPUS_A_NODE, RESERVED, Gpu
from alignkit.planning.memory import Memory, Parameters, memory, parameters, said
from alignkit.planning.outline import SHIPPED, Outline, outline
from alignkit.planning.regime import regime
from alignkit.progress import say
from alignkit.stages import stage_configs
from alignkit.stores.store import read_info, terms_file
from alignkit.training.distributed import Process, gather, on_main
from alignkit.training.loop import train_folder
from alignkit.training.references import reads_cache
from alignkit.training.references.cached import HOLDS, cache_folder
from alignkit.training.settings import PRESETS

AUTO = "auto"


@dataclass(frozen=True)
class Room:
    """Bytes that a run may fill: of each GPU, or (host) of the main memory that a machine's processes share on CPUs."""

    size: float
    host: bool = False

    def needed(self, gpus: int, need: Memory) -> float:
        if not self.host:
            return need.total
        return min(gpus, GPUS_A_NODE) * (need.total - RESERVED) + sum(need.host.values())

    def __str__(self) -> str:
        return f"the {said(self.size)} of " + ("main memory" if self.host else "a GPU") + " that may be filled"


@dataclass(frozen=True)
class Choice:
    preset: str
    why: str

    def __str__(self) -> str:
        return f"auto is {self.preset}: {self.why}"


def room_of(gpu: Gpu) -> Room:
    return Room(FILLED * gpu.memory)


def with_preset(config: Config, preset: str) -> Config:
    return config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"preset": preset})})


def choose(config: Config, found: Outline, count: Parameters, room: Room, gpus: int, *, later: bool = False) -> Choice:
    """The first of zero2, zero3 and zero3-offload that `room` holds with activations and reference; where none does,
    the one that needs least. On CPUs there is nowhere to offload to, and moments of 8 bits cannot be.

    later: of a stage that another one hands its weights to. Raises ConfigError as `regime` does.
    """
    needs: dict[str, float] = {}
    for preset in PRESETS:
        if preset == "zero3-offload" and (room.host or config.train.optimizer == "adamw_8bit"):
            continue
        own = with_preset(config, preset)
        run = regime(own, gpus, later=later)
        needs[preset] = room.needed(gpus, memory(found, own, run, count))
        if needs[preset] <= room.size:
            break
    taken = min(needs, key=lambda preset: (needs[preset] > room.size, needs[preset]))
    why = ", ".join(f"{preset} needs {said(need)}" for preset, need in needs.items()) + f" of {room}"
    return Choice(taken, why if needs[taken] <= room.size else f"{why}; none fits by calculation")


def check_offload(config: Config, process: Process) -> None:
    """Every process calls this. Raises ConfigError where a machine's main memory is less than what `zero3-offload` puts
    there, by the plan's numbers."""
    stages = stage_configs(config) if config.stages else [("", config)]
    offloads = [(name, stage) for name, stage in stages if stage.deepspeed.preset == "zero3-offload"]
    if not offloads:
        return
    there = min(gather(memory_limit()[0]))

    def check() -> None:
        for name, stage in offloads:
            needed = sum(_needed_here(stage, process).host.values())
            if needed > there:
                raise ConfigError(
                    f"{f'stage {name}: ' if name else ''}deepspeed.preset=zero3-offload: puts {said(needed)} into a "
                    f"machine's main memory by calculation, {said(there)} are there; take more machines, "
                    "train.lora={} or another preset"
                )

    on_main(process, check)


def resolved(config: Config, process: Process) -> Config:
    """`config` with a preset in place of each `auto`, in the entries of its stages where it is a chain: what an earlier
    start of the run was given, here or on another machine; else what its cached errors were computed with; else what
    fits this machine, which is said. Every process calls this.

    Raises ModelError as `outline` does.
    """
    stages = stage_configs(config) if config.stages else [("", config)]
    if all(stage.deepspeed.preset != AUTO for _, stage in stages):
        return config
    room = _room_here(process)
    presets = on_main(process, lambda: [_preset(*stage, room, process, later=i > 0) for i, stage in enumerate(stages)])
    if config.stages is None:
        return with_preset(config, presets[0])
    entries = [
        entry.model_copy(update={"deepspeed": entry.deepspeed | {"preset": preset}})
        for entry, preset in zip(config.stages, presets, strict=True)
    ]
    return config.model_copy(update={"stages": tuple(entries)})


def _room_here(process: Process) -> Room:
    """By the machine that has least."""
    if process.device.type == "cuda":
        return Room(FILLED * min(gather(torch.cuda.get_device_properties(process.device).total_memory)))
    return Room(FILLED * min(gather(memory_limit()[0])), host=True)


def _preset(name: str, stage: Config, room: Room, process: Process, *, later: bool) -> str:
    if stage.deepspeed.preset != AUTO:
        return stage.deepspeed.preset
    begun, cached = _begun_with(stage), _cached_with(stage)
    if begun:
        choice = Choice(begun, "as this run began")
    elif cached:
        choice = Choice(cached, "as its cached errors were computed")
    else:
        choice = _chosen_here(stage, room, process, later)
    say(f"{f'stage {name}: ' if name else ''}deepspeed.preset: {choice}")
    return choice.preset


def _begun_with(config: Config) -> str | None:
    try:
        preset = json.loads((train_folder(config) / "run.json").read_text())["deepspeed"]["preset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return preset if preset in PRESETS else None


def _cached_with(config: Config) -> str | None:
    folder = cache_folder(config)
    if reads_cache(config) and terms_file(folder, HOLDS).exists():
        return read_info(folder, HOLDS).made.get("deepspeed.preset")
    return None


def _chosen_here(config: Config, room: Room, process: Process, later: bool) -> Choice:
    here, dtype = _as_here(config, process)
    found = outline(here)
    return choose(here, found, parameters(found, here, dtype), room, process.world_size, later=later)


def _needed_here(config: Config, process: Process) -> Memory:
    here, dtype = _as_here(config, process)
    found = outline(here)
    return memory(found, here, regime(here, process.world_size), parameters(found, here, dtype))


def _as_here(config: Config, process: Process) -> tuple[Config, torch.dtype]:
    """With the dtype that is computed in here, and a model whose sizes are at hand."""
    section = config.model
    if section.path not in SHIPPED:  # its sizes are there once its files are
        model = load_model(section, with_transformer=False, with_encoders=False)
        section = section.model_copy(update={"path": str(model.local_folder())})
    dtype = working_dtype(section, process.device)
    section = section.model_copy(update={"dtype": "bf16" if dtype == torch.bfloat16 else "fp32"})
    return config.model_copy(update={"model": section}), dtype
