"""Runs an experiment with small models: what is tried for each arm on validation prompts, the best of it with every
seed on test prompts, and a write-up.

Everything is a file under the output folder that is made once: a run that was stopped goes on where it was, and
several processes share the work. No clip that is measured on was ever trained on.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.experiments.measure import measure, measure_samples
from alignkit.experiments.plan import Arm, Plan, run_config
from alignkit.experiments.stores import heldout_store, store_folder
from alignkit.experiments.write_up import write_up
from alignkit.files import write_json
from alignkit.models import load_model
from alignkit.progress import say
from alignkit.sharing import one_at_a_time, share_out
from alignkit.stores.folders import pairs_folder
from alignkit.training.distributed import lone_worker, start_process
from alignkit.training.export import aligned_section, export_folder
from alignkit.training.loop import TrainingDiverged, train

DRIFT_ALLOWED = 0.01
"""What raises the error on real clips by more than this is chosen only where every trial does."""
SHOWN_SAMPLES = 6


Measure = Callable[[], dict[str, Any]]
Ways = dict[str, Callable[[Config, Path], None]]


def run(
    plan: Plan,
    out: Path,
    prepare: Callable[[Plan, Path, torch.device, bool], None],
    data_measures: Callable[[Plan, Path, torch.device], dict[str, Measure]],
    ways: Ways | None = None,
) -> Path:
    """Run, or go on with, the experiment in `out`; returns the written page.

    prepare(plan, out, device, show): makes the clips and stores, processes sharing the work. data_measures: by name,
    what no training changes, each written to NAME.json. ways: of training an arm whose `how` is not "run", from its
    configuration and the folder of its store.
    """
    worker, ways = lone_worker(), ways or {}
    _check_plan(plan, out)
    prepare(plan, out, worker.device, worker.main)
    searched = [(arm, trial, plan.seeds[0]) for arm in plan.trained for trial in arm.trials]
    _share(plan, out, [(plan.arms[0], "", plan.seeds[0]), *searched], "validation", worker.device, ways)
    chosen = {arm.name: choose_trial(plan, out, arm) for arm in plan.trained}
    final = [(arm, chosen.get(arm.name, ""), seed) for seed in plan.seeds for arm in plan.arms]
    _share(plan, out, final, "test", worker.device, ways)
    _share_curves(plan, out, [run for run in final if run[0].curve], worker.device)
    _share_data(plan, out, data_measures(plan, out, worker.device))
    with one_at_a_time(out / plan.folder / "page.lock"):
        return write_up(plan, out, chosen)


def _check_plan(plan: Plan, out: Path) -> None:
    """Results of another plan or another base are refused, never mixed."""
    file = out / plan.folder / "plan.json"
    config = run_config(plan, out, out)
    base = load_model(config.model, with_transformer=False, with_encoders=False)
    unread: Any = {"output": True, "ranker": True, "online": True, "student": True, "data": {"videos"}}
    settings = config.model_dump(mode="json", exclude=unread)
    now = json.loads(json.dumps(asdict(plan) | {"base": base.fingerprint(), "settings": settings}))
    with one_at_a_time(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, now)
    stored = json.loads(file.read_text())
    defaults = {"settings": Config.model_construct().model_dump(mode="json", warnings=False)}  # type: ignore[call-arg]
    for name, value in now.items():
        if not same_settings(stored.get(name), value, defaults.get(name, {})):
            raise DataError(f"{out / plan.folder}: holds results of another {name}; choose another --out or delete it")


def same_settings(stored: Any, now: Any, defaults: dict[str, Any]) -> bool:
    """Whether values of JSON are equal; what the version that wrote `stored` did not have yet counts as its default."""
    if not (isinstance(stored, dict) and isinstance(now, dict)):
        return stored == now
    known = all(
        same_settings(stored[name], value, defaults.get(name) or {}) if name in stored else value == defaults.get(name)
        for name, value in now.items()
    )
    return known and stored.keys() <= now.keys()


def _share_data(plan: Plan, out: Path, measures: dict[str, Measure]) -> None:
    files = [out / plan.folder / f"{name}.json" for name in measures]
    share_out(files, lambda number: write_json(files[number], list(measures.values())[number]()))


def _share(
    plan: Plan, out: Path, runs: list[tuple[Arm, str, int]], split: str, device: torch.device, ways: Ways
) -> None:
    files = [run_folder(plan, out, *run) / f"{split}.json" for run in runs]

    def make(number: int) -> None:
        arm, trial, seed = runs[number]
        say(f"[{number + 1}/{len(runs)}] {split}: {arm.title}{f', {trial}' if trial else ''}, seed {seed}")
        start = time.monotonic()
        numbers = _train_and_measure(plan, out, arm, trial, seed, split, device, ways)
        write_json(files[number], numbers | {"minutes": round((time.monotonic() - start) / 60, 2)})

    share_out(files, make)


def _share_curves(plan: Plan, out: Path, runs: list[tuple[Arm, str, int]], device: torch.device) -> None:
    """The samples of what each run was exported as on its way."""
    wanted = [(*run, steps) for run in runs for steps in plan.curve_steps]
    files = [run_folder(plan, out, arm, trial, seed) / f"after-{steps}.json" for arm, trial, seed, steps in wanted]

    def make(number: int) -> None:
        arm, trial, seed, steps = wanted[number]
        say(f"[{number + 1}/{len(wanted)}] after {steps} steps: {arm.title}, {trial}, seed {seed}")
        kept = after(run_folder(plan, out, arm, trial, seed), steps)
        if not kept.is_dir():  # its training diverged
            return write_json(files[number], {"diverged": "before the end"})
        config = _run_config(plan, out, arm, trial, seed, kept.parent)
        section = config.model.model_copy(update={"path": str(kept)})
        store = heldout_store(plan, out, "test")
        numbers, _ = measure_samples(config, section, store, seed, plan.curve_samples, device)
        write_json(files[number], numbers)
        shutil.rmtree(kept, ignore_errors=True)

    share_out(files, make)


def run_folder(plan: Plan, out: Path, arm: Arm, trial: str, seed: int) -> Path:
    return out / plan.folder / "runs" / "-".join([arm.name, *([trial] if trial else []), str(seed)])


def settings_of(plan: Plan, arm: Arm, trial: str) -> tuple[str, ...]:
    """What the arm's run changes in the configuration: its pairs' settings, the trial's, then the arm's own."""
    chosen = plan.trial(arm, trial)
    store = plan.store_settings.get(plan.store(arm, trial), ()) if arm.pairs else ()
    return (*store, *(chosen.settings if chosen else ()), *arm.settings)


def _run_config(plan: Plan, out: Path, arm: Arm, trial: str, seed: int, folder: Path, *settings: str) -> Config:
    heldout = json.dumps(str(out / "clips" / "heldout"))
    more = (f"train.seed={seed}", f"data.videos={heldout}", *settings)
    return run_config(plan, out, folder, *settings_of(plan, arm, trial), *more)


def _train_and_measure(
    plan: Plan, out: Path, arm: Arm, trial: str, seed: int, split: str, device: torch.device, ways: Ways
) -> dict[str, Any]:
    folder = run_folder(plan, out, arm, trial, seed)
    config = _run_config(plan, out, arm, trial, seed, folder)
    section = config.model
    if arm.pairs:
        store = store_folder(plan, out, plan.store(arm, trial))
        try:
            if arm.how == "run":
                _train(config, store, plan.curve_steps if arm.curve else ())
            else:
                ways[arm.how](config, store)
        except TrainingDiverged as error:
            return {"diverged": str(error)}
        section = aligned_section(config)
    count = plan.samples if split == "test" else plan.validation_samples
    numbers, frames = measure(config, section, heldout_store(plan, out, split), seed, count, device)
    np.savez_compressed(folder / f"{split}-samples.npz", frames=frames[:SHOWN_SAMPLES].numpy())
    return numbers


def after(folder: Path, steps: int) -> Path:
    """The model that a run in `folder` was after so many steps."""
    return folder / f"after-{steps}"


def _train(config: Config, store: Path, stops: tuple[int, ...] = ()) -> None:
    """Train unless that was done already, with an export after each of `stops` too; of a finished run the exports and
    the metrics are kept."""
    checkpoints = config.output.dir / "train" / "checkpoints"
    if export_folder(config).is_dir() and not checkpoints.is_dir():
        return
    link_pairs(config, store)
    for steps in (*stops, config.train.steps):
        kept = after(config.output.dir, steps)
        if kept.is_dir():
            continue
        section = config.train.model_copy(update={"steps": steps})
        if not train(config.model_copy(update={"train": section}), start_process()):
            raise SystemExit(0)
        if steps < config.train.steps:
            os.rename(export_folder(config), kept)
    shutil.rmtree(checkpoints, ignore_errors=True)


def link_pairs(config: Config, store: Path) -> None:
    """Make the pairs of the store in the folder `store` those of the run."""
    config.output.dir.mkdir(parents=True, exist_ok=True)
    link = pairs_folder(config, "train").parent
    if not link.is_symlink():
        os.symlink(os.path.relpath(store / "pairs", link.parent), link)


def choose_trial(plan: Plan, out: Path, arm: Arm) -> str:
    """The trial with the most good samples on validation prompts, of those that keep the error on real clips within
    DRIFT_ALLOWED; where none does, the one that keeps it lowest. An arm that is like another takes that one's."""
    if arm.like:
        return choose_trial(plan, out, plan.arm(arm.like))
    found = {}
    for trial in arm.trials:
        numbers = read_numbers(plan, out, arm, trial, plan.seeds[0], "validation")
        if "diverged" not in numbers:
            found[trial] = numbers
    kept = [trial for trial, numbers in found.items() if numbers["winner_error_change"] <= DRIFT_ALLOWED]
    if kept:
        return max(kept, key=lambda trial: (found[trial]["good"], -found[trial]["frechet"]))
    return min(found, key=lambda trial: found[trial]["winner_error_change"], default=next(iter(arm.trials)))


def read_numbers(plan: Plan, out: Path, arm: Arm, trial: str, seed: int, split: str) -> dict[str, Any]:
    return json.loads((run_folder(plan, out, arm, trial, seed) / f"{split}.json").read_text())
