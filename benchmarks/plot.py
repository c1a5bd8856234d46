"""Draws the benchmark's CSV: time by provider, and alignkit's share of the device's own copy bandwidth.

python benchmarks/plot.py [rows.csv] [picture.png]
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

DEFAULT = Path(__file__).parents[1] / "out" / "benchmarks" / "kernels.csv"


def place(row: dict) -> str:
    return f"{row['shape']}, {row['pairs']} pair{'s' if row['pairs'] != '1' else ''}, {row['dtype']}"


def draw(rows: list[dict], picture: Path) -> None:
    """A row of pictures for each op and kind of noise, forward beside backward."""
    kinds = list(dict.fromkeys((row["op"], row["noise"]) for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    places = list(dict.fromkeys(map(place, rows)))
    figure, axes = plt.subplots(
        len(kinds), len(directions), figsize=(13, 1.2 + len(kinds) * (0.8 + 0.4 * len(places))),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for row in rows:
        axis = axes[kinds.index((row["op"], row["noise"])), directions.index(row["direction"])]
        i = names.index(row["provider"])
        y = places.index(place(row)) + 0.16 * (i - (len(names) - 1) / 2)
        low, middle, high = (float(row[key]) for key in ("low_us", "median_us", "high_us"))
        axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", ms=4, lw=1, color=f"C{i}")
        if row["provider"] == "alignkit":
            share = 100 * float(row["share_of_copy"])
            axis.annotate(
                f"{share:{'.0f' if share >= 10 else '.2g'}} %",
                (high, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    for (op, noise), line in zip(kinds, axes, strict=True):
        for direction, axis in zip(directions, line, strict=True):
            axis.set_title(f"{op}{noise and f', noise {noise}'}, {direction}", fontsize=9, loc="left")
            axis.set_yticks(range(len(places)), places, fontsize=7)
            axis.set_ylim(len(places) - 0.4, -0.6)
            axis.set_xscale("log")
            axis.margins(x=0.12)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", labelsize=7)
            axis.grid(axis="x", alpha=0.3)
            axis.set_xlabel("µs a call: median and quartiles", fontsize=7)
    marks = [Line2D([], [], marker="o", ms=4, ls="", color=f"C{i}") for i in range(len(names))]
    figure.legend(marks, names, loc="outside lower center", ncols=len(names), fontsize=8)
    last = rows[-1]
    where = f"{last['device']} · {last['path']} · torch {last['torch']}, triton {last['triton']} · {last['commit']}"
    figure.suptitle(f"{where}\n%: share of the copy bandwidth measured on the same device", fontsize=9)
    figure.savefig(picture, dpi=110)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    with source.open(newline="") as file:
        draw([row for row in csv.DictReader(file) if not row["failed"]], picture)
    print(picture)


if __name__ == "__main__":
    main()
