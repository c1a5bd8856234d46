"""Plots as inline SVG: no script, no font, no colour of their own (the page's style sheet has those)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 560, 244
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 22, 42
MAX_POINTS = 500  # drawn per curve; a longer one is thinned, keeping the extremes of each stretch
MAX_READINGS = 80  # places of a plot at which its values can be read off
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]
Curve = list[tuple[float, float | None]]
"""Points in order of x, y None where there is no value."""
Place = Callable[[float, float], Point]
"""Where a point of the data is drawn."""


@dataclass(frozen=True)
class Series:
    """One curve with its name; `colour` is 1 to 8."""

    label: str
    points: Curve
    colour: int


@dataclass(frozen=True)
class Rule:
    """A dashed horizontal line that says what a value means."""

    y: float
    label: str


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    description: str,
    smooth: bool = False,
    y_limits: tuple[float, float] | None = None,
    rules: Sequence[Rule] = (),
) -> str:
    """SVG of the curves with a legend above it that names their last values, and what the rules are. Where the
    curves are under the pointer is written above.

    smooth: draw the values thin and their moving average over them; else the values, with a mark at each if
    they are few.
    y_limits: fixed limits; else from the data without the wildest hundredth, and from the rules.
    Returns "" if no series has a value.
    """
    shown = [s for s in series if any(y is not None for _, y in s.points)]
    if not shown:
        return ""
    averages = [_moving_average(s.points) if smooth else s.points for s in shown]
    low, high = y_limits or _limits([s.points for s in shown], averages, rules)
    xs = [x for s in shown for x, _ in s.points]
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1

    def place(x: float, y: float) -> Point:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_axes(low, high, x_low, x_high, x_label, place)]
    within = [rule for rule in rules if low <= rule.y <= high]
    for y in (place(x_low, rule.y)[1] for rule in within):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    frame = f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
    frame += f'viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">'  # clips what lies outside
    curves = []
    if smooth:
        curves += [_path(s.points, place, f"raw c{s.colour}") for s in shown]
    curves += [_path(a, place, f"curve c{s.colour}") for s, a in zip(shown, averages, strict=True)]
    parts += [frame, *curves, "</svg>"]
    if not smooth:
        parts += [_marks(s, place) for s in shown if len(s.points) <= 25]
    parts += _readings(shown, averages, x_label, place)
    legend = "".join(
        f'<span><i class="c{s.colour}"></i>{escape(s.label)}'
        + (f" <b>{short(_last(average))}</b>" if smooth else "")
        + "</span>"
        for s, average in zip(shown, averages, strict=True)
    )
    which = [f" ({short(rule.y)})" * (len(within) > 1) for rule in within]  # of two dashed lines
    legend += "".join(
        f'<span><i class="dashed"></i>{escape(rule.label)}{value}</span>'
        for rule, value in zip(within, which, strict=True)
    )
    return (
        f'<p class="legend">{legend}</p><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )


def _readings(series: Sequence[Series], curves: Sequence[Curve], x_label: str, place: Place) -> list[str]:
    """A strip of the plot for every place, with where the curves are there, which the style sheet shows under a
    pointer: each in its colour, in the legend's order; of a curve that has not begun yet, or has ended, nothing."""
    drawn = [np.array([(x, y) for x, y in points if y is not None], dtype=float).T for points in curves]
    xs = np.unique(np.concatenate([x for x, _ in drawn]))
    xs = xs[np.unique(np.linspace(0, len(xs) - 1, MAX_READINGS).round().astype(int))]
    centres = [place(x, 0.0)[0] for x in xs]
    middles = [round(sum(pair) / 2, 1) for pair in pairwise(centres)]  # as printed
    edges = [LEFT, *middles, WIDTH - RIGHT]
    height, strips = HEIGHT - TOP - BOTTOM, []
    for x, centre, (start, end) in zip(xs, centres, pairwise(edges), strict=True):
        found = "".join(
            f' · <tspan class="c{one.colour}">{short(float(np.interp(x, steps, values)))}</tspan>'
            for one, (steps, values) in zip(series, drawn, strict=True)
            if steps[0] <= x <= steps[-1]
        )
        strips.append(
            f'<g class="read"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{height}"/>'
            f'<path d="M{centre:.1f} {TOP}v{height}"/>'
            f'<text x="{WIDTH - RIGHT}" y="13" text-anchor="end">{escape(x_label)} {x:g}{found}</text></g>'
        )
    return strips


