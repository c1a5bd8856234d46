"""The experiment's page: tables with means and spreads over seeds, plots, and samples, under OUT/FAMILY/page."""

import csv
import json
from pathlib import Path

import numpy as np

from alignkit.evaluation.summary import versions
from alignkit.experiments.plan import Arm, Plan
from alignkit.progress import say

COLUMNS = {
    "region_accuracy": ("region accuracy", "{:.3f}", 1),
    "global_accuracy": ("global accuracy", "{:.3f}", 1),
    "generated_accuracy": ("accuracy on generated pairs", "{:.3f}", 1),
    "winner_error_change": ("error on real clips, change in %", "{:+.2f}", 100),
    "region_error": ("error of regenerated regions", "{:.3f}", 1),
    "frechet": ("Fréchet distance", "{:.1f}", 1),
    "frechet_change": ("its change against the base from the same noise", "{:+.2f}", 1),
    "motion": ("motion", "{:.2f}", 1),
    "flicker": ("flicker", "{:.3f}", 1),
    "edges": ("edges", "{:.2f}", 1),
    "named": ("prompt followed", "{:.3f}", 1),
}
"""Measure: heading, format, factor."""
SHOWN_FRAMES = 5
SMOOTHED = 8  # steps, for the eye


def write_up(plan: Plan, out: Path, chosen: dict[str, float]) -> Path:
    """Write results.csv, page.md and, where matplotlib is installed, the plots; returns the page."""
    folder = out / plan.family / "page"
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(plan, out)
    with (folder / "results.csv").open("w", newline="") as stream:
        names = ["arm", "rate", "seed", "split", "chosen", *dict.fromkeys(k for row in rows for k in row)]
        writer = csv.DictWriter(stream, list(dict.fromkeys(names)))
        writer.writeheader()
        writer.writerows(row | {"chosen": int(chosen.get(row["arm"]) == row["rate"])} for row in rows)
    pictures = _plots(plan, out, folder, rows, chosen)
    smallest = min(plan.rates)
    minutes = [row["minutes"] for row in rows if "minutes" in row]
    lines = [
        f"# LocalDPO on the small {plan.family}: what the experiment printed",
        "",
        f"{plan.train_clips} clips to train on, {plan.heldout_clips} held out, {plan.steps} steps of 16 pairs, "
        f"{plan.samples} samples a model, seeds {', '.join(map(str, plan.seeds))}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "diffusers")),
        "",
        "## Test clips and prompts, at the learning rate chosen on validation",
        "",
        *_table(plan, rows, chosen),
        *_real_rows(plan, out),
        "",
        "Means over seeds ± half the range. Accuracy counts (pair, noise level) where the real clip is preferred,",
        "against the base; the error of regenerated regions is the mean squared difference to the real clip's latents.",
        "",
        f"## Test clips and prompts, at {smallest:g} for all",
        "",
        *_table(plan, rows, {arm.name: smallest for arm in plan.trained}),
        "",
        f"## Every learning rate, seed {plan.seeds[0]}, validation",
        "",
        *_search_table(plan, rows, chosen),
        "",
        *_ranking(plan, out),
        f"{len(minutes)} of these {len(rows)} results took {sum(minutes):.0f} minutes of one process, with training.",
        "",
        *(f"![{name}]({name})" for name in pictures),
    ]
    page = folder / "page.md"
    page.write_text("\n".join(lines) + "\n")
    say(f"experiment: {page}")
    return page


def _rows(plan: Plan, out: Path) -> list[dict]:
    """One row for each measured run, in the plan's order."""
    rows = []
    for arm in plan.arms:
        for rate in plan.rates if arm.pairs else (None,):
            for seed in plan.seeds:
                folder = out / plan.family / "runs" / (f"{arm.name}-{rate:g}-{seed}" if rate else f"{arm.name}-{seed}")
                for split in ("validation", "test"):
                    file = folder / f"{split}.json"
                    if file.exists():
                        numbers = json.loads(file.read_text())
                        rows.append({"arm": arm.name, "rate": rate, "seed": seed, "split": split, **numbers})
    base = {(row["seed"], row["split"]): row["frechet"] for row in rows if row["rate"] is None}
    for row in rows:
        if "frechet" in row and (row["seed"], row["split"]) in base:
            row["frechet_change"] = row["frechet"] - base[row["seed"], row["split"]]
    return rows


