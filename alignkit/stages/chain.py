"""Runs a chain of stages, or what is left of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignkit.apo.pairs import build_rollout_pairs
from alignkit.config import Config, dump_config
from alignkit.errors import AlignkitError
from alignkit.files import write_atomically
from alignkit.given.build import build_given_pairs
from alignkit.localdpo.build import build_pairs
from alignkit.models import load_model
from alignkit.objectives.states.checks import check_noise, check_states
from alignkit.progress import say
from alignkit.rankers import PEOPLE, open_ranker
from alignkit.stages import STUDENTS, SUPPLIED, stage_configs
from alignkit.stages.online import rounds_of
from alignkit.stages.rounds import Rounds
from alignkit.stages.students import correction_of, distillation_of
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.context import PAIRS_KEY, check_tokens, make_by_first, token_worker
from alignkit.training.distributed import Process, on_main
from alignkit.training.export import export_folder
from alignkit.training.loop import AtPeak, Link, check_training, train, train_folder
from alignkit.training.masters import handed_on
from alignkit.training.supply import Supply


def run_chain(config: Config, process: Process, at_peak: AtPeak = lambda *_: None) -> bool:
    """Train every stage of `config.stages` that is not done; the last one exports to output.dir/export. Every process
    calls this. False if a signal ended it early, or a stage waits for somebody; the same call goes on where it was.

    at_peak: as for `train`."""
    stages = stage_configs(config)
    check_chain(stages, process)  # the last one's faults too, before the first one trains

    def keep_settings() -> None:
        write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())

    before: Path | None = None
    taught: Taught | None = None
    for number, (name, stage) in enumerate(stages, 1):
        begun = time.monotonic()
        if process.main:
            say(f"stage {number} of {len(stages)}: {name}")
        supply: Supply | None = None
        if name in SUPPLIED:
            supply = on_main(process, partial(_supply, name, stage, before, taught))
        elif makes_pairs(stage):
            build_own_pairs(stage, process)
        last, few = number == len(stages), config.few_step_sampler
        link = Link(before, export_folder(config) if last else None, keep_settings, few.num_steps if few else None)
        if not train(stage, process, link, supply, at_peak):
            return False
        if process.main:
            say(f"stage {name} took {time.monotonic() - begun:.0f} s")
        if name == "distill":
            taught = Taught(stage, before)
        before = train_folder(stage)
    return True


def check_chain(stages: list[tuple[str, Config]], process: Process) -> None:
    """What can be wrong with stages whose pairs are there already or are made while they train, and with processes that
    are to make pairs together. Raises ConfigError or DataError."""
    check_stages(stages, process)
    for number, (name, stage) in enumerate(stages, 1):
        if name not in SUPPLIED and not makes_pairs(stage):
            with _named(number, name):
                check_states(stage, PairStore(pairs_folder(stage, "train")))


def check_stages(stages: list[tuple[str, Config]], process: Process) -> None:
    """The same, whatever the pairs are."""
    for number, (name, stage) in enumerate(stages, 1):
        with _named(number, name):
            check_training(stage, process)
    check_supplies(stages)
    for name, stage in stages:
        if name not in SUPPLIED and makes_pairs(stage):
            check_tokens(stage, f"stage {name}: {PAIRS_KEY}", stage.pairs.context_parallel, process)


def check_supplies(stages: list[tuple[str, Config]]) -> None:
    """The same of those stages alone that make their pairs while they train."""
    taught = None
    for number, (name, stage) in enumerate(stages, 1):
        if name not in SUPPLIED:
            continue
        with _named(number, name):
            check_noise(stage, load_model(stage.model, with_transformer=False, with_encoders=False))
            _supply_of(name, stage, "", taught)
            if name not in STUDENTS and stage.ranker.by != PEOPLE:
                open_ranker(stage.ranker, stage.output.dir)
        taught = Taught(stage, None) if name == "distill" else taught


@contextmanager
def _named(number: int, name: str) -> Iterator[None]:
    """Begins an AlignkitError with the stage, unless it names it already: a chain's stages have the same keys."""
    try:
        yield
    except AlignkitError as error:
        if not str(error).startswith("stage") and f"{number:02d}-{name}" not in str(error):
            error.args = (f"stages: entry {number} ({name}): {error}",)
        raise


def makes_pairs(stage: Config) -> bool:
    """Whether the stage has pairs of its own to make first."""
    return pairs_folder(stage, "train").is_relative_to(stage.output.dir)


def build_own_pairs(config: Config, process: Process) -> None:
    """The pairs of `config`'s data, those that are not there yet; every process takes a part."""
    build = build_given_pairs if config.data.pairs else build_pairs
    build = build_rollout_pairs if config.data.rollouts else build
    degree = config.pairs.context_parallel
    group = token_worker(config, PAIRS_KEY, degree)[1] if degree > 1 else None
    made = partial(build, config, process.device, show=process.main, group=group)
    make_by_first(config, process.device, group, made)


@dataclass(frozen=True)
class Taught:
    """A distill stage that is over, and the training folder of what it began with, None for the base."""

    stage: Config
    before: Path | None


def _supply(name: str, stage: Config, before: Path | None, taught: Taught | None) -> Rounds:
    record = handed_on(before) if before else None
    if record is None:
        base = load_model(stage.model, with_transformer=False, with_encoders=False)
        return _supply_of(name, stage, base.fingerprint(), taught)
    return _supply_of(name, stage, record["sha256"], taught)


def _supply_of(name: str, stage: Config, start: str, taught: Taught | None) -> Rounds:
    if name == "distill":
        return distillation_of(stage, start)
    if name == "drift_correction":
        return correction_of(stage, start, taught.stage if taught else None, taught.before if taught else None)
    return rounds_of(name, stage, start)
