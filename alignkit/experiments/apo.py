"""`alignkit experiment apo`: what each part of Diffusion-APO (our reading) is worth on a small model.

All arms that train on ranked rollouts train on the same ones, sampled by the base and ranked by networks that judge
nothing; the chain and the students make their own on the way.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignkit.apo.pairs import build_rollout_pairs
from alignkit.apo.rollouts import build_rollouts
from alignkit.config import Config, Family, ModelSection
from alignkit.experiments import driver
from alignkit.experiments.grpo import train_group_relative
from alignkit.experiments.measure import measure_ranking, measure_real
from alignkit.experiments.plan import Arm, Plan, Settings, Trial, run_config
from alignkit.experiments.stores import OTHER_SPLIT, heldout_store, prepare_clips, store_folder
from alignkit.files import write_atomically, write_lines
from alignkit.rankers.rollouts import (
    answers_about,
    choose,
    comparisons_of,
    decode_rollouts,
    ranking_file,
    rankings_folder,
)
from alignkit.sharing import one_at_a_time
from alignkit.stages.chain import run_chain
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.distributed import start_process
from alignkit.training.export import export_folder

ROLLOUTS = "rollouts"
RANKER = "ranker={by: small_world, min_margin: 0.02}"
STORES: dict[str, Settings] = {
    "ranked": ("noise.source=path", "noise.timesteps=schedule"),
    "inverted": ("noise.source=inversion", "noise.timesteps=schedule"),
}
CURVES = {
    "rewards/accuracies": "accuracy",
    "global/gradient_factor": "σ(−z), what is left of a pair's gradient",
    "grad_norm": "norm of the gradient",
    "global/gap_w": "winner's gap (below 0: better than the base)",
}


def _dpo(source: str, *settings: str) -> Settings:
    return ("objective={name: dpo, beta: 50, weight_sft: 50}", f"noise.source={source}", *settings)


def _arm(name: str, title: str, settings: Settings, pairs: str = "ranked", how: str = "run") -> Arm:
    """At the rate that was chosen for shared noise."""
    return Arm(name, title, pairs, settings, like="shared", how=how)


def _chain(stages: str, *settings: str) -> Settings:
    return _dpo("path", *settings, f"stages=[{stages}]")


RATES = {f"{rate:.0e}".replace("e-0", "e-"): Trial((f"train.learning_rate={rate}",)) for rate in (1e-4, 3e-4, 6e-4)}
STAGES = (
    "{name: offline, train: {steps: 26}},"
    "{name: half_online, rollout: {per_prompt: 1}, online: {every: 27, prompts: 64}, train: {steps: 27}},"
    "{name: online, rollout: {per_prompt: 4}, online: {every: 14, prompts: 24}, train: {steps: 27}}"
)
DISTILL = "{name: distill, rollout: {per_prompt: 1}}"
LONGER = "{name: distill, rollout: {per_prompt: 1}, train: {steps: 160}}"
CORRECT = "{{name: drift_correction, rollout: {{per_prompt: 1}}, student: {}, online: {{every: 40}}}}"
ARMS = (
    Arm("base", "base", None),
    Arm("base_few", "base, 4 steps", None, ("sample.num_inference_steps=4",)),
    Arm("shared", "DPO, shared noise", "ranked", _dpo("shared"), RATES),
    _arm("initial", "DPO, initial noise", _dpo("initial")),
    _arm("path", "DPO, states of the path", _dpo("path")),
    _arm("inversion", "DPO, inverted states", _dpo("inversion"), pairs="inverted"),
    _arm("logit_normal", "DPO, shared, logit-normal t", _dpo("shared", "noise.timesteps=logit_normal")),
    _arm("adaptive", "DPO, path, adaptive t", _dpo("path", "noise.timesteps=adaptive")),
    _arm("high_noise", "DPO, path, high noise alone", _dpo("path", "noise.interval=high_noise")),
    _arm("rejection", "SFT on the best rollouts", ("objective={name: sft}", "noise.source=shared")),
    _arm("grpo", "policy gradient, no SFT beside it", _dpo("shared"), how="grpo"),
    _arm("chain", "offline, half-online, online", _chain(STAGES, "noise.anchor=shared", RANKER), how="chain"),
    _arm("student", "student, 4 steps", _chain(DISTILL), how="chain"),
    _arm("longer", "student, as many steps again", _chain(LONGER), how="chain"),
    _arm("corrected", "student, drift corrected", _chain(f"{DISTILL}, {CORRECT.format('{ratio: 5}')}"), how="chain"),
    _arm("beside", "student beside its teacher", _chain(f"{DISTILL}, {CORRECT.format('{weight: 50}')}"), how="chain"),
)
MAIN_ARMS = ("base", "shared", "initial", "path")


def make_plan(family: Family, *, smoke: bool) -> Plan:
    """Wan's plan is all arms with three seeds, the other family's its main ones with one; `smoke` shows in minutes that
    all of it runs."""
    whole = family == ModelSection().family
    arms = tuple(arm for arm in ARMS if whole or arm.name in MAIN_ARMS)
    same: dict[str, Any] = {
        "method": "apo",
        "title": "Diffusion-APO",
        "store_settings": STORES,
        "curves": CURVES,
        "curve_steps": (),
    }
    same |= {"against": ("shared",), "blind": ("shared", "path")}
    if not smoke:
        return Plan(family, arms, (0, 1, 2) if whole else (0,), **same)
    arms = tuple(replace(arm, trials=dict(list(arm.trials.items())[:1])) for arm in arms)
    arms = tuple(arm for arm in arms if arm.name in (*MAIN_ARMS, "grpo"))
    return Plan(family, arms, (0,), train_clips=16, heldout_clips=12, steps=5, samples=8, validation_samples=4, **same)


def run(family: Family, out: Path, *, smoke: bool) -> Path:
    """Run, or go on with, the experiment in `out`; returns the written page."""
    ways: driver.Ways = {"grpo": train_group_relative, "chain": train_chain}
    return driver.run(make_plan(family, smoke=smoke), out, prepare, data_measures, ways)


def train_chain(config: Config, store: Path) -> None:
    """Every stage of `config.stages`, on the clips and on the pairs of `store`."""
    if export_folder(config).is_dir():
        return
    driver.link_pairs(config, store)
    assert config.data.videos is not None
    videos = config.data.videos.parent / "train"
    clips = len((videos / "captions.jsonl").read_text().splitlines())
    data = config.data.model_copy(update={"videos": videos, "heldout": OTHER_SPLIT / clips})
    if not run_chain(config.model_copy(update={"data": data}), start_process()):
        raise SystemExit(0)


def prepare(plan: Plan, out: Path, device: torch.device, show: bool) -> None:
    """Draw the clips, sample and rank the base's rollouts, and make the pairs; processes share the work."""
    prepare_clips(plan, out, device, show)
    config = _rollout_config(plan, out)
    prompts = config.data.prompts
    assert prompts is not None
    with one_at_a_time(prompts.with_suffix(".lock")):
        if not prompts.exists():
            clips = (out / "clips" / "train" / "captions.jsonl").read_text().splitlines()[: plan.train_clips]
            captions = dict.fromkeys(json.loads(line)["caption"] for line in clips)
            write_atomically(prompts, "\n".join(captions).encode())
    build_rollouts(config, device, show)
    with one_at_a_time(config.output.dir / "ranking.lock"):
        if not ranking_file(config).exists():
            rank(config, device)
    for name in plan.stores:
        build_rollout_pairs(pairs_config(plan, out, name), device, show)