def _marks(series: Series, place: Place) -> str:
    placed = [place(x, y) for x, y in series.points if y is not None]
    return "".join(f'<circle class="c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in placed)


def strip_plot(points: Sequence[tuple[str, float]], high: float, description: str) -> str:
    """One row from 0 to `high`: a tick for each ("real…", x), a ring for "base", a disc for "aligned"."""
    width, height = 220, 22
    marks = []
    for kind, value in points:
        x = 8 + max(0.0, min(value / high, 1.0)) * (width - 16) if high > 0 else 8
        if kind.startswith("real"):
            marks.append(f'<line class="{escape(kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="20"/>')
        else:
            marks.append(f'<circle class="{escape(kind)}" cx="{x:.1f}" cy="11" r="{6 if kind == "base" else 4}"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(description)}">'
        f'<line class="axis" x1="8" x2="{width - 8}" y1="11" y2="11"/>{"".join(marks)}</svg>'
    )


def short(value: float | None) -> str:
    """A number in four significant digits at most, with a real minus sign; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    exponent = int(f"{value:.3e}".split("e")[1])  # of the rounded value: 0.09999999 is 0.1000
    if exponent < -3 or exponent > 5:
        text = f"{value / 10.0**exponent:.2f}·10{str(exponent).translate(SUPERSCRIPTS)}"
    else:
        text = f"{value:.{max(0, 3 - exponent)}f}"
    return text.replace("-", "−")


def percent(share: float | None) -> str:
    """0.8125 as "81.2 %"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def signed_percent(change: float | None) -> str:
    """0.0123 as "+1.23 %"."""
    return "–" if change is None else f"{100 * change:+.2f} %".replace("-", "−")


def _moving_average(points: Curve) -> Curve:
    """Each value averaged with its neighbours, over a thirtieth of the curve to each side.

    At the start the window shrinks on both sides, so that the curve starts where the run did; at the end on
    one side only, so that the last average is no single value.
    """
    values = [(x, y) for x, y in points if y is not None]
    reach = max(1, len(values) // 30)
    sums = [0.0]
    for _, y in values:
        sums.append(sums[-1] + y)
    averaged: Curve = []
    for i, (x, _) in enumerate(values):
        side = min(reach, i)
        end = min(i + side + 1, len(values))
        averaged.append((x, (sums[end] - sums[i - side]) / (end - i + side)))
    return averaged


def _last(points: Curve) -> float | None:
    return next((y for _, y in reversed(points) if y is not None), None)


def _limits(curves: Sequence[Curve], averages: Sequence[Curve], rules: Sequence[Rule]) -> tuple[float, float]:
    raw = sorted(y for points in curves for _, y in points if y is not None)
    cut = len(raw) // 100
    wanted = raw[cut : len(raw) - cut] + [y for points in averages for _, y in points if y is not None]
    wanted += [rule.y for rule in rules]
    low, high = min(wanted), max(wanted)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(low: float, high: float, x_low: float, x_high: float, x_label: str, place: Place) -> str:
    ticks = _ticks(low, high, 4)
    exponent = math.floor(math.log10(max(map(abs, ticks), default=1) or 1))
    exponent = 0 if -3 <= exponent <= 4 else exponent
    parts = []
    for value, text in zip(ticks, _tick_texts(ticks, exponent), strict=True):
        y = place(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    if exponent:
        power = str(exponent).translate(SUPERSCRIPTS)
        parts.append(f'<text x="0" y="12">×10{power}</text>')
    x_ticks = _ticks(x_low, x_high, 6)
    for value, text in zip(x_ticks, _tick_texts(x_ticks, 0), strict=True):
        x = place(value, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _tick_texts(ticks: list[float], exponent: int) -> list[str]:
    scaled = [value / 10.0**exponent for value in ticks]
    step = min((b - a for a, b in pairwise(scaled)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(round(step, decimals) - step) > 1e-6 * step:  # steps of 0.25
        decimals += 1
    return [f"{value:.{decimals}f}".replace("-", "−") if value else "0" for value in scaled]


def _path(points: Curve, place: Place, css: str) -> str:
    commands, pen_down = [], False
    for x, y in _thinned(points):
        if y is None:
            pen_down = False
            continue
        px, py = place(x, y)
        commands.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = True
    return f'<path class="{css}" d="{"".join(commands)}"/>'


def _thinned(points: Curve) -> Curve:
    if len(points) <= MAX_POINTS:
        return points
    kept: Curve = []
    size = math.ceil(2 * len(points) / MAX_POINTS)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [(x, y) for x, y in stretch if y is not None]
        if not values:
            kept.append(stretch[0])
            continue
        extremes = {min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept
