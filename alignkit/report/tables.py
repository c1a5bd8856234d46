"""The parts of the report that are words and numbers: the verdict, the measures, the costs, the settings."""

from collections.abc import Callable
from html import escape
from statistics import median
from typing import Any

from alignkit.report.plots import percent, short, signed_percent, strip_plot
from alignkit.report.run import Run, number, numbers

SKIPPED_IN_SIGHT, MOST_SKIPPED = 8, 200
FAMILIES = {"wan": "Wan2.1", "cogvideox": "CogVideoX"}
OBJECTIVES = {
    "local_dpo": "LocalDPO",
    "dpo": "DPO",
    "robust_dpo": "robust DPO",
    "poly_dpo": "Poly-DPO",
    "winner_guarded": "winner-guarded DPO",
    "ipo": "IPO",
    "hinge": "the hinge loss",
    "region_dpo": "DPO by region",
    "sft": "supervised fine-tuning",
}
STAGES = {
    "localdpo": "LocalDPO",
    "offline": "offline pairs",
    "half_online": "rollouts beside anchors",
    "online": "ranked rollouts",
    "distill": "distillation into few steps",
    "drift_correction": "drift correction",
}
VERDICTS = {"reached": "reached", "not reached": "unreached", "cannot be judged": "unjudged"}
MOTION = "".join(
    f'<label class="motion"><input type="checkbox" id="{name}" aria-label="{then} all videos">'
    f'<span class="off">{sign} {then} all videos</span><span class="on">{other} {back} all videos</span></label>'
    for name, sign, then, other, back in (("pause", "❚❚", "Pause", "▶", "Play"), ("play", "▶", "Play", "❚❚", "Stop"))
)
"""One of them is seen, by whether the reader wants motion; the style sheet knows which is checked."""
MISSING = '<span class="missing">not available</span>'
KINDS = {"real": "real", "real_through_vae": "real after VAE", "base": "base", "aligned": "aligned"}


def header(run: Run) -> str:
    steps = max((number(row, "step") or 0 for row in run.metrics), default=0)
    size = number(run.config, "train", "global_batch_size")
    length = f" in {steps:g} steps" if steps else ""
    length += f" of {size:g} pairs" if steps and size else ""
    few = number(run.summary, "student_steps")
    student = f" It is a student now, which samples in {few:g} steps without guidance." if few else ""
    return f"""<header>
<p class="brand">alignkit</p>
<h1>{escape(_model(run))}, aligned with {escape(_objective(run))}</h1>
<p class="lead">The model learned{length} {_lesson(run)}.{student} Then it was compared with the model it started from:
on pairs held out from training, and on videos that both generate from the same noise.</p>
<p><a class="outcome {VERDICTS[_found(run)]}" href="#verdict">Alignment {_found(run)}</a></p>
<nav><a href="#pairs">Pairs</a><a href="#effect">Effect</a><a href="#verdict">Verdict</a><a href="#numbers">Numbers</a>
<a href="#curves">Curves</a><a href="#configuration">Configuration</a></nav>
{MOTION}</header>
"""


def _lesson(run: Run) -> str:
    if _objective(run) == OBJECTIVES["sft"]:
        return "from the winners of its pairs alone"
    if _stages(run):
        return "in one stage after the other" if len(_stages(run)) > 1 else f"by {_objective(run)}"
    if run.brought_pairs:
        return "to prefer the better one of two videos, as they were ranked"
    return "to prefer real videos to copies of them in which it had redrawn random regions itself, without any labels"


def _model(run: Run) -> str:
    family = str(run.summary.get("family") or "")
    name = FAMILIES.get(family, family) or "Text-to-video model"
    section = run.config.get("model")
    return f"Tiny {name}" if isinstance(section, dict) and section.get("path") == "tiny" else name


