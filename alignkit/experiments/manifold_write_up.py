"""The manifold experiment's page: one table beside the published numbers, and where the samples lie."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from alignkit.experiments.manifold_plan import RADIUS, WINNERS, X_REACH, Arm, Plan, height, result_file, samples_file
from alignkit.progress import say

REPRODUCED = 0.03
"""A mean further than this from the published number is called not reproduced."""
MEASURES = ("strict", "on_surface", "in_range", "error_w", "error_l")
SHOWN = 2000  # points an arm in the plot


def write_up(plan: Plan, arms: tuple[Arm, ...], out: Path) -> Path:
    """Write results.csv, page.md and, where matplotlib is installed, samples.png into out/page; returns the page."""
    folder = out / "page"
    folder.mkdir(exist_ok=True)
    rows = [
        {"arm": arm.name, "seed": seed, **json.loads(result_file(out, arm.name, seed).read_text())}
        for arm in arms
        for seed in plan.seeds
    ]
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pictures = _plot(plan, arms, out, folder / "samples.png")
    lines = [
        "# Points on a surface: what the experiment printed",
        "",
        f"{plan.pretraining} and {plan.fine_tuning} steps of {plan.batch}, {plan.samples} samples an arm, seeds "
        f"{', '.join(map(str, plan.seeds))}; {', '.join(sorted({row['made_on'] for row in rows}))}",
        "",
        *table(arms, rows),
        "",
        f"Means over seeds ± half the range. Not reproduced: further than {REPRODUCED} from the published number.",
        "Errors are summed over the coordinates; fresh points and noise, the same for all arms of a seed.",
        f"{len(rows)} results took {sum(row['seconds'] for row in rows) / 60:.0f} minutes of one thread, bases apart.",
        "",
        *(f"![{name}]({name})" for name in pictures),
    ]
    page = folder / "page.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    say(f"experiment: {page}")
    return page


def table(arms: tuple[Arm, ...], rows: list[dict[str, Any]]) -> list[str]:
    """One line an arm, from rows that hold `arm` and the MEASURES."""
    lines = [
        "| arm | StrictScore | published | | on the surface | in a winner's range | winner's error | loser's error |",
        "| --- " * 8 + "|",
    ]
    for arm in arms:
        values = {name: [float(row[name]) for row in rows if row["arm"] == arm.name] for name in MEASURES}
        verdict = ""
        if arm.published is not None:
            verdict = "" if abs(np.mean(values["strict"]) - arm.published) <= REPRODUCED else "not reproduced"
        published = "" if arm.published is None else f"{arm.published:.3f}"
        strict, *others = (_cell(values[name], 3 if name in MEASURES[:3] else 2) for name in MEASURES)
        lines.append(f"| {arm.title} | {strict} | {published} | {verdict} | " + " | ".join(others) + " |")
    return lines


def _cell(values: list[float], digits: int) -> str:
    middle = f"{np.mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _plot(plan: Plan, arms: tuple[Arm, ...], out: Path, file: Path) -> list[str]:
    """Samples of the first seed from the side; the surface is a band, since its height depends on y a little."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: it needs matplotlib (pip install 'alignkit[bench]')")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = torch.linspace(-X_REACH, X_REACH, 400)
    edges = [height(x, torch.full_like(x, y)).numpy() for y in (0.0, 1.0)]
    columns = -(-len(arms) // 2)
    figure, panels = plt.subplots(2, columns, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for panel, arm in zip(panels.flat, arms, strict=False):
        points = load_file(samples_file(out, arm.name, plan.seeds[0]))["points"][:SHOWN]
        for hill in (-WINNERS, WINNERS):
            panel.axvspan(hill - RADIUS, hill + RADIUS, color="C2", alpha=0.12, linewidth=0)
        panel.fill_between(x.numpy(), *edges, color="black", alpha=0.6, linewidth=0.8)
        panel.plot(points[:, 0], points[:, 2], ".", markersize=1.5, alpha=0.4, color="C0")
        panel.set_title(arm.title, fontsize=8)
    for panel in panels.flat[len(arms) :]:
        panel.axis("off")
    panels.flat[0].set(xlim=(-8, 8), ylim=(-3, 4))
    figure.supxlabel("x (shaded: where winners lie)", fontsize=9)
    figure.supylabel("z (black: the surface)", fontsize=9)
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return [file.name]