def rank(config: Config, device: torch.device) -> None:
    """The best of each prompt's rollouts against the worst."""
    rollouts, folder = RolloutStore(config.output.dir / ROLLOUTS), rankings_folder(config)
    decode_rollouts(config, rollouts, device)
    rows, _ = choose(config, rollouts, answers_about(config, comparisons_of(rollouts, folder)))
    write_lines(ranking_file(config), rows)


def _rollout_config(plan: Plan, out: Path) -> Config:
    folder = store_folder(plan, out, ROLLOUTS)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, rollout = (
        json.dumps(str(folder / "prompts.txt")),
        f"per_prompt: {plan.rollouts}, block_size: 32, previews: 0",
    )
    settings = (f"data.prompts={prompts}", f"rollout={{{rollout}, batch_size: 16}}", RANKER)
    return _with_all_states(run_config(plan, out, folder, *STORES["ranked"], "data.videos=null", *settings))


def pairs_config(plan: Plan, out: Path, name: str) -> Config:
    """What the ranked pairs of the store `name` are made by."""
    ranked = _rollout_config(plan, out)
    paths = {"pairs": ranking_file(ranked), "rollouts": ranked.output.dir / ROLLOUTS}
    named = [f"data.{key}={json.dumps(str(path))}" for key, path in paths.items()]
    settings = (*STORES[name], "data.videos=null", "data.heldout=0.02", *named)
    return _with_all_states(run_config(plan, out, store_folder(plan, out, name), *settings))


def _with_all_states(config: Config) -> Config:
    """States of every step are kept, so that all sources and laws train at the same ones."""
    noise = config.noise.model_copy(update={"path_steps": config.sample.num_inference_steps})
    return config.model_copy(update={"noise": noise})


def data_measures(plan: Plan, out: Path, device: torch.device) -> dict[str, driver.Measure]:
    """What no training changes: the real clips' numbers, and what the ranking is worth to the judge."""
    config = run_config(plan, out, out, f"data.videos={json.dumps(str(out / 'clips' / 'heldout'))}")
    pairs = PairStore(store_folder(plan, out, "ranked") / "pairs" / "train")
    real = heldout_store(plan, out, "test")
    measures: dict[str, driver.Measure] = {"real": lambda: measure_real(config, real, device)}
    return measures | {"ranking": lambda: measure_ranking(config, pairs, device)}