def _stages(run: Run) -> list[str]:
    stages = run.config.get("stages")
    return [str(stage.get("name")) for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _objective(run: Run) -> str:
    names = [STAGES.get(name, OBJECTIVES.get(name, name)) for name in _stages(run)]
    if names:
        return ", ".join(names[:-1]) + (" and " if names[:-1] else "") + names[-1]
    section = run.config.get("objective")
    name = str(section.get("name", "local_dpo")) if isinstance(section, dict) else "local_dpo"
    return OBJECTIVES.get(name, name)


def _found(run: Run) -> str:
    found = str(run.summary.get("verdict"))
    return found if found in VERDICTS else "reached" if run.summary.get("reached") is True else "not reached"


def verdict(run: Run) -> str:
    listed = run.summary.get("criteria")
    criteria = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    found = _found(run)
    failed = [str(c.get("name", "?")) for c in criteria if c.get("reached") is not True]
    unjudged = run.summary.get("unjudged")
    if found == "cannot be judged":
        reasons = [str(reason) for reason in unjudged] if isinstance(unjudged, list) else []
        words = f"The numbers below are those of this run, but they show nothing: {'; '.join(reasons) or 'no reason'}."
    elif not criteria:
        words = "No criteria were recorded for this run."
    elif not failed:
        words = f"All {len(criteria)} criteria hold at once, on data that was not trained on."
    else:
        are = "is" if len(failed) == 1 else "are"
        words = f"{len(failed)} of {len(criteria)} criteria {are} not met: {', '.join(failed)}."
    items = "".join(_criterion(c) for c in criteria)
    return f"""<section id="verdict" class="{VERDICTS[found]}">
<h2>Alignment {found}</h2>
<p>{escape(words)}</p>
<ul class="criteria">{items}</ul>
{_tiles(run)}
</section>
"""


def _criterion(criterion: dict[str, Any]) -> str:
    css, label, sign = ("yes", "met", "✓") if criterion.get("reached") is True else ("no", "not met", "✗")
    name, text = escape(str(criterion.get("name", ""))), escape(str(criterion.get("text", "")))
    tick = f'<span class="tick" role="img" aria-label="{label}">{sign}</span>'
    return f'<li class="{css}">{tick}<div><b>{name}</b> {text}</div></li>'


def _tiles(run: Run) -> str:
    s = run.summary
    accuracy = [number(s, "accuracy", "region", when) for when in ("before", "after")]
    change = number(s, "winner_error", "relative_change")
    frechet = [_mean(numbers(s, "frechet", kind)) for kind in ("base", "aligned")]
    motion = [number(s, "motion", kind) for kind in ("base", "aligned")]
    best = short(number(s, "motion", "real_through_vae"))
    faults, following = (
        [number(s, key, kind) for kind in ("base", "aligned")] for key in ("fault_rate", "prompt_following")
    )
    tiles = [
        ("Samples with a fault", _arrow(faults, percent), _interval(s, "fault_rate")),
        ("Prompt followed", _arrow(following, percent), _interval(s, "prompt_following")),
    ] * (faults[1] is not None)
    tiles += [
        ("Region accuracy", _arrow(accuracy, percent), "on held-out pairs; 50 % is chance"),
        ("Winner’s error", None if change is None else signed_percent(change), "on real videos, against the base"),
    ] * (number(s, "student_steps") is None)  # of a student, errors at steps that are not its own
    tiles += [
        ("Fréchet distance", _arrow(frechet, short), "to real clips; lower is closer"),
        ("Motion", _arrow(motion, short), f"real clips after the VAE: {best}"),
    ]
    by_threes = " threes" * (len(tiles) % 3 == 0)  # else 4, or of a student 2
    return f'<div class="tiles{by_threes}">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _interval(summary: dict[str, Any], key: str) -> str:
    ends = numbers(summary, key, "interval")
    if len(ends) != 2:
        return "of the samples"
    low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in ends)
    return f"change {low} to {high} points (95 % interval)"


