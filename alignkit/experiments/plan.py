"""What the LocalDPO experiment compares: its arms, what is tried for each, sizes and seeds."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.config import Config, Family, ModelSection, load_config, shipped_config

Settings = tuple[str, ...]
"""Overrides of the configuration."""


@dataclass(frozen=True)
class Trial:
    """What is tried: settings of the run, and the store it trains on, where that is another than the arm's."""

    settings: Settings
    pairs: str | None = None


@dataclass(frozen=True)
class Arm:
    """One method.

    pairs: the store it trains on; None for the base itself. trials: what is tried on validation prompts, by name.
    like: instead, the arm whose chosen trial it takes, with `settings` changed in it: a part of that method, or the
    same on other pairs, which `pairs` then names. curve: measured along its way too.
    """

    name: str
    title: str
    pairs: str | None
    settings: Settings = ()
    trials: dict[str, Trial] = field(default_factory=dict)
    like: str | None = None
    curve: bool = False


def _weights(**weights: float) -> Settings:
    return tuple(f"objective.{name}={value}" for name, value in weights.items())


def _at(rate: float, *settings: str, pairs: str | None = None) -> Trial:
    return Trial((*settings, f"train.learning_rate={rate}"), pairs)


def _local(rate: float, beta: float, sft: float, pairs: str | None = None) -> Trial:
    return _at(rate, *_weights(beta=beta, weight_sft=sft), pairs=pairs)


SFT, DPO = "objective={name: sft}", "objective={name: dpo}"
SFT_TRIALS = {f"{rate:.0e}".replace("e-0", "e-"): _at(rate, SFT) for rate in (5e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3)}
LOCAL_TRIALS = {
    "published": _local(2e-5, 5000, 0.1, pairs="published"),
    "beta500": _local(1e-4, 500, 500),
    "beta150": _local(3e-4, 150, 100),
    "beta50": _at(3e-4),  # as the demo's configuration has it
    "beta50-fast": _at(6e-4),
    "auto": _at(3e-4, "objective={beta: auto, beta_min: 20, beta_max: 500, weight_sft: 100}"),
}
RANKED_TRIALS = {
    "published": _at(2e-5, DPO),
    "beta150": _at(1e-4, DPO, *_weights(beta=150, weight_sft=100)),
}
ARMS = (
    Arm("base", "base", None),
    Arm("sft", "SFT", "bezier", (), SFT_TRIALS, curve=True),
    Arm("dpo_ranked", "DPO on ranked pairs", "generated", (), RANKED_TRIALS),
    Arm("region", "region only", "bezier", _weights(weight_global=0, weight_sft=0), like="local_dpo"),
    Arm("global", "global only", "bezier", _weights(weight_region=0, weight_sft=0), like="local_dpo"),
    Arm("region_global", "region + global", "bezier", _weights(weight_sft=0), like="local_dpo"),
    Arm("region_sft", "region + SFT", "bezier", _weights(weight_global=0), like="local_dpo", curve=True),
    Arm("global_sft", "global + SFT", "bezier", _weights(weight_region=0), like="local_dpo", curve=True),
    Arm("local_dpo", "LocalDPO: region + global + SFT", "bezier", (), LOCAL_TRIALS, curve=True),
    Arm("demo", "LocalDPO as the demo has it", "bezier", (), {"demo": Trial(())}),
    Arm("rectangles", "LocalDPO with rectangles", "rectangle", (), like="local_dpo"),
    Arm("sft_few", "SFT, 16 clips", "few", (), like="sft"),
    Arm("local_dpo_few", "LocalDPO, 16 clips, 8 pairs of each", "few", (), like="local_dpo"),
)
MAIN_ARMS = ("base", "sft", "dpo_ranked", "local_dpo", "demo")
STORES: dict[str, Settings] = {
    "bezier": (),
    "rectangle": ("pairs.mask.shape=rectangle",),
    "generated": (),
    "few": ("pairs.per_clip=8",),
    "published": (
        "pairs.mask.area=[0.0,1.0]",
        "pairs.mask.blobs=[1,5]",
        "pairs.num_inference_steps=20",
        "pairs.strengths=[15,16,17,18]",
        "pairs.guidance_scale=4.0",
    ),
}
"""What each store's pairs differ in from the demo's: the published sizes of masks and strengths, for one."""
FEW_CLIPS = 16  # where an arm's name says so; by the settings above as many pairs as from all clips


@dataclass(frozen=True)
class Plan:
    """Sizes of one experiment; every arm gets the same data order, noise and number of steps."""

    family: Family
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    train_clips: int = 128
    heldout_clips: int = 256
    steps: int = 80
    samples: int = 256
    validation_samples: int = 128
    curve_steps: tuple[int, ...] = (10, 20, 40)
    curve_samples: int = 64
    rollouts: int = 4
    """For each prompt of the ranked pairs: the best is the winner, the worst the loser."""

    @property
    def trained(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.pairs)

    @property
    def stores(self) -> tuple[str, ...]:
        """In the order to be built: ranked pairs take their prompts from the local ones."""
        tried = [trial.pairs for arm in self.trained for trial in arm.trials.values() if trial.pairs]
        return tuple(dict.fromkeys(("bezier", *(arm.pairs for arm in self.trained if arm.pairs), *tried)))

    def trial(self, arm: Arm, name: str) -> Trial | None:
        """The trial of this name of the arm, or of the one that it is like."""
        return (self.arm(arm.like).trials if arm.like else arm.trials).get(name)

    def store(self, arm: Arm, trial: str) -> str:
        """What the arm's run trains on. A part of a method is trained on what the whole is, others on their own."""
        chosen = self.trial(arm, trial)
        other = chosen.pairs if chosen else None
        return other if other and arm.pairs == "bezier" else arm.pairs

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def make_plan(family: Family, *, smoke: bool) -> Plan:
    """Wan's plan is all arms, the other family's its main ones; `smoke` shows in minutes that all of it runs."""
    whole = family == ModelSection().family
    arms = tuple(arm for arm in ARMS if whole or arm.name in MAIN_ARMS)
    if not smoke:
        return Plan(family, arms)
    arms = tuple(arm for arm in arms if arm.name in ("base", "sft", "local_dpo"))
    sizes = {"train_clips": 32, "heldout_clips": 24, "steps": 10, "samples": 8, "validation_samples": 8}
    return Plan(family, arms, (0,), **sizes, curve_steps=(5,), curve_samples=8)


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
        # what saves no memory that is short here costs a third of the time
        "train.gradient_checkpointing=false",
        "train.micro_batch_size=16",
        "deepspeed.preset=zero2",
    )
    return load_config(shipped_config(f"{plan.family}-tiny-localdpo.yaml"), [*common, *settings])
