"""What an experiment with small models compares: its arms, what is tried for each, sizes and seeds."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.config import Config, Family, load_config, shipped_config

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
    same on other pairs, which `pairs` then names. curve: measured along its way too. how: "run", one training run or a
    chain of them (`stages` among its settings), or the name of another way that the experiment has.
    """

    name: str
    title: str
    pairs: str | None
    settings: Settings = ()
    trials: dict[str, Trial] = field(default_factory=dict)
    like: str | None = None
    curve: bool = False
    how: str = "run"


@dataclass(frozen=True)
class Plan:
    """Sizes of one experiment; every arm gets the same data order, noise and number of steps.

    method: the experiment's name. store_settings: what each store's pairs differ in from the demo's, by its name.
    against: the arms beside the base that every other is compared with. blind: two arms that people compare. curves:
    which metrics of training are drawn, and their titles.
    """

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
    method: str = "localdpo"
    title: str = "LocalDPO"
    store_settings: dict[str, Settings] = field(default_factory=dict)
    against: tuple[str, ...] = ("sft",)
    blind: tuple[str, str] = ("sft", "local_dpo")
    curves: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where its results are, under the experiment's output folder."""
        return self.family if self.method == "localdpo" else f"{self.method}-{self.family}"

    @property
    def trained(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.pairs)

    @property
    def stores(self) -> tuple[str, ...]:
        """In the order to be built: LocalDPO's ranked pairs take their prompts from the local ones."""
        first = ("bezier",) if self.method == "localdpo" else ()
        tried = [trial.pairs for arm in self.trained for trial in arm.trials.values() if trial.pairs]
        return tuple(dict.fromkeys((*first, *(arm.pairs for arm in self.trained if arm.pairs), *tried)))

    def trial(self, arm: Arm, name: str) -> Trial | None:
        """The trial of this name of the arm, or of the one that it is like."""
        return (self.arm(arm.like).trials if arm.like else arm.trials).get(name)

    def store(self, arm: Arm, trial: str) -> str:
        """What the arm's run trains on. A part of a method is trained on what the whole is, others on their own."""
        assert arm.pairs is not None
        chosen = self.trial(arm, trial)
        other = chosen.pairs if chosen else None
        return other if other and arm.pairs == "bezier" else arm.pairs

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


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
        "train.checkpointing=none",
        "train.micro_batch_size=16",
        "deepspeed.preset=zero2",
    )
    return load_config(shipped_config(f"{plan.family}-tiny-localdpo.yaml"), [*common, *settings])
