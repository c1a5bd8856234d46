"""The experiment's page: tables with means and spreads over seeds, plots, and samples, under OUT/FAMILY/page."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit.evaluation.intervals import difference
from alignkit.evaluation.summary import versions
from alignkit.experiments.plan import Arm, Plan
from alignkit.experiments.stores import heldout_store
from alignkit.media.videos import write_video
from alignkit.progress import say
from alignkit.rankers.people import write_comparisons
from alignkit.tiny.clips import FPS

COLUMNS = {
    "good": ("good samples, %", "{:.1f}", 100),
    "fault_rate": ("with a fault, %", "{:.1f}", 100),
    "prompt_following": ("prompt followed, %", "{:.1f}", 100),
    "frechet": ("Fréchet distance", "{:.2f}", 1),
    "flicker": ("flicker", "{:.3f}", 1),
    "motion": ("motion", "{:.2f}", 1),
    "edges": ("edges", "{:.2f}", 1),
    "winner_error_change": ("error on real clips, change in %", "{:+.2f}", 100),
    "loser_error_change": ("error on losers, change in %", "{:+.2f}", 100),
    "region_accuracy": ("region accuracy, %", "{:.1f}", 100),
    "region_error": ("error of regenerated regions", "{:.3f}", 1),
}
"""Measure: heading, format, factor."""
UNLISTED = ("faulty", "followed")
"""Sample by sample: in the runs' files, not in results.csv."""
BETTER_WHEN_HIGH = ("good", "prompt_following", "region_accuracy")
COMPARED = ("good", "fault_rate", "prompt_following", "frechet", "flicker")
SHOWN_FRAMES = 5
SMOOTHED = 8  # steps, for the eye


