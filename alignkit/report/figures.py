"""The pictures of the report: samples before and after, and the pairs that were trained on."""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from alignkit.errors import DataError
from alignkit.report.choice import chosen
from alignkit.report.pictures import (
    Picture,
    data_uri,
    pair_picture,
    read_maps,
    read_pair,
    region_picture,
    sample_picture,
)
from alignkit.report.run import Run, number

MOST_PAIRS = 6
# Of the page's 8 MB; what does not fit is left out and counted.
SAMPLE_BYTES, PAIR_BYTES, REGION_BYTES = 3_800_000, 2_000_000, 900_000
DEFAULT_FPS = 8.0

Item = TypeVar("Item")


def pairs(run: Run) -> str:
    return f"""<section id="pairs">
<h2>What a pair looks like</h2>
{_pairs(run, _fps(run))}
</section>
"""


def effect(run: Run) -> str:
    return f"""<section id="effect">
<h2>Samples before and after</h2>
{_samples(run, _fps(run))}
{_regions(run, _fps(run))}
</section>
"""


def _fps(run: Run) -> float:
    return number(run.config, "data", "fps") or DEFAULT_FPS


def _samples(run: Run, fps: float) -> str:
    needed = ("prompt", "base", "aligned")
    rows = [row | {"place": place} for place, row in enumerate(run.sample_rows)]
    rows = [row for row in rows if all(isinstance(row.get(key), str) for key in needed)]
    if not rows:
        return '<p class="missing">Samples: not available.</p>'
    shown, rule = chosen(rows)
    folder, maps = run.folder / "samples", read_maps(run.folder / "samples" / "maps.npz", len(run.sample_rows))

    def make(item: tuple[str, dict[str, Any]]) -> tuple[Picture, str]:
        kind, row = item
        cells = [maps[name][row["place"]] for name in ("base", "aligned")] if maps else []
        picture = sample_picture(_inside(folder, row["base"]), _inside(folder, row["aligned"]), fps, cells)
        facts = [kind] * bool(kind) + [f"seed {row['seed']}"] * ("seed" in row) + _judgement(row)
        return picture, escape(row["prompt"]) + "".join(f' <span class="fact">{escape(fact)}</span>' for fact in facts)

    marks = ("base: faults", "aligned: faults") if maps else ()
    cards, left_out, problems = _cards(shown, make, ("base", "aligned", *marks, "difference × 2"), SAMPLE_BYTES)
    omitted = f" {left_out} of them did not fit in the page." if left_out else ""
    return (
        "<p>Both models start from the same noise with the same prompt, so what differs between two videos is the "
        f"training alone{_and_sampler(run)}. {rule}{omitted}{_not_shown(problems)}</p>{cards}"
    )


def _and_sampler(run: Run) -> str:
    few, many = number(run.summary, "student_steps"), number(run.config, "sample", "num_inference_steps")
    return (
        f", and that the aligned one samples in {few:g} steps without guidance, the base in {many:g}"
        if few and many
        else ""
    )


def _judgement(row: dict[str, Any]) -> list[str]:
    if number(row, "fault_base") is None:
        return []
    words = {True: "as prompted", False: "not as prompted", None: "not judged"}
    return [
        f"{name}: fault {100 * (number(row, f'fault_{name}') or 0):.0f} %, {words[row.get(f'followed_{name}')]}"
        for name in ("base", "aligned")
    ]


def _regions(run: Run, fps: float) -> str:
    if not run.regions:
        return ""
    labels = ("original", "region", "redrawn by the base", "redrawn by the aligned model")
    cards, _, problems = _cards(run.regions, lambda file: region_picture(file, fps), labels, REGION_BYTES)
    return (
        "<h3>A held-out region, redrawn</h3><p>Both models redraw the marked region of a real video that was not "
        "trained "
        "on, from the same noise: the first of the held-out pairs, at the strength of each."
        f"{_not_shown(problems)}</p>{cards}"
    )


def _pairs(run: Run, fps: float) -> str:
    if not run.pairs:
        return '<p class="missing">Pairs: not available.</p>'

    def make(file: Path) -> tuple[Picture, str]:
        pair = read_pair(file)
        strength = "" if pair.strength is None else f'<span class="fact">strength {pair.strength:.2f}</span>'
        return pair_picture(pair, fps), f"{escape(pair.prompt)} {strength}"

    labels = ("winner", "where they are compared" if run.brought_pairs else "redrawn region", "loser")
    cards, _, problems = _cards(run.pairs[:MOST_PAIRS], make, labels, PAIR_BYTES)
    how = (
        "The winner is a real video. The loser is the same video after the base model has redrawn the marked "
        "region; outside of it, the two are the same latents, value for value. Strength is the share of the "
        "denoising that was done anew: the higher, the freer the redrawing."
    )
    if run.brought_pairs:
        how = "Winner and loser as they were ranked; a pair that came without a mask is compared as a whole."
    return f"<p>{how} These were held out from training.{_not_shown(problems)}</p>{cards}"


def _cards(
    items: Iterable[Item], make: Callable[[Item], tuple[Picture, str]], labels: tuple[str, ...], budget: int
) -> tuple[str, int, list[str]]:
    """(the cards, how many items did not fit into `budget` bytes, what is wrong with the others)."""
    cards: list[str] = []
    problems: list[str] = []
    left_out = used = widest = 0
    for item in items:
        try:
            picture, caption = make(item)
        except DataError as error:
            problems.append(str(error))
            continue
        if used + picture.size > budget and cards:
            left_out += 1
            continue
        used += picture.size
        widest = max(widest, picture.width)
        cards.append(_card(picture, caption, labels))
    return f'<div class="cards" style="--picture:{widest}px">{"".join(cards)}</div>', left_out, problems


def _card(picture: Picture, caption: str, labels: tuple[str, ...]) -> str:
    names = "".join(f"<span>{label}</span>" for label in labels)
    sharp = ' class="pixels"' if picture.magnified else ""
    alt = f"{', '.join(labels[:-1])} and {labels[-1]}, moving side by side"
    motion = f"--frames:{picture.frames};--still:{picture.still};--seconds:{picture.seconds:.4g}s"
    return (
        f'<figure><div class="panels" style="width:{picture.width}px"><p class="names">{names}</p>'
        f'<div class="film" style="aspect-ratio:{picture.width}/{picture.height};{motion}">'
        f'<img{sharp} src="{data_uri(picture.film)}" alt="{alt}"></div></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _not_shown(problems: list[str]) -> str:
    return f" Not available: {escape('; '.join(problems))}." if problems else ""


def _inside(folder: Path, name: str) -> Path:
    """A file that samples.jsonl names; DataError for one outside of the run's folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{name} lies outside of the samples folder")
    return path
