"""The curves of the report: each group with a sentence or two on how to read it."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

from alignkit.report.plots import Rule, Series, line_plot, percent, short, signed_percent
from alignkit.report.run import Run, number
from alignkit.report.tables import wide

LN2 = math.log(2)
TRL_NAMES = {"global/accuracy": "rewards/accuracies", "global/logit": "rewards/margins"}
SHARES = (-0.04, 1.04)  # limits of plots of shares, with room for lines at 0 and 1


def curves(run: Run) -> str:
    if not run.metrics:
        body = '<p class="missing">Training curves: not available.</p>'
    else:
        log = Log(run.metrics)
        body = (
            "<p>One value a step, on the batch of pairs it was trained on: thin as it is, thick the moving average, "
            f"in the legend where that ends, under the pointer where it is.{_constant_rate(log)}</p>"
            f"{_grid(_main_plots(run, log))}"
        )
        rest = [_training(name, "As logged.", [log.series(name, name, 1)]) for name in log.others()]
        if any(rest):
            body += f"<details><summary>Everything else that was logged</summary>{_grid(rest)}</details>"
    groups = {
        "Training": body,
        "Held-out pairs while training": _while_training(run),
        "Held-out pairs by noise level": _by_noise_level(run),
    }
    folded = "".join(
        f'<details class="group" open><summary><h3>{title}</h3></summary>{group}</details>\n'
        for title, group in groups.items()
        if group
    )
    return f"""<section id="curves">
<h2>Curves</h2>
{folded}</section>
"""


class Log:
    """The training metrics by name; it remembers which have been drawn."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = [row for row in rows if number(row, "step") is not None]
        self.drawn = {"step"}

    def series(self, name: str, label: str, colour: int) -> Series:
        """The numbers of that name, or of the name that TRL's users know it by."""
        if not any(name in row for row in self.rows):
            name = TRL_NAMES.get(name, name)
        self.drawn.add(name)
        return Series(label, [(row["step"], number(row, name)) for row in self.rows], colour)

    def parts(self, name: str) -> list[Series]:
        """One series for each place of a list of numbers."""
        self.drawn.add(name)
        lists = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), list)]
        count = max((len(values) for _, values in lists), default=0)
        return [
            Series(
                f"{i + 1} of {count}",
                [(step, number({"": values[i]}, "") if i < len(values) else None) for step, values in lists],
                i % 8 + 1,
            )
            for i in range(count)
        ]

    def others(self) -> list[str]:
        """Names of numbers that have not been drawn."""
        names = dict.fromkeys(name for row in self.rows for name in row if number(row, name) is not None)
        return [name for name in names if name not in self.drawn]