def write_up(plan: Plan, out: Path, chosen: dict[str, str]) -> Path:
    """Write results.csv, page.md, blind/ and, where matplotlib is installed, the plots; returns the page."""
    folder = out / plan.folder / "page"
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(plan, out, chosen)
    with (folder / "results.csv").open("w", newline="") as stream:
        names = dict.fromkeys(k for row in rows for k in row if k not in UNLISTED)
        writer = csv.DictWriter(stream, list(names), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    pictures = _plots(plan, out, folder, rows, chosen)
    write_blind_set(plan, out, folder / "blind", chosen)
    minutes = [row["minutes"] for row in rows if "minutes" in row]
    lines = [
        f"# {plan.title} on the small {plan.family}: what the experiment printed",
        "",
        f"{plan.train_clips} clips to train on, {plan.heldout_clips} held out, {plan.steps} steps of 16 pairs, "
        f"{plan.samples} samples a model and seed, seeds {', '.join(map(str, plan.seeds))}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "diffusers")),
        "",
        "## Test prompts, with the settings chosen on validation prompts",
        "",
        *_table(plan, rows, chosen),
        *_real_rows(plan, out),
        "",
        "Means over seeds ± half the range. Accuracy counts (pair, noise level) where the real clip is preferred,",
        "against the base; the error of regenerated regions is the mean squared difference to the real clip's latents.",
        "",
        "## Differences",
        "",
        *_differences(plan, rows),
        "",
        *(["## After fewer steps", "", *_curve_table(plan, rows), ""] if plan.curve_steps else []),
        f"## Everything that was tried, seed {plan.seeds[0]}, validation prompts",
        "",
        *_search_table(plan, rows, chosen),
        "",
        *_data(out / plan.folder),
        f"{len(minutes)} of these {len(rows)} results took {sum(minutes):.0f} minutes of one process, with training.",
        "",
        *(f"![{name}]({name})" for name in pictures),
    ]
    page = folder / "page.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"experiment: {page}")
    return page


def _rows(plan: Plan, out: Path, chosen: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each measured run, in the plan's order."""
    rows = []
    for arm in plan.arms:
        trials = list(dict.fromkeys([*arm.trials, chosen.get(arm.name, "")]))
        for trial in trials:
            for seed in plan.seeds:
                folder = out / plan.folder / "runs" / "-".join([arm.name, *([trial] if trial else []), str(seed)])
                for split in ("validation", "test", *(f"after-{steps}" for steps in plan.curve_steps)):
                    file = folder / f"{split}.json"
                    if file.exists():
                        which = {"arm": arm.name, "trial": trial, "seed": seed, "split": split}
                        which["chosen"] = int(chosen.get(arm.name, "") == trial)
                        rows.append(which | json.loads(file.read_text()))
    return rows


def _of(rows: list[dict[str, Any]], arm: Arm, split: str, trial: str | None = None) -> list[dict[str, Any]]:
    """The rows of an arm's chosen trial, or of another, that did not diverge."""
    found = [row for row in rows if (row["arm"], row["split"]) == (arm.name, split) and "diverged" not in row]
    return [row for row in found if (row["chosen"] if trial is None else row["trial"] == trial)]


def _table(plan: Plan, rows: list[dict[str, Any]], chosen: dict[str, str]) -> list[str]:
    lines = ["| arm | settings | " + " | ".join(heading for heading, *_ in COLUMNS.values()) + " |"]
    lines.append("| --- " * (len(COLUMNS) + 2) + "|")
    for arm in plan.arms:
        found = _of(rows, arm, "test")
        cells = [_cell(found, name) for name in COLUMNS]
        some = f" ({len(found)} of {len(plan.seeds)} seeds)" * (0 < len(found) < len(plan.seeds))
        lines.append(f"| {arm.title}{some} | {chosen.get(arm.name, '')} | " + " | ".join(cells) + " |")
    return lines


def _real_rows(plan: Plan, out: Path) -> list[str]:
    lines = []
    for title, numbers in json.loads((out / plan.folder / "real.json").read_text()).items():
        cells = [
            form.format(factor * numbers[name]) if name in numbers else ""
            for name, (_, form, factor) in COLUMNS.items()
        ]
        lines.append(f"| {title} | | " + " | ".join(cells) + " |")
    return lines


def _differences(plan: Plan, rows: list[dict[str, Any]]) -> list[str]:
    """Each arm against the base and those of `plan.against`: only what lies beyond the spread over seeds is one."""
    lines = [
        "Arms are compared seed by seed, from the same noise, in the same order: one is better or worse in a measure",
        "only where the mean of these differences is larger than their spread (the largest minus the smallest). The",
        "interval is of the paired bootstrap over the samples of all seeds together (95 %), in points of good samples.",
        "",
        "| arm | against | better in | worse in | change of good samples |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in plan.trained:
        for other in (plan.arms[0], *(arm_ for arm_ in plan.trained if arm_.name in plan.against)):
            mine, theirs = _of(rows, arm, "test"), _of(rows, other, "test")
            if arm is other or not mine or not theirs:
                continue
            better: list[str] = []
            worse: list[str] = []
            pairs = _by_seed(mine, theirs)
            for name in COMPARED:
                side = compare([one[name] - another[name] for one, another in pairs])
                side = side if name in BETTER_WHEN_HIGH else -side
                (better if side > 0 else worse).append(COLUMNS[name][0].removesuffix(", %")) if side else None
            lines.append(
                f"| {arm.title} | {other.title} | {', '.join(better) or 'nothing'} | {', '.join(worse) or 'nothing'} | "
                f"{_interval(pairs)} |"
            )
    return lines


def compare(differences: list[float]) -> int:
    """The sign of the mean of several seeds' differences where it is larger than their spread; 0 where it is not, and
    where there are fewer than two."""
    if len(differences) < 2 or abs(np.mean(differences)) <= max(differences) - min(differences):
        return 0
    return int(np.sign(np.mean(differences)))


def _by_seed(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    others = {row["seed"]: row for row in theirs}
    return [(row, others[row["seed"]]) for row in mine if row["seed"] in others]


def _interval(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    if not pairs:
        return ""
    after, before = (np.concatenate([_good(pair[side]) for pair in pairs]) for side in (0, 1))
    change, low, high = difference("good samples", before, after).written(100, 1)
    return f"{change} ({low} to {high})"


def _good(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["followed"]) * (1 - np.array(row["faulty"]))


def _curve_table(plan: Plan, rows: list[dict[str, Any]]) -> list[str]:
    places = [*(f"after-{steps}" for steps in plan.curve_steps), "test"]
    head = [f"{steps} steps" for steps in (*plan.curve_steps, plan.steps)]
    base = _cell(_of(rows, plan.arms[0], "test"), "good")
    lines = [f"Good samples in %; the base's are {base}.", "", "| arm | " + " | ".join(head) + " |"]
    lines.append("| --- " * (len(head) + 1) + "|")
    for arm in plan.trained:
        if arm.curve:
            lines.append(f"| {arm.title} | " + " | ".join(_cell(_of(rows, arm, p), "good") for p in places) + " |")
    return lines


def _data(folder: Path) -> list[str]:
    lines = []
    if (folder / "ranking.json").exists():
        found = json.loads((folder / "ranking.json").read_text())
        lines += [
            f"Of {found['pairs']} ranked pairs, {100 * found['good_winners']:.0f} % of the winners and "
            f"{100 * found['good_losers']:.0f} % of the losers are good samples to the judge.",
            "",
        ]
    if (folder / "cost.json").exists():
        found = json.loads((folder / "cost.json").read_text())
        lines += [
            f"A pair's loser regenerated in a region: {found['local']:.2f} s; a pair ranked among {found['rollouts']} "
            f"samples: {found['ranked']:.2f} s ({found['ranked'] / found['local']:.1f} times as long), in one run.",
            "",
        ]
    return lines


def _cell(found: list[dict[str, Any]], name: str) -> str:
    """Mean over the runs `found` ± half the range; empty where the experiment has no such measure."""
    _, form, factor = COLUMNS[name]
    if not found:
        return "diverged"
    values = [row[name] * factor for row in found if name in row]
    if not values:
        return ""
    middle = form.format(np.mean(values))
    return middle if len(values) == 1 else f"{middle} ± {form.format((max(values) - min(values)) / 2).lstrip('+')}"


def _search_table(plan: Plan, rows: list[dict[str, Any]], chosen: dict[str, str]) -> list[str]:
    names = ("good", "fault_rate", "prompt_following", "frechet", "winner_error_change", "region_accuracy")
    lines = ["| arm | settings | " + " | ".join(COLUMNS[name][0] for name in names) + " | chosen |"]
    lines.append("| --- " * (len(names) + 3) + "|")
    for arm in plan.arms:
        for trial in arm.trials or ([""] if not arm.pairs else []):
            cells = [_cell(_of(rows, arm, "validation", trial), name) for name in names]
            mark = "yes" if trial and chosen[arm.name] == trial else ""
            changes = " ".join(arm.trials[trial].settings) if trial else ""
            written = f"{trial}: " + (f"`{changes}`" if changes else "nothing changed") if trial else ""
            written += f" on {arm.trials[trial].pairs} pairs" if trial and arm.trials[trial].pairs else ""
            lines.append(f"| {arm.title} | {written} | " + " | ".join(cells) + f" | {mark} |")
    return lines


def _plots(plan: Plan, out: Path, folder: Path, rows: list[dict[str, Any]], chosen: dict[str, str]) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        say("no plots: they need matplotlib (pip install 'alignkit[bench]')")
        return []
    matplotlib.use("Agg")
    _samples(plan, out, folder / "samples.png", chosen)
    _dots(plan, folder / "measures.png", rows)
    _curves(plan, out, folder / "curves.png", chosen)
    if not plan.curve_steps:
        return ["samples.png", "measures.png", "curves.png"]
    _convergence(plan, folder / "convergence.png", rows)
    return ["samples.png", "measures.png", "convergence.png", "curves.png"]


def _dots(plan: Plan, file: Path, rows: list[dict[str, Any]]) -> None:
    """Each measure in a panel of its own: one dot a seed, one line an arm."""
    import matplotlib.pyplot as plt

    names = (
        "good",
        "fault_rate",
        "prompt_following",
        "frechet",
        "flicker",
        "motion",
        "winner_error_change",
        "region_error",
    )
    figure, panels = plt.subplots(2, 4, figsize=(15, 6.5), sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, names, strict=True):
        heading, _, factor = COLUMNS[name]
        for place, arm in enumerate(plan.arms):
            values = [row[name] * factor for row in _of(rows, arm, "test") if name in row]
            panel.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.8)
        base = [row[name] * factor for row in _of(rows, plan.arms[0], "test")]
        if base:
            panel.axvline(np.mean(base), color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(heading, fontsize=10)
        panel.set_yticks(range(len(plan.arms)), [arm.title for arm in plan.arms], fontsize=9)
        panel.invert_yaxis() if not panel.yaxis_inverted() else None
        panel.grid(axis="x", alpha=0.3)
    figure.suptitle(f"small {plan.family}, test prompts; a dot a seed, the dotted line is the base's mean", fontsize=11)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _convergence(plan: Plan, file: Path, rows: list[dict[str, Any]]) -> None:
    """Good samples against steps, each seed a line and their mean a thick one."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    base = _of(rows, plan.arms[0], "test")
    places = {0: base} | {steps: f"after-{steps}" for steps in plan.curve_steps} | {plan.steps: "test"}
    for color, arm in enumerate(arm for arm in plan.trained if arm.curve):
        lines: dict[int, list[tuple[int, float]]] = {}
        for steps, place in places.items():
            for row in place if isinstance(place, list) else _of(rows, arm, place):
                lines.setdefault(row["seed"], []).append((steps, 100 * row["good"]))
        for points in lines.values():
            panel.plot(*zip(*points, strict=True), color=f"C{color}", alpha=0.35, linewidth=1)
        means: dict[int, Any] = {
            steps: np.mean([dict(points)[steps] for points in lines.values() if steps in dict(points)])
            for steps in places
            if any(steps in dict(points) for points in lines.values())
        }
        panel.plot(list(means), list(means.values()), "o-", color=f"C{color}", linewidth=2.2, label=arm.title)
    panel.set_xlabel("steps")
    panel.set_ylabel("good samples, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9)
    panel.set_title(f"small {plan.family}: no fault and the prompt followed, test prompts", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _curves(plan: Plan, out: Path, file: Path, chosen: dict[str, str]) -> None:
    """Training curves of the first seed."""
    import matplotlib.pyplot as plt

    wanted = plan.curves
    figure, panels = plt.subplots(1, len(wanted), figsize=(17, 5.4), layout="constrained")
    for place, arm in enumerate(plan.trained, start=1):
        name = "-".join([arm.name, chosen[arm.name], str(plan.seeds[0])])
        log = out / plan.folder / "runs" / name / "train" / "metrics.jsonl"
        if not log.exists():
            continue
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        for panel, metric in zip(panels, wanted, strict=True):
            points = _smooth([(row["step"], row[metric]) for row in steps if row.get(metric) is not None])
            panel.plot(
                [x for x, _ in points], [y for _, y in points], color=f"C{place}", label=arm.title, linewidth=1.2
            )
    for panel, title in zip(panels, wanted.values(), strict=True):
        panel.set_title(f"{title}, mean of {SMOOTHED} steps", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [
        (step, float(np.mean([y for _, y in points[max(0, i - SMOOTHED + 1) : i + 1]])))
        for i, (step, _) in enumerate(points)
    ]


def _shown(plan: Plan, out: Path, arm: Arm, chosen: dict[str, str]) -> np.ndarray | None:
    """The first seed's first samples of an arm, uint8 [count, F, H, W, 3]."""
    trial = chosen.get(arm.name, "")
    name = "-".join([arm.name, *([trial] if trial else []), str(plan.seeds[0])])
    stored = out / plan.folder / "runs" / name / "test-samples.npz"
    return np.load(stored)["frames"] if stored.exists() else None


def _samples(plan: Plan, out: Path, file: Path, chosen: dict[str, str]) -> None:
    """The first prompts from the same noise for every arm: not a choice."""
    import matplotlib.pyplot as plt

    every = {arm.title: _shown(plan, out, arm, chosen) for arm in plan.arms}
    shown = {title: clips for title, clips in every.items() if clips is not None}
    figure, axes = plt.subplots(len(shown), 1, figsize=(16, 0.72 * len(shown)), layout="constrained", squeeze=False)
    for axis, (title, clips) in zip(axes.flat, shown.items(), strict=True):
        times = np.linspace(0, clips.shape[1] - 1, SHOWN_FRAMES).round().astype(int)
        strips = [np.concatenate(list(clip[times]), axis=1) for clip in clips]
        axis.imshow(
            np.concatenate([np.pad(strip, ((0, 0), (3, 3), (0, 0)), constant_values=255) for strip in strips], axis=1)
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_blind_set(plan: Plan, out: Path, folder: Path, chosen: dict[str, str]) -> None:
    """Clips for people who are not told which arm made them, those of `plan.blind`, the same prompt and noise: a
    folder for `alignkit rank serve` and `alignkit rank results`."""
    both = [_shown(plan, out, plan.arm(name), chosen) for name in plan.blind]
    if any(clips is None for clips in both):
        return
    folder.mkdir(parents=True, exist_ok=True)
    prompts = heldout_store(plan, out, "test").rows["prompt"]
    rows = []
    for number, clips in enumerate(zip(*both, strict=True)):
        for side, clip in zip("ab", clips, strict=True):
            write_video(folder / f"{number:03d}-{side}.mp4", torch.from_numpy(clip), FPS)
        row = {"id": f"{number:03d}", "prompt": prompts[number % len(prompts)]}
        row |= {side: f"{number:03d}-{side}.mp4" for side in "ab"}
        rows.append(row | {f"kind_{side}": name for side, name in zip("ab", plan.blind, strict=True)})
    write_comparisons(folder, rows)
