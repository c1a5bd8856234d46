"""The pictures of the report: samples before and after, and the pairs that were trained on."""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from alignkit.errors import DataError
from alignkit.report.pictures import Picture, data_uri, pair_picture, read_pair, sample_picture
from alignkit.report.run import Run, number

MOST_SAMPLES, MOST_PAIRS = 12, 6
# Of the page's 8 MB; what does not fit is left out and counted.
SAMPLE_BYTES, PAIR_BYTES = 3_800_000, 2_600_000
DEFAULT_FPS = 8.0


def pictures(run: Run) -> str:
    fps = number(run.config, "data", "fps") or DEFAULT_FPS
    return f"""<section id="pictures">
<h2>Pictures</h2>
<h3>Samples before and after</h3>
{_samples(run, fps)}
<h3>What a pair looks like</h3>
{_pairs(run, fps)}
</section>
"""


def _samples(run: Run, fps: float) -> str:
    needed = ("prompt", "base", "aligned")
    rows = [row for row in run.samples if all(isinstance(row.get(key), str) for key in needed)]
    if not rows:
        return '<p class="missing">Samples: not available.</p>'
    first_of_prompt = list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
    wanted = first_of_prompt if len(first_of_prompt) >= MOST_SAMPLES else rows
    folder = run.folder / "samples"

    def make(row: dict) -> tuple[Picture, str]:
        picture = sample_picture(_inside(folder, row["base"]), _inside(folder, row["aligned"]), fps)
        seed = f'<span class="fact">seed {escape(str(row["seed"]))}</span>' if "seed" in row else ""
        return picture, f"{escape(row['prompt'])} {seed}"

    cards, left_out, problems = _cards(wanted[:MOST_SAMPLES], make, ("base", "aligned"), SAMPLE_BYTES)
    shown = min(len(wanted), MOST_SAMPLES) - left_out - len(problems)
    which = f"These are {f'all {shown}' if shown == len(rows) else f'the first {shown} of {len(rows)}'} samples"
    which += " with different prompts" if shown < len(rows) and wanted is first_of_prompt else ""
    return (
        "<p>Both models start from the same noise with the same prompt, so what differs between two videos is the "
        f"training alone. {which}, not a choice of the best.{_not_shown(problems)}</p>{cards}"
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
    items: Iterable, make: Callable[[object], tuple[Picture, str]], labels: tuple[str, ...], budget: int
) -> tuple[str, int, list[str]]:
    """(the cards, how many items did not fit into `budget` bytes, what is wrong with the others)."""
    cards, left_out, problems, used, widest = [], 0, [], 0, 0
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
    return (
        f'<figure><div class="panels" style="width:{picture.width}px"><p class="names">{names}</p><picture>'
        f'<source media="(prefers-reduced-motion: reduce)" srcset="{data_uri(picture.still)}">'
        f'<img{sharp} src="{data_uri(picture.animation)}" width="{picture.width}" alt="{alt}"></picture></div>'
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
