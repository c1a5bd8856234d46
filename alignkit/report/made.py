"""How the run came to be: its stages, its rankings, and what of its settings is its own."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from alignkit.config import load_config, shipped_configs
from alignkit.report.plots import percent, short
from alignkit.report.run import Run, number, read_lines, read_object, read_yaml, stage_folders
from alignkit.report.tables import MISSING, OBJECTIVES, STAGES, wide

PLACES = ("data.videos", "data.prompts", "data.pairs", "data.rollouts", "output.dir", "pairs.folder", "rollout.folder")


def made(run: Run) -> str:
    parts = {"Stages": _stages(run), "Rankings": _rankings(run)}
    shown = "".join(f"<h3>{title}</h3>{table}" for title, table in parts.items() if table)
    return f'<section id="made">\n<h2>How it was made</h2>\n{shown}\n</section>\n' if shown else ""


def _stages(run: Run) -> str:
    """A row for each stage of a chain, in its order; of those that are not done yet what they are to be."""
    rows = []
    for folder in stage_folders(run.folder, run.config):
        name = folder.name.partition("-")[2]
        config, log = read_yaml(folder / "config.yaml"), read_lines(folder / "train" / "metrics.jsonl")
        objective = config.get("objective")
        objective = str(objective.get("name", "")) if isinstance(objective, dict) else ""
        rounds = [read_object(file) for file in sorted(folder.glob("rounds/*/round.json"))]
        made = sum(number(row, "pairs") or 0 for row in rounds)
        last = log[-1] if log else {}
        named = "region/accuracy" if "region/accuracy" in last else "rewards/accuracies"
        cells = (
            STAGES.get(name, OBJECTIVES.get(name, name)),
            OBJECTIVES.get(objective, objective),
            f"{number(last, 'step') or 0:g} of {number(config, 'train', 'steps') or 0:g}",
            short(number(config, "train", "learning_rate")),
            f"{made:g} in {len(rounds)} rounds" if rounds else "stored",
            short(number(last, "loss")),
            percent(number(last, named)),
        )
        rows.append(cells)
    return _table("Stages", ("", "objective", "steps", "rate", "pairs", "last loss", "accuracy"), rows)


def _rankings(run: Run) -> str:
    """Whose answers the pairs come from: of the run, of what `data.pairs` names, or of each stage, rounds together."""
    given = run.config.get("data")
    given = given.get("pairs") if isinstance(given, dict) else None
    own = [run.folder / "rankings", *([Path(str(given)).parent] if str(given).endswith("ranking.jsonl") else [])]
    stages = stage_folders(run.folder, run.config)
    of = [("pairs", list(dict.fromkeys(folder.absolute() for folder in own)))]
    of += [(stage.name, sorted(stage.glob("rounds/*/rankings"))) for stage in stages]
    rows = []
    for name, folders in of:
        answers = [row for folder in folders for row in read_lines(folder / "answers.jsonl")]
        pairs = [row for folder in folders for row in read_lines(folder / "ranking.jsonl")]
        if not pairs:
            continue
        who = ", ".join(Counter(str(row.get("who")) for row in answers)) or "people"
        sure = [share for row in pairs if (share := number(row, "p")) is not None]
        prompts = len({row.get("prompt") for row in pairs})
        counts = (f"{len(answers)}" if answers else "–", f"{len(pairs)}", f"{prompts}")
        rows.append((name, who, *counts, percent(mean(sure)) if sure else "–"))
    return _table("Rankings", ("", "ranked by", "comparisons", "pairs", "prompts", "how sure, in the mean"), rows)


def _table(name: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    columns = "".join(f"<th>{column}</th>" for column in head)
    return wide(f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>", name)


def configuration(run: Run) -> str:
    text = f"<pre>{escape(run.config_text)}</pre>" if run.config_text else f"<p>{MISSING}</p>"
    versions = run.summary.get("versions")
    items = "".join(
        f"<span><b>{escape(str(name))}</b> {escape(str(version))}</span>"
        for name, version in (versions.items() if isinstance(versions, dict) else ())
    )
    return f"""<section id="configuration">
<h2>Configuration</h2>
{_new_settings(run)}
<details><summary>The whole configuration, as it was resolved</summary>{text}</details>
<h3>Versions</h3>
<p class="versions">{items or MISSING}</p>
</section>
"""


def _new_settings(run: Run) -> str:
    """What differs from the shipped configuration of the same family that is nearest, where there is one."""
    own = {key: value for key, value in _by_key(run.config).items() if key not in PLACES}
    alike = {
        name: {key: (value, base.get(key)) for key, value in own.items() if value != base.get(key)}
        for name, base in _shipped().items()
        if base["model.family"] == own.get("model.family")
    }
    if not alike:
        return ""
    nearest = min(alike, key=lambda name: len(alike[name]))
    rows = [(key, *map(_written, values)) for key, values in alike[nearest].items()]
    if not rows:
        return f"<p>The settings are those of {nearest}, which comes with alignkit.</p>"
    table = _table("New settings", ("", "here", nearest), rows)
    return f"<p>What is new against {nearest}, the nearest of the configurations that come with alignkit:</p>{table}"


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return {name: _by_key(load_config(name).model_dump(mode="json")) for name in shipped_configs()}


def _written(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _by_key(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _by_key(value, f"{name}{key}.") if isinstance(value, dict) and value else {f"{name}{key}": value}
    return found