def _grid(figures: list[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _figure(title: str, how_to_read: str, plot: str) -> str:
    if not plot:
        return ""
    larger = f'<input type="checkbox" class="larger" aria-label="Enlarge {escape(title)}">'
    caption = f"<figcaption>{escape(how_to_read)}</figcaption>"
    return f"<figure>{larger}<h4>{escape(title)}</h4>{plot}{caption}</figure>"


def _training(title: str, how_to_read: str, series: list[Series], *, smooth: bool = True, **options: Any) -> str:
    description = f"{title} over training steps"
    plot = line_plot(series, x_label="step", description=description, smooth=smooth, **options)
    return _figure(title, how_to_read, plot)


def _main_plots(run: Run, log: Log) -> list[str]:
    objective = run.config.get("objective")
    beta = number(objective, "beta")
    logit = f" With β = {beta:g}, {short(2 / beta)} between the two gaps is one logit." if beta else ""
    how_to_read, start = _start_of_loss(objective)
    return [
        _training("Loss", how_to_read, [log.series("loss", "loss", 1)], rules=start),
        _training(
            "Implicit accuracy",
            "Share of pairs whose winner the policy favours over the loser, compared with the reference; a tie "
            "counts half, so it starts at 0.5. High accuracy alone is no success: read it with the winner's gap.",
            [log.series("region/accuracy", "region", 1), log.series("global/accuracy", "global", 2)],
            y_limits=SHARES,
            rules=[Rule(0.5, "coin toss")],
        ),
        _training(
            "Gap of the winner",
            "The policy's error on the winner minus the reference's: above 0 the policy is getting worse at real "
            "videos. It stands apart from the loser's because the loss sees only their difference, and can fall "
            "while both rise." + logit,
            [log.series("region/gap_w", "region", 1), log.series("global/gap_w", "global", 2)],
            rules=[Rule(0.0, "as the reference")],
        ),
        _training(
            "Gap of the loser",
            "The same for the loser, which should rise above 0 as the policy moves away from what the redrawing "
            "got wrong. If it climbs many times faster than the winner's falls, the policy is breaking things.",
            [log.series("region/gap_l", "region", 3), log.series("global/gap_l", "global", 4)],
            rules=[Rule(0.0, "as the reference")],
        ),
        _training(
            "Denoising error",
            "Mean squared error of the policy's predictions. One batch says little, because the error depends "
            "strongly on the noise level that each pair was shown at.",
            [log.series("error_w", "winner", 1), log.series("error_l", "loser", 3)],
        ),
        _training(
            "Error by noise level",
            "The winner's error, apart for each part of the noise levels (1: least noise): a rise in one of them "
            "is easily hidden in the mean over all.",
            log.parts("error_by_timestep"),
        ),
        _training(
            "Logits",
            "β/2 times the loser's gap minus the winner's: exactly 0 at the first step. A pair is preferred with "
            "the probability σ(logit), so 2 means 88 %.",
            [log.series("region/logit", "region", 1), log.series("global/logit", "global", 2)],
            rules=[Rule(0.0, "no preference")],
        ),
        _training(
            "Rewards",
            "−β/2 times each side's global gap, under the names that TRL gives them: the chosen one's should not "
            "sink below 0.",
            [log.series("rewards/chosen", "chosen", 1), log.series("rewards/rejected", "rejected", 3)],
            rules=[Rule(0.0, "as the reference")],
        ),
        _training(
            "Gradient factor and saturation",
            "The factor σ(−logit) scales a pair's gradient: 0.5 at the start, towards 0 for pairs already "
            "learned. Saturated is the share of pairs that no longer teach anything.",
            [
                log.series("region/gradient_factor", "factor, region", 1),
                log.series("global/gradient_factor", "factor, global", 2),
                log.series("region/saturated", "saturated, region", 3),
                log.series("global/saturated", "saturated, global", 4),
                log.series("safeguard/factor", "loser's gradient kept", 5),
            ],
            y_limits=SHARES,
        ),
        _training(
            "β in force",
            "With beta: auto, 2 over the running mean of the distance between the two gaps, within its limits.",
            [log.series("beta", "β", 1)],
            smooth=False,
        ),
        _training(
            "Gradient norm",
            "Before clipping. Single spikes are harmless; a steady climb says that the learning rate is too high.",
            [log.series("grad_norm", "gradient norm", 1)],
        ),
        _learning_rate(log),
    ]


def _rates(log: Log) -> set[float]:
    return {y for _, y in log.series("lr", "", 1).points if y is not None}


def _learning_rate(log: Log) -> str:
    series = log.series("lr", "learning rate", 1)
    moves = len(_rates(log)) > 1
    return _training("Learning rate", "As it was set at each step.", [series], smooth=False) if moves else ""


def _constant_rate(log: Log) -> str:
    rates = _rates(log)
    return f" The learning rate was {short(rates.pop())} throughout." if len(rates) == 1 else ""


def _while_training(run: Run) -> str:
    """What `train.validate_every` saw; nothing where it did not look."""
    if not run.validation:
        return ""
    log = Log(run.validation)
    most = number(run.config, "train", "max_winner_error")
    limit = [Rule(100 * most, "train.max_winner_error")] if most is not None else []
    changes = [
        Series(label, [(row["step"], _percents(number(row, f"{side}_error_change"))) for row in log.rows], colour)
        for side, label, colour in (("winner", "winner", 1), ("loser", "loser", 3))
    ]
    figures = [
        _training(
            "Accuracy on held-out pairs",
            "Share of pairs never trained on whose winner is favoured, against the model that the training began with: "
            "the same noise at every look, so it begins at exactly 0.5.",
            [log.series("region_accuracy", "region", 1), log.series("global_accuracy", "global", 2)],
            smooth=False,
            y_limits=SHARES,
            rules=[Rule(0.5, "coin toss")],
        ),
        _training(
            "Change of their errors, in percent",
            "Since the training began. The winner's should not rise: where it does, real videos are unlearned.",
            changes,
            smooth=False,
            rules=[Rule(0.0, "as it began"), *limit],
        ),
    ]
    return _grid(figures)


def _percents(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _start_of_loss(objective: dict[str, Any] | None) -> tuple[str, list[Rule]]:
    """How to read the loss, and a line at its value while policy and reference agree."""
    name = str(objective.get("name", "local_dpo")) if isinstance(objective, dict) else "local_dpo"
    if name == "local_dpo":
        weights = [number(objective, f"weight_{part}") for part in ("region", "global")]
        total = sum(1.0 if weight is None else weight for weight in weights)
        return (
            "While policy and reference agree, each preference term is ln 2 = 0.693, a coin toss; so the two of "
            f"them start at {total:g} × 0.693 (dashed). Below it winners are preferred. The small rest on top is "
            "the plain denoising loss of the winner.",
            [Rule(total * LN2, f"no preference: {total * LN2:.3f}")],
        )
    if name == "winner_guarded":
        return "The guard's part depends on the winner's error, so there is no value that it starts from.", []
    start = {"ipo": 0.25, "hinge": 1.0, "sft": None}.get(name, LN2)
    if name == "poly_dpo" and start is not None:
        start += (number(objective, "poly_alpha") or 0.0) / 2
    if start is None:
        return "The plain denoising loss of the winners.", []
    return (
        f"While policy and reference agree, the loss of {name} is {short(start)} (dashed). Below it winners are "
        "preferred.",
        [Rule(start, f"no preference: {start:.3f}")],
    )


def _by_noise_level(run: Run) -> str:
    levels = run.evaluation.get("by_timestep")
    levels = [row for row in levels if number(row, "sigma") is not None] if isinstance(levels, list) else []
    if not levels:
        return '<p class="missing">Not available.</p>'
    levels = sorted(levels, key=lambda row: row["sigma"])

    def series(label: str, colour: int, value: Callable[[dict[str, Any]], float | None]) -> Series:
        return Series(label, [(row["sigma"], value(row)) for row in levels], colour)

    accuracy = line_plot(
        [
            series("region", 1, lambda row: number(row, "region_accuracy")),
            series("global", 2, lambda row: number(row, "global_accuracy")),
        ],
        x_label="noise level σ",
        description="accuracy on held-out pairs by noise level",
        y_limits=SHARES,
        rules=[Rule(0.5, "coin toss")],
    )
    error = line_plot(
        [series("winner", 1, lambda row: _points(row, "w")), series("loser", 3, lambda row: _points(row, "l"))],
        x_label="noise level σ",
        description="change of the denoising error on held-out pairs by noise level, in percent",
        rules=[Rule(0.0, "as the base")],
    )
    figures = [
        _figure(
            "Accuracy after training",
            "Share of held-out pairs whose winner is favoured, always on the same noise. The layout is decided at "
            "high noise (σ = 1 is nothing else), details at low noise.",
            accuracy,
        ),
        _figure(
            "Change of the error, in percent",
            "Against the base, on the same noise: the winner's should not rise, the loser's may.",
            error,
        ),
    ]
    return _grid(figures) + _table(levels)


def _change(row: dict[str, Any], side: str) -> float | None:
    before, after = number(row, f"error_{side}_before"), number(row, f"error_{side}_after")
    return after / before - 1 if before and after is not None else None


def _points(row: dict[str, Any], side: str) -> float | None:
    return _percents(_change(row, side))


def _table(levels: list[dict[str, Any]]) -> str:
    columns = ("σ", "region accuracy", "global accuracy", "winner’s error before", "after", "change")
    rows = ""
    for row in levels:
        values = [
            f"{row['sigma']:.3f}",
            percent(number(row, "region_accuracy")),
            percent(number(row, "global_accuracy")),
            short(number(row, "error_w_before")),
            short(number(row, "error_w_after")),
            signed_percent(_change(row, "w")),
        ]
        rows += "<tr>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
    head = "".join(f"<th>{column}</th>" for column in columns)
    return wide(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", "Held-out pairs by noise level")