def _tile(name: str, value: str | None, note: str) -> str:
    return (
        f'<div><p class="tile-name">{name}</p><p class="tile-value">{value or MISSING}</p>'
        f'<p class="tile-note">{note}</p></div>'
    )


def _arrow(before_after: list[float | None], written: Callable[[float | None], str]) -> str | None:
    before, after = before_after
    return None if after is None else f'<span class="before">{written(before)} →</span> <span>{written(after)}</span>'


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def numbers_section(run: Run) -> str:
    return f"""<section id="numbers">
<h2>Numbers</h2>
<h3>Samples against real clips</h3>
{_against_real(run)}
<h3>Held-out pairs</h3>
{_before_after(run)}
<h3>What it took</h3>
{_costs(run)}
</section>
"""


def _against_real(run: Run) -> str:
    rows = _frechet_row(run)
    for key, name, note in (
        ("motion", "Motion", "mean change from frame to frame, in 1/255"),
        ("flicker", "Flicker", "what is there for one frame only, in 1/255"),
        ("edge_energy", "Fine detail", "pixels against their neighbours, in 1/255; too much of it is a warning"),
    ):
        values = {kind: number(run.summary, key, kind) for kind in KINDS}
        rows += _row(name, note, list(values.items()), [short(value) for value in values.values()])
    for key, name, what in (
        ("fault_rate", "Samples with a fault", "by a detector"),
        ("prompt_following", "Prompt followed", "shape, colour and direction, by a classifier"),
    ):
        shares = {kind: number(run.summary, key, kind) for kind in KINDS}
        count = number(run.summary, key, "samples")
        note = f"share of {count:g} samples, {what}" if count else f"share of samples, {what}"
        rows += _row(name, note, list(shares.items()), [percent(v) for v in shares.values()], high=1.0)
    if not rows:
        return f"<p>{MISSING}</p>"
    legend = "".join(f'<span><i class="{kind}"></i>{label}</span>' for kind, label in KINDS.items())
    head = "<th>Measure</th><th>from 0</th>" + "".join(f"<th>{label}</th>" for label in KINDS.values())
    return f'<p class="legend">{legend}</p>' + wide(
        f'<table class="measures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>', "Samples"
    )


def _frechet_row(run: Run) -> str:
    values = {kind: numbers(run.summary, "frechet", kind) for kind in ("base", "aligned")}
    note = "between the features of samples and of real clips; a mark for each seed"
    if any(len(several) > 1 for several in values.values()):
        note += ", ± half of their range"
    points: list[tuple[str, float | None]] = [(kind, value) for kind, several in values.items() for value in several]
    return _row("Fréchet distance", note, points, ["–", "–", *(_several(several) for several in values.values())])


def _row(
    name: str, note: str, points: list[tuple[str, float | None]], cells: list[str], high: float | None = None
) -> str:
    """A row of the table with its strip plot, or nothing where there is no number."""
    known = [(kind, value) for kind, value in points if value is not None]
    if not known:
        return ""
    description = f"{name}: " + ", ".join(f"{kind} {short(value)}" for kind, value in known)
    strip = strip_plot(known, high or 1.1 * max(value for _, value in known), description)
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}<small>{note}</small></th><td class="strip">{strip}</td>{values}</tr>'


def _several(values: list[float]) -> str:
    mean = short(_mean(values))
    if len(values) < 2:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {(max(values) - min(values)) / 2:.{decimals}f}"


