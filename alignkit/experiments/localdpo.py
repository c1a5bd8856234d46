"""`alignkit experiment localdpo`: every arm at every learning rate, the best of them with every seed, and a write-up.

Everything is a file under the output folder that is made once: a run that was stopped goes on where it was, and
several processes share the work. Learning rates are chosen on validation pairs and prompts; the table is of test
pairs and prompts. Neither clip was ever trained on.
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.experiments.measure import measure, measure_ranking, measure_real
from alignkit.experiments.plan import Arm, Plan, make_plan, run_config
from alignkit.experiments.stores import heldout_store, prepare, store_folder
from alignkit.experiments.write_up import write_up
from alignkit.files import write_json
from alignkit.models import load_model
from alignkit.progress import say
from alignkit.sharing import one_at_a_time, share_out
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import lone_worker, start_process
from alignkit.training.export import aligned_section, export_folder
from alignkit.training.loop import TrainingDiverged, train

DRIFT_ALLOWED = 0.01
"""A learning rate that raises the error on real clips by more than this is chosen only where every one does."""
SHOWN_SAMPLES = 4


def run(family: str, out: Path, *, smoke: bool) -> Path:
    """Run, or go on with, the experiment in `out`; returns the written page."""
    worker = lone_worker()
    plan = make_plan(family, smoke=smoke)
    _check_plan(plan, out)
    prepare(plan, out, worker.device, show=worker.main)
    searched = [(arm, rate, plan.seeds[0]) for arm in plan.arms for rate in (plan.rates if arm.pairs else (None,))]
    _share(plan, out, searched, "validation", worker.device)
    chosen = {arm.name: choose_rate(plan, out, arm) for arm in plan.trained}
    final = [(arm, chosen.get(arm.name), seed) for seed in plan.seeds for arm in plan.arms]
    gentle = [(arm, min(plan.rates), seed) for seed in plan.seeds for arm in plan.trained]
    collapsed = [run for run in searched if run[1] == max(plan.rates)]
    _share(plan, out, list(dict.fromkeys([*final, *gentle, *collapsed])), "test", worker.device)
    _share_data(plan, out, worker.device)
    with one_at_a_time(out / plan.family / "page.lock"):
        return write_up(plan, out, chosen)


def _check_plan(plan: Plan, out: Path) -> None:
    """Results of another plan or another base are refused, never mixed."""
    file = out / plan.family / "plan.json"
    config = run_config(plan, out, out)
    base = load_model(config.model, with_transformer=False, with_encoders=False)
    settings = config.model_dump(mode="json", exclude={"output": True, "data": {"videos"}})
    now = json.loads(json.dumps(asdict(plan) | {"base": base.fingerprint(), "settings": settings}))
    with one_at_a_time(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, now)
    stored = json.loads(file.read_text())
    for name, value in now.items():
        if stored.get(name) != value:
            raise DataError(f"{out / plan.family}: holds results of another {name}; choose another --out or delete it")


def _share_data(plan: Plan, out: Path, device: torch.device) -> None:
    """What no training changes: the real clips' numbers, and what the ranked generated pairs are worth."""
    heldout = json.dumps(str(out / "clips" / "heldout"))
    config = run_config(plan, out, out, f"data.videos={heldout}")
    measures = {"real": lambda: measure_real(config, heldout_store(plan, out, "test"), device)}
    if "generated" in plan.stores:
        pairs = PairStore(store_folder(plan, out, "generated") / "pairs" / "train")
        measures["ranking"] = lambda: measure_ranking(config, pairs, device)
    files = [out / plan.family / f"{name}.json" for name in measures]
    share_out(files, lambda number: write_json(files[number], list(measures.values())[number]()))


def _share(plan: Plan, out: Path, runs: list[tuple[Arm, float | None, int]], split: str, device: torch.device) -> None:
    files = [run_folder(plan, out, *run) / f"{split}.json" for run in runs]

    def make(number: int) -> None:
        arm, rate, seed = runs[number]
        how = f", learning rate {rate:g}, seed {seed}" if rate else f", seed {seed}"
        say(f"[{number + 1}/{len(runs)}] {split}: {arm.title}{how}")
        start = time.monotonic()
        numbers = _train_and_measure(plan, out, arm, rate, seed, split, device)
        write_json(files[number], numbers | {"minutes": round((time.monotonic() - start) / 60, 2)})

    share_out(files, make)


def run_folder(plan: Plan, out: Path, arm: Arm, rate: float | None, seed: int) -> Path:
    return out / plan.family / "runs" / (f"{arm.name}-{rate:g}-{seed}" if rate else f"{arm.name}-{seed}")


def _train_and_measure(
    plan: Plan, out: Path, arm: Arm, rate: float | None, seed: int, split: str, device: torch.device
) -> dict:
    folder = run_folder(plan, out, arm, rate, seed)
    heldout = json.dumps(str(out / "clips" / "heldout"))
    config = run_config(plan, out, folder, *arm.settings, f"train.seed={seed}", f"data.videos={heldout}")
    section = config.model
    if arm.pairs:
        config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})
        try:
            _train(config, store_folder(plan, out, arm.pairs))
        except TrainingDiverged as error:
            return {"diverged": str(error)}
        section = aligned_section(config)
    local = heldout_store(plan, out, split)
    generated = heldout_store(plan, out, split, kind="generated") if "generated" in plan.stores else None
    numbers, frames = measure(config, section, local, generated, seed, device)
    np.savez_compressed(folder / f"{split}-samples.npz", frames=frames[:SHOWN_SAMPLES].numpy())
    return numbers


def _train(config: Config, store: Path) -> None:
    """Train unless that was done already; of a finished run the export and the metrics are kept."""
    if export_folder(config).is_dir():
        return
    config.output.dir.mkdir(parents=True, exist_ok=True)
    link = pairs_folder(config, "train").parent
    if not link.is_symlink():
        os.symlink(os.path.relpath(store / "pairs", link.parent), link)
    if not train(config, start_process()):
        raise SystemExit(0)
    shutil.rmtree(config.output.dir / "train" / "checkpoints", ignore_errors=True)


def choose_rate(plan: Plan, out: Path, arm: Arm) -> float:
    """The learning rate with the smallest Fréchet distance on validation prompts, of those that keep the error on real
    clips within DRIFT_ALLOWED; where none does, the one that keeps it lowest."""
    found = {}
    for rate in plan.rates:
        numbers = read_numbers(plan, out, arm, rate, plan.seeds[0], "validation")
        if "diverged" not in numbers:
            found[rate] = numbers
    kept = [rate for rate, numbers in found.items() if numbers["winner_error_change"] <= DRIFT_ALLOWED]
    if kept:
        return min(kept, key=lambda rate: found[rate]["frechet"])
    return min(found, key=lambda rate: found[rate]["winner_error_change"], default=min(plan.rates))


def read_numbers(plan: Plan, out: Path, arm: Arm, rate: float | None, seed: int, split: str) -> dict:
    return json.loads((run_folder(plan, out, arm, rate, seed) / f"{split}.json").read_text())
