"""Draws the benchmark's CSV: time by provider, and the fused ops' share of the device's own copy bandwidth.

python benchmarks/plot.py [rows.csv] [picture.png]
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEFAULT = Path(__file__).parents[1] / "out" / "benchmarks" / "kernels.csv"


def newest(rows: list[dict]) -> list[dict]:
    """The rows of the last run in the file."""
    return [row for row in rows if row["when"] == rows[-1]["when"]]


def draw(rows: list[dict], picture: Path) -> None:
    """A row of pictures for each op and kind of noise, forward beside backward."""
    kinds = list(dict.fromkeys((row["op"], row["noise"]) for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    places = list(dict.fromkeys(f"{row['shape']}, {row['pairs']} pairs, {row['dtype']}" for row in rows))
    height = 0.8 / len(providers)
    figure, axes = plt.subplots(
        len(kinds), len(directions), figsize=(12, len(kinds) * (1 + 0.45 * len(places))),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for row in rows:
        axis = axes[kinds.index((row["op"], row["noise"])), directions.index(row["direction"])]
        i = providers.index(row["provider"])
        y = places.index(f"{row['shape']}, {row['pairs']} pairs, {row['dtype']}") + i * height
        low, middle, high = (float(row[key]) for key in ("low_us", "median_us", "high_us"))
        spread = [[max(middle - low, 0)], [max(high - middle, 0)]]
        axis.barh(y, middle, height, xerr=spread, color=f"C{i}", error_kw={"lw": 0.8})
        if row["provider"] == "alignkit":
            axis.text(high, y, f" {100 * float(row['share_of_copy']):.0f} %", va="center", fontsize=7)
    for (op, noise), line in zip(kinds, axes, strict=True):
        for direction, axis in zip(directions, line, strict=True):
            axis.set_title(f"{op}, noise {noise}, {direction}", fontsize=9, loc="left")
            axis.set_yticks([y + 0.4 - height / 2 for y in range(len(places))], places, fontsize=7)
            axis.set_xscale("log")
            axis.set_xlabel("µs a call: median, 10th to 90th percentile", fontsize=7)
    bars = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(providers))]
    figure.legend(bars, providers, loc="outside lower center", ncols=len(providers), fontsize=8)
    last = rows[-1]
    where = f"{last['device']} · {last['path']} · torch {last['torch']}, triton {last['triton']} · {last['commit']}"
    figure.suptitle(f"{where}\n% is the share of the device's own copy bandwidth", fontsize=9)
    figure.savefig(picture, dpi=110)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    with source.open(newline="") as file:
        draw(newest(list(csv.DictReader(file))), picture)
    print(picture)


if __name__ == "__main__":
    main()
