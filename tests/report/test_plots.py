import re

import pytest

from alignkit.report.plots import (
    LEFT,
    MAX_POINTS,
    MAX_READINGS,
    RIGHT,
    WIDTH,
    Rule,
    Series,
    line_plot,
    percent,
    short,
    signed_percent,
)


def plot(*series: Series, **options) -> str:
    return line_plot(series, x_label="step", description="a plot", **options)


def path_points(svg: str, css: str) -> list[list[tuple[float, float]]]:
    """The strokes of the path of one class, as points."""
    d = re.search(rf'<path class="{css}" d="([^"]*)"', svg).group(1)
    return [[tuple(map(float, pair.split())) for pair in re.split("L", stroke)] for stroke in d.split("M") if stroke]


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (0, "0"), (0.693147, "0.6931"), (0.09999999, "0.1000"), (12.345, "12.35"), (-1234.5, "−1234"),
     (3e-6, "3.00·10⁻⁶"), (-2.5e7, "−2.50·10⁷"), (0.00123456, "0.001235")],
)  # fmt: skip
def test_numbers_are_short_and_readable(value, text):
    assert short(value) == text


def test_percent_signs():
    assert (percent(0.8125), percent(None)) == ("81.2 %", "–")
    assert (signed_percent(0.0123), signed_percent(-0.0123), signed_percent(None)) == ("+1.23 %", "−1.23 %", "–")


def test_a_straight_line_is_drawn_straight_and_rises_on_the_page():
    svg = plot(Series("a", [(float(i), 2.0 * i) for i in range(11)], 1))
    (points,) = path_points(svg, "curve c1")
    xs, ys = zip(*points, strict=True)
    assert len(points) == 11 and ys[0] > ys[-1]
    assert max(ys) - min(ys) == pytest.approx(10 * (ys[0] - ys[1]), abs=1)
    assert xs[-1] - xs[0] == pytest.approx(10 * (xs[1] - xs[0]), abs=1)


def test_a_missing_value_leaves_a_gap_in_the_raw_curve():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 2.0), (4.0, 1.0)]
    assert [len(stroke) for stroke in path_points(plot(Series("a", points, 1), smooth=True), "raw c1")] == [2, 2]


def test_the_moving_average_keeps_a_constant_and_the_start_and_calms_noise():
    noisy = [(float(i), 1.0 + (-1) ** i) for i in range(300)]
    svg = plot(Series("a", noisy, 1), smooth=True, y_limits=(0, 2))
    (average,) = path_points(svg, "curve c1")
    (raw,) = path_points(svg, "raw c1")
    assert average[0] == raw[0], "the first value is what the run started with"
    middle = [y for _, y in average[30:]]
    assert max(middle) - min(middle) < 0.1 * (max(y for _, y in raw) - min(y for _, y in raw))
    flat = path_points(plot(Series("a", [(float(i), 5.0) for i in range(50)], 1), smooth=True), "curve c1")[0]
    assert len({y for _, y in flat}) == 1


def test_long_curves_are_thinned_but_keep_their_spikes():
    values = [(float(i), 0.0) for i in range(20_000)]
    values[12_345] = (12_345.0, 1.0)
    (points,) = path_points(plot(Series("a", values, 1), y_limits=(0, 1)), "curve c1")
    assert len(points) <= MAX_POINTS + 2
    assert min(y for _, y in points) < 30, "the spike is gone"


def test_the_wildest_values_do_not_flatten_the_rest():
    values = [(float(i), float(i % 10)) for i in range(1000)]
    values[500] = (500.0, 1e9)
    svg = plot(Series("a", values, 1), smooth=False)
    (points,) = path_points(svg, "curve c1")
    inside = [y for _, y in points if y > 0]
    assert max(inside) - min(inside) > 100


def test_a_rule_is_in_sight_and_its_words_are_escaped():
    svg = plot(Series("<a>", [(0.0, 5.0), (1.0, 6.0)], 1), rules=[Rule(0.0, "a < b")])
    assert 'class="rule"' in svg and "a &lt; b" in svg and "&lt;a&gt;" in svg


def test_words_on_a_rule_stand_beside_the_plot_where_no_line_can_cross_them():
    series = Series("a", [(float(i), (-1.0) ** i) for i in range(100)], 1)
    html = plot(series, rules=[Rule(0.0, "as it began"), Rule(0.5, "the limit")])
    legend, svg = html.split("<svg", 1)
    assert "as it began (0)" in legend and "the limit (0.5000)" in legend
    assert "as it began" not in svg and svg.count('class="rule"') == 2
    assert "as it began<" in plot(series, rules=[Rule(0.0, "as it began")]), "one alone needs no value"


def test_small_numbers_share_a_power_of_ten_at_the_axis():
    svg = plot(Series("a", [(0.0, 0.0), (1.0, 3e-5)], 1))
    assert "×10⁻⁵" in svg


@pytest.mark.parametrize("points", [[], [(0.0, None)]])
def test_nothing_to_draw_is_nothing(points):
    assert plot(Series("a", points, 1)) == ""


@pytest.mark.parametrize("y", [0.0, 1.0, -3e-9, 1e12])
def test_one_value_alone_is_drawn(y):
    assert 'class="curve c1"' in plot(Series("a", [(1.0, y)], 1), smooth=True)


def test_curves_are_read_off_at_every_place_and_a_long_run_s_at_some_the_last_among_them():
    values = [(float(i), 0.5 * i if i != 2 else None) for i in range(1, 5)]
    svg = plot(Series("a", values, 1), Series("b", [(2.0, 7.0), (4.0, 9.0)], 2))
    read = [re.sub("<[^>]*>", "", text) for text in re.findall(r'text-anchor="end">(step .*?)</text>', svg)]
    assert read == ["step 1 · 0.5000", "step 2 · 1.000 · 7.000", "step 3 · 1.500 · 8.000", "step 4 · 2.000 · 9.000"]
    long = plot(Series("a", [(float(i), 1.0) for i in range(20_000)], 1))
    strips = [(float(x), float(wide)) for x, wide in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', long)]
    assert len(strips) == MAX_READINGS and "step 19999 ·" in long
    ends = [x + wide for x, wide in strips]  # of numbers of one decimal: only their sum in fp64 is rounded
    assert [x for x, _ in strips] == pytest.approx([LEFT, *ends[:-1]], abs=1e-9), "gaps, or one over the other"
    assert ends[-1] == pytest.approx(WIDTH - RIGHT, abs=1e-9)