def _of(rows: list[dict], arm: Arm, rate: float | None, split: str) -> list[dict]:
    found = [row for row in rows if (row["arm"], row["rate"], row["split"]) == (arm.name, rate, split)]
    return [row for row in found if "diverged" not in row]


def _table(plan: Plan, rows: list[dict], rates: dict[str, float]) -> list[str]:
    lines = ["| arm | learning rate | " + " | ".join(heading for heading, *_ in COLUMNS.values()) + " |"]
    lines.append("| --- " * (len(COLUMNS) + 2) + "|")
    for arm in plan.arms:
        rate = rates.get(arm.name)
        found = _of(rows, arm, rate, "test")
        cells = [_cell(found, name) for name in COLUMNS]
        some = f" ({len(found)} of {len(plan.seeds)} seeds)" * (0 < len(found) < len(plan.seeds))
        lines.append(f"| {arm.title}{some} | {f'{rate:g}' if rate else ''} | " + " | ".join(cells) + " |")
    return lines


def _real_rows(plan: Plan, out: Path) -> list[str]:
    lines = []
    for title, numbers in json.loads((out / plan.family / "real.json").read_text()).items():
        cells = [form.format(numbers[name]) if name in numbers else "" for name, (_, form, _) in COLUMNS.items()]
        lines.append(f"| {title} | | " + " | ".join(cells) + " |")
    return lines


def _ranking(plan: Plan, out: Path) -> list[str]:
    file = out / plan.family / "ranking.json"
    if not file.exists():
        return []
    numbers = json.loads(file.read_text())
    return [
        f"Of the generated training pairs, {100 * numbers['losers_that_follow']:.0f} % have a loser that follows its",
        f"prompt too; half of them were ranked by less than {numbers['median_margin']:.2f} nats of its probability.",
        "",
    ]


def _cell(found: list[dict], name: str) -> str:
    """Mean over the runs `found` ± half the range; empty where the experiment has no such measure."""
    _, form, factor = COLUMNS[name]
    if not found:
        return "diverged"
    values = [row[name] * factor for row in found if name in row]
    if not values:
        return ""
    middle = form.format(np.mean(values))
    return middle if len(values) == 1 else f"{middle} ± {form.format((max(values) - min(values)) / 2).lstrip('+')}"


def _search_table(plan: Plan, rows: list[dict], chosen: dict[str, float]) -> list[str]:
    names = ("region_accuracy", "winner_error_change", "region_error", "frechet", "named")
    lines = ["| arm | learning rate | " + " | ".join(COLUMNS[name][0] for name in names) + " | chosen |"]
    lines.append("| --- " * (len(names) + 3) + "|")
    for arm in plan.arms:
        for rate in plan.rates if arm.pairs else (None,):
            found = _of(rows, arm, rate, "validation")
            cells = [_cell(found, name) for name in names]
            mark = "yes" if rate and chosen[arm.name] == rate else ""
            lines.append(f"| {arm.title} | {f'{rate:g}' if rate else ''} | " + " | ".join(cells) + f" | {mark} |")
    return lines


def _plots(plan: Plan, out: Path, folder: Path, rows: list[dict], chosen: dict[str, float]) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        say("no plots: they need matplotlib (pip install 'alignkit[bench]')")
        return []
    matplotlib.use("Agg")
    _dots(plan, folder / "measures.png", rows, chosen)
    _curves(plan, out, folder / "curves.png", chosen)
    _samples(plan, out, folder / "samples.png", chosen)
    return ["measures.png", "curves.png", "samples.png"]


def _dots(plan: Plan, file: Path, rows: list[dict], chosen: dict[str, float]) -> None:
    """Each measure in a panel of its own: one dot a seed, one line an arm."""
    import matplotlib.pyplot as plt

    names = ("region_accuracy", "winner_error_change", "region_error", "frechet", "motion", "flicker", "edges", "named")
    figure, panels = plt.subplots(2, 4, figsize=(15, 6.5), sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, names, strict=True):
        heading, _, factor = COLUMNS[name]
        for place, arm in enumerate(plan.arms):
            values = [row[name] * factor for row in _of(rows, arm, chosen.get(arm.name), "test")]
            panel.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.8)
        base = [row[name] * factor for row in _of(rows, plan.arms[0], None, "test")]
        if base:
            panel.axvline(np.mean(base), color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(heading, fontsize=10)
        panel.set_yticks(range(len(plan.arms)), [arm.title for arm in plan.arms], fontsize=9)
        panel.invert_yaxis() if not panel.yaxis_inverted() else None
        panel.grid(axis="x", alpha=0.3)
    figure.suptitle(f"small {plan.family}, test clips; a dot a seed, the dotted line is the base's mean", fontsize=11)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _curves(plan: Plan, out: Path, file: Path, chosen: dict[str, float]) -> None:
    """Training curves of the first seed at the chosen rate, and of the largest rate, dashed."""
    import matplotlib.pyplot as plt

    wanted = {"region/accuracy": "region accuracy", "error_w": "winner's error", "grad_norm": "gradient norm"}
    figure, panels = plt.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
    for place, arm in enumerate(plan.trained, start=1):
        for rate in dict.fromkeys((chosen[arm.name], max(plan.rates))):
            log = out / plan.family / "runs" / f"{arm.name}-{rate:g}-{plan.seeds[0]}" / "train" / "metrics.jsonl"
            if not log.exists():
                continue
            steps = [json.loads(line) for line in log.read_text().splitlines()]
            for panel, name in zip(panels, wanted, strict=True):
                points = [(row["step"], row[name]) for row in steps if row.get(name) is not None]
                if points:
                    points = _smooth(points)
                    style = "-" if rate == chosen[arm.name] else "--"
                    label = f"{arm.title}, {rate:g}"
                    panel.plot(*zip(*points, strict=True), style, color=f"C{place}", label=label, linewidth=1.2)
    for panel, title in zip(panels, wanted.values(), strict=True):
        panel.set_title(f"{title}, mean of {SMOOTHED} steps", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[2].set_yscale("log")
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [
        (step, float(np.mean([y for _, y in points[max(0, i - SMOOTHED + 1) : i + 1]])))
        for i, (step, _) in enumerate(points)
    ]


def _samples(plan: Plan, out: Path, file: Path, chosen: dict[str, float]) -> None:
    """The same noise and prompts for every arm, and for every arm at the largest rate."""
    import matplotlib.pyplot as plt

    shown: dict[str, np.ndarray] = {}
    for arm in plan.arms:
        for rate in dict.fromkeys((chosen.get(arm.name), max(plan.rates))) if arm.pairs else (None,):
            name = f"{arm.name}-{rate:g}-{plan.seeds[0]}" if rate else f"{arm.name}-{plan.seeds[0]}"
            stored = out / plan.family / "runs" / name / "test-samples.npz"
            if stored.exists():
                shown[f"{arm.title}\n{rate:g}" if rate else arm.title] = np.load(stored)["frames"]
    figure, axes = plt.subplots(len(shown), 1, figsize=(11, 0.75 * len(shown)), layout="constrained", squeeze=False)
    for axis, (title, clips) in zip(axes.flat, shown.items(), strict=True):
        times = np.linspace(0, clips.shape[1] - 1, SHOWN_FRAMES).round().astype(int)
        axis.imshow(np.concatenate([frame for clip in clips for frame in clip[times]], axis=1))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)
