"""What the LocalDPO experiment compares: its arms, sizes, learning rates and seeds."""

import json
from dataclasses import dataclass
from pathlib import Path

from alignkit.config import Config, Family, ModelSection, load_config, shipped_config


@dataclass(frozen=True)
class Arm:
    """One method. `pairs`: the store it trains on, None for the base itself; `settings`: overrides of the config."""

    name: str
    title: str
    pairs: str | None
    settings: tuple[str, ...] = ()


def _local(region: float, whole: float, sft: float) -> tuple[str, ...]:
    return (
        f"objective.weight_region={region}",
        f"objective.weight_global={whole}",
        f"objective.weight_sft={sft}",
    )


ARMS = (
    Arm("base", "base", None),
    Arm("sft", "SFT continued", "bezier", ("objective.name=sft",)),
    Arm("dpo_generated", "DPO, both generated and ranked", "generated", ("objective.name=dpo",)),
    Arm("dpo_local", "DPO on the local pairs", "bezier", ("objective.name=dpo",)),
    Arm("region", "LocalDPO, region only", "bezier", _local(1, 0, 0)),
    Arm("region_global", "LocalDPO, region + global", "bezier", _local(1, 1, 0)),
    Arm("local_dpo", "LocalDPO, region + global + SFT", "bezier", _local(1, 1, 0.1)),
    Arm("rectangles", "the same with rectangles as masks", "rectangle", _local(1, 1, 0.1)),
)
MAIN_ARMS = ("base", "sft", "dpo_generated", "local_dpo")


@dataclass(frozen=True)
class Plan:
    """Sizes of one experiment; every arm gets the same learning rates, data order and number of steps."""

    family: Family
    arms: tuple[Arm, ...]
    rates: tuple[float, ...] = (5e-6, 2.5e-5, 1e-4)
    seeds: tuple[int, ...] = (0, 1, 2)
    train_clips: int = 256
    heldout_clips: int = 128
    steps: int = 60
    samples: int = 64

    @property
    def trained(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.pairs)

    @property
    def stores(self) -> tuple[str, ...]:
        """In the order to be built: generated pairs take their prompts from the local ones."""
        return tuple(dict.fromkeys(("bezier", *(arm.pairs for arm in self.trained if arm.pairs))))


def make_plan(family: Family, *, smoke: bool) -> Plan:
    """Wan's plan is the whole grid, the other family's its main arms; `smoke` shows in minutes that all of it runs."""
    whole = family == ModelSection().family
    arms = tuple(arm for arm in ARMS if whole or arm.name in MAIN_ARMS)
    if not smoke:
        return Plan(family, arms)
    arms = tuple(arm for arm in arms if arm.name in ("base", "sft", "local_dpo"))
    return Plan(family, arms, (5e-6,), (0,), train_clips=32, heldout_clips=24, steps=10, samples=8)


def run_config(plan: Plan, out: Path, folder: Path, *settings: str) -> Config:
    """The demo's configuration with the plan's sizes, for a run in `folder`."""
    common = (
        f"output.dir={json.dumps(str(folder))}",
        f"data.videos={json.dumps(str(out / 'clips' / 'train'))}",
        f"train.steps={plan.steps}",
        f"train.checkpoint_every={plan.steps}",
        "train.keep_checkpoints=1",
        f"sample.count={plan.samples}",
        "pairs.previews=0",
        "pairs.block_size=32",
    )
    return load_config(shipped_config(f"{plan.family}-tiny-localdpo.yaml"), [*common, *settings])