def _before_after(run: Run) -> str:
    rows = ""
    for name, path, written in (
        ("Accuracy, region", ("accuracy", "region"), percent),
        ("Accuracy, global", ("accuracy", "global"), percent),
        ("Winner’s error", ("winner_error",), short),
        ("Loser’s error", ("loser_error",), short),
    ):
        before, after = (number(run.summary, *path, when) for when in ("before", "after"))
        if after is None:
            continue
        change = signed_percent(number(run.summary, *path, "relative_change"))
        if written is percent and before is not None:
            change = f"{100 * (after - before):+.1f} points".replace("-", "−")
        cells = "".join(f"<td>{cell}</td>" for cell in (written(before), written(after), change))
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    if not rows:
        return f"<p>{MISSING}</p>"
    head = "<thead><tr><th></th><th>before</th><th>after</th><th>change</th></tr></thead>"
    return wide(f"<table>{head}<tbody>{rows}</tbody></table>", "Held-out pairs")


def _costs(run: Run) -> str:
    seconds = run.summary.get("seconds")
    given = {name: number(seconds, name) for name in seconds} if isinstance(seconds, dict) else {}
    stages = {name: value for name, value in given.items() if value is not None}
    longest = max(stages.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><i style="width:{100 * value / longest:.1f}%"></i>'
        f"</td><td>{_duration(value)}</td></tr>"
        for name, value in stages.items()
    )
    total = _duration(sum(stages.values()))
    rows += f'<tr class="sum"><th scope="row">together</th><td></td><td>{total}</td></tr>'
    table = wide(f'<table class="costs"><tbody>{rows}</tbody></table>', "Seconds by stage")
    memory = number(run.summary, "peak_memory_gb")
    device = run.summary.get("device")
    facts = f"Memory at most: {MISSING if memory is None else f'{memory:.2f} GB'}."
    facts += f" Machine: {escape(str(device))}." if device else ""
    return f"{table if stages else f'<p>Seconds by stage: {MISSING}</p>'}<p>{facts}</p>{_step(run)}"


def _step(run: Run) -> str:
    """How fast training was, by the median of its steps, and where the time went."""
    names = dict.fromkeys(name for row in run.timings for name in row)
    found = {name: [value for row in run.timings if (value := number(row, name)) is not None] for name in names}
    middle = {name: median(values) for name, values in found.items() if values}
    if "seconds" not in middle:
        return ""
    said = [f"{short(middle['seconds'])} s"]
    said += [f"{short(middle[f'{thing}_per_second'])} {thing} a second"
             for thing in ("pairs", "tokens") if f"{thing}_per_second" in middle]  # fmt: skip
    said += [f"{percent(middle['mfu'])} of the devices’ peak (MFU)"] if "mfu" in middle else []
    parts = {name.partition("/")[2]: value for name, value in middle.items() if name.startswith("seconds/")}
    shares = ", ".join(f"{escape(part)} {percent(value / middle['seconds'])}" for part, value in parts.items())
    return f"<p>A training step (median): {', '.join(said)}.{f' Of its time: {shares}.' if shares else ''}</p>"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def skipped(run: Run) -> str:
    if not run.skipped:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(str(row.get("video", "?")))}</th>'
        f"<td>{escape(str(row.get('reason', '?')))}</td></tr>"
        for row in run.skipped[:MOST_SKIPPED]
    ]
    count = len(run.skipped)
    words = "One thing in the videos folder was" if count == 1 else f"{count} things in the videos folder were"
    rest = ""
    if rows[SKIPPED_IN_SIGHT:]:
        more = f"<p>All {count} are in skipped.jsonl.</p>" if count > MOST_SKIPPED else ""
        rest = f"<details><summary>More of them</summary>{_words(rows[SKIPPED_IN_SIGHT:])}{more}</details>"
    return f"""<section id="skipped">
<h2>Left out</h2>
<p>{words} not used, and why.</p>
{_words(rows[:SKIPPED_IN_SIGHT])}
{rest}
</section>
"""


def wide(table: str, name: str) -> str:
    """A table that may be wider than a phone; it can be scrolled by keyboard too."""
    return f'<div class="wide" role="region" aria-label="{name}" tabindex="0">{table}</div>'


def _words(rows: list[str]) -> str:
    return wide(f'<table class="words"><tbody>{"".join(rows)}</tbody></table>', "Left out")
