"""`alignkit experiment localdpo --config FULL.yaml`: base, SFT, DPO and LocalDPO on the configuration's own model and
videos, sampled from the same noise and scored with what is installed.

Each arm is a run in a folder of its own that shares the pairs; stages that are done are passed over, so that a run that
was stopped goes on. DPO is on the local pairs, as a whole: to rank samples takes a ranker, which no configuration of
LocalDPO names.
"""

import json
from pathlib import Path
from typing import Any

from alignkit.commands import run_command
from alignkit.config import Config, dump_config, load_config
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.samples import read_samples, samples_folder
from alignkit.evaluation.scorers import SCORERS, installed, score
from alignkit.files import read_json_file, write_atomically, write_json
from alignkit.progress import say
from alignkit.training.export import export_folder

ARMS = {
    "sft": ("SFT", ["objective={name: sft}"]),
    "dpo": ("DPO on the local pairs", ["objective={name: dpo}"]),
    "local_dpo": ("LocalDPO", []),
}
"""By name: the title, and what changes in the configuration."""
OWN_MEASURES = ("motion", "flicker", "edge_energy", "fault_rate", "prompt_following")


def run(file: Path, out: Path, overrides: list[str]) -> Path:
    """Run, or go on with, the arms; returns OUT/results.md. Its numbers are in OUT/results.json."""
    whole = load_config(file, [*overrides, f"output.dir={json.dumps(str(out))}"])
    if whole.objective.name != "local_dpo" or whole.data.pairs is not None or whole.stages:
        raise ConfigError(f"{file}: the experiment takes a configuration of LocalDPO on data.videos, without stages")
    say("scorers: " + ", ".join(f"{name} {'found' if name in installed() else 'not installed'}" for name in SCORERS))
    pairs = whole.pairs.folder or out / "pairs"
    results: dict[str, dict[str, Any]] = {}
    for name, (title, settings) in ARMS.items():
        shared = [f"output.dir={json.dumps(str(out / name))}", f"pairs.folder={json.dumps(str(pairs))}"]
        config = load_config(file, [*overrides, *shared, *settings])
        say(f"\n{title}")
        _stages(config)
        summary = json.loads((config.output.dir / "summary.json").read_text())
        if "base" not in results:
            results["base"] = {"title": "base"} | _numbers(config, summary, "base")
        results[name] = {"title": title} | _numbers(config, summary, "aligned")
        write_json(out / "results.json", results)
    page = out / "results.md"
    write_atomically(page, _page(results).encode())
    say(f"experiment: {page}")
    return page


def _stages(config: Config) -> None:
    """What of the arm is not there yet; all of it under other settings, which each command then takes or refuses."""
    done, kept = config.output.dir / "stages.json", config.output.dir / "config.yaml"
    same = kept.exists() and _alike(load_config(kept), config)
    stages = read_json_file(done, "delete it") if same and done.exists() else {}
    for name in ("pairs", "train", "sample", "eval"):
        if name not in stages or (name == "train" and not export_folder(config).is_dir()):
            run_command(name, config)


def _alike(kept: Config, config: Config) -> bool:
    """Whether a run was begun with these settings: what it keeps names the preset that it chose."""
    preset = kept.deepspeed.preset if config.deepspeed.preset == "auto" else config.deepspeed.preset
    chosen = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"preset": preset})})
    return dump_config(kept) == dump_config(chosen)


def _numbers(config: Config, summary: dict[str, Any], model: str) -> dict[str, float]:
    rows, _ = read_samples(config)
    videos = [samples_folder(config) / row[model] for row in rows]
    if not videos:
        raise DataError(f"{samples_folder(config)}: no samples")
    found = score(videos, [row["prompt"] for row in rows], config.output.dir / f"scores-{model}")
    for name in OWN_MEASURES:
        if summary.get(name):
            found[name] = summary[name][model]
    if summary.get("frechet"):
        found["frechet"] = sum(summary["frechet"][model]) / len(summary["frechet"][model])
    when = "before" if model == "base" else "after"
    return found | {
        "winner_error": summary["winner_error"][when],
        "region_accuracy": summary["accuracy"]["region"][when],
    }


def _page(results: dict[str, dict[str, Any]]) -> str:
    names = [name for name in dict.fromkeys(k for row in results.values() for k in row) if name != "title"]
    lines = ["| arm | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for row in results.values():
        cells = [f"{row[name]:.4g}" if name in row else "" for name in names]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    missing = [name for name in SCORERS if name not in installed()]
    note = f"Not installed, so not asked: {', '.join(missing)}." if missing else "All scorers were asked."
    return "# LocalDPO, SFT and DPO on one model\n\n" + "\n".join(lines) + f"\n\n{note} One seed: no spread is known.\n"
