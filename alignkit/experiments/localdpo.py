"""`alignkit experiment localdpo`: LocalDPO, its parts, SFT and DPO on ranked pairs."""

import json
from pathlib import Path
from typing import Any

import torch

from alignkit.config import Family, ModelSection
from alignkit.experiments import driver
from alignkit.experiments.measure import measure_ranking, measure_real
from alignkit.experiments.plan import Arm, Plan, Settings, Trial, run_config
from alignkit.experiments.stores import heldout_store, prepare, store_folder, time_pairs
from alignkit.stores.pairs import PairStore


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
CURVES = {
    "region/accuracy": "region accuracy",
    "global/gap_w": "winner's gap (below 0: better than the base)",
    "global/gap_l": "loser's gap",
    "global/saturated": "share of saturated pairs",
}
"""Metrics of training that are drawn."""


def make_plan(family: Family, *, smoke: bool) -> Plan:
    """Wan's plan is all arms, the other family's its main ones; `smoke` shows in minutes that all of it runs."""
    whole = family == ModelSection().family
    arms = tuple(arm for arm in ARMS if whole or arm.name in MAIN_ARMS)
    same: dict[str, Any] = {"store_settings": STORES, "curves": CURVES}
    if not smoke:
        return Plan(family, arms, **same)
    arms = tuple(arm for arm in arms if arm.name in ("base", "sft", "local_dpo"))
    sizes: dict[str, Any] = {"train_clips": 32, "heldout_clips": 24, "steps": 10, "samples": 8, "validation_samples": 8}
    return Plan(family, arms, (0,), **sizes, curve_steps=(5,), curve_samples=8, **same)


def run(family: Family, out: Path, *, smoke: bool) -> Path:
    """Run, or go on with, the experiment in `out`; returns the written page."""
    return driver.run(make_plan(family, smoke=smoke), out, prepare, data_measures)


def data_measures(plan: Plan, out: Path, device: torch.device) -> dict[str, driver.Measure]:
    """What no training changes: the real clips' numbers, what ranked pairs are worth, what a pair costs."""
    heldout = json.dumps(str(out / "clips" / "heldout"))
    config = run_config(plan, out, out, f"data.videos={heldout}")
    measures: dict[str, driver.Measure] = {
        "real": lambda: measure_real(config, heldout_store(plan, out, "test"), device)
    }
    if "generated" in plan.stores:
        pairs = PairStore(store_folder(plan, out, "generated") / "pairs" / "train")
        measures["ranking"] = lambda: measure_ranking(config, pairs, device)
        measures["cost"] = lambda: time_pairs(plan, out, device)
    return measures
