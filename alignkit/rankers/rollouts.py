"""`alignkit rank run`: the rollouts of each prompt compared with each other; the best and the worst of each become the
rows that `alignkit pairs` reads."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from alignkit.apo.rollouts import rollouts_folder
from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.media.videos import PLAYBACK_FPS, write_video
from alignkit.models import load_model
from alignkit.progress import progress, say
from alignkit.rankers import PEOPLE, open_ranker, people
from alignkit.rankers.asking import Stopped, ask
from alignkit.rankers.protocol import Comparison
from alignkit.rankers.tournament import pick
from alignkit.stores.folders import encoding_terms
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.supply import Waiting

Answers = Mapping[str, float]


@dataclass(frozen=True)
class Ranked:
    """pairs: how many there are; ties: how many were dropped as such; prompts: of which there were rollouts."""

    file: Path
    pairs: int
    ties: int
    prompts: int


def rank_rollouts(config: Config, device: torch.device, show: bool = True) -> Ranked:
    """Decode the rollouts, have `config.ranker` compare those of each prompt, and write the ranking.

    Raises ConfigError for a ranker that is not there, DataError for what it cannot answer and where no pair is left.
    """
    if config.ranker.by != PEOPLE:
        open_ranker(config.ranker, rankings_folder(config))  # refused before anything is decoded
    rollouts = open_rollouts(config)
    comparisons = comparisons_of(rollouts, rankings_folder(config))
    decode_rollouts(config, rollouts, device, show)
    rows, ties = choose(config, rollouts, answers_about(config, comparisons, show))
    if not rows:
        raise DataError(
            f"{rankings_folder(config)}: no rollout is better than another of its prompt by ranker.min_margin="
            f"{config.ranker.min_margin:g}; look at the videos there, lower it, or sample more (rollout.per_prompt)"
        )
    write_lines(ranking_file(config), rows)
    return Ranked(ranking_file(config), len(rows), ties, len({c.prompt for c in comparisons}))


def answers_about(
    config: Config, comparisons: list[Comparison], show: bool = True, stop: Callable[[], bool] = lambda: False
) -> Answers:
    """P(video_a is better) by a comparison's id, of all of them, by `config.ranker`.

    Raises Waiting until people have given `ranker.votes` answers to each, or where `stop` says to end before.
    """
    folder = rankings_folder(config)
    if config.ranker.by == PEOPLE:
        return _votes_about(folder, comparisons, config.ranker.votes)
    ranker = open_ranker(config.ranker, folder / "scores")
    try:
        return ask(ranker, comparisons, folder / "answers.jsonl", show=show, stop=stop)
    except Stopped as reason:
        raise Waiting(str(reason)) from None
    finally:
        if hasattr(ranker, "cost"):
            say(f"{ranker.who}: {ranker.cost}")


def _votes_about(folder: Path, comparisons: list[Comparison], wanted: int) -> Answers:
    def row(comparison: Comparison) -> dict[str, str]:
        a, b = (str(video.relative_to(folder)) for video in (comparison.video_a, comparison.video_b))
        return {"id": comparison.id, "prompt": comparison.prompt, "a": a, "b": b}

    people.write_comparisons(folder, map(row, comparisons))
    missing = people.waiting(folder, wanted)
    if missing:
        raise Waiting(f"waiting for {missing} vote{'s' * (missing > 1)}, to be given by: alignkit rank serve {folder}")
    return people.answers(folder)


def rankings_folder(config: Config) -> Path:
    return config.output.dir / "rankings"


def ranking_file(config: Config) -> Path:
    """What `data.pairs` names afterwards."""
    return rankings_folder(config) / "ranking.jsonl"


def open_rollouts(config: Config) -> RolloutStore:
    return RolloutStore(config.data.rollouts or rollouts_folder(config))


def comparisons_of(rollouts: RolloutStore, folder: Path) -> list[Comparison]:
    """Every pair of rollouts of one prompt; an id is "A-B" of the rollouts' numbers, A < B.

    Raises DataError for a store with one rollout a prompt.
    """
    by_prompt = defaultdict(list)
    for number in sorted(rollouts.ids):
        by_prompt[rollouts.prompt_of(number)].append(number)
    found = [
        Comparison(f"{a}-{b}", prompt, video_file(folder, a), video_file(folder, b))
        for prompt, numbers in by_prompt.items()
        for a, b in combinations(numbers, 2)
    ]
    if not found:
        raise DataError(
            f"{rollouts.folder}: holds one rollout a prompt, so there is nothing to compare; sample with "
            "rollout.per_prompt=2 or more in another folder"
        )
    return found


def video_file(folder: Path, number: int) -> Path:
    return folder / "videos" / f"{number:06d}.mp4"


def decode_rollouts(config: Config, rollouts: RolloutStore, device: torch.device, show: bool = True) -> None:
    """Every rollout as a video file, those that are not there yet. Raises DataError for a folder of other rollouts."""
    folder = rankings_folder(config)
    file = folder / "rollouts.json"
    terms = (
        asdict(rollouts.info)
        | encoding_terms(config.model)
        | {"prompts": [rollouts.prompt_of(number) for number in rollouts.ids]}
    )
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(file, terms)
    missing = [number for number in rollouts.ids if not video_file(folder, number).exists()]
    if not missing:
        return
    model = load_model(config.model, with_transformer=False, device=device)
    with progress("decoding rollouts", len(rollouts), done=len(rollouts) - len(missing), show=show) as bar:
        for number in missing:
            video = model.decode_video(rollouts.by_id(number).latents[None].to(device))[0]
            write_video(video_file(folder, number), video, config.data.fps or PLAYBACK_FPS)
            bar.advance()


def choose(config: Config, rollouts: RolloutStore, answers: Answers) -> tuple[list[dict[str, Any]], int]:
    """Rows for `alignkit pairs`, by the answers about pairs of rollouts, and how many were dropped as ties."""
    section, rows, ties = config.ranker, [], 0
    by_prompt: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for name, answer in answers.items():
        a, b = map(int, name.split("-"))
        by_prompt[rollouts.prompt_of(a)][a, b] = answer
    for prompt, found in by_prompt.items():
        videos = sorted({number for sides in found for number in sides})
        pairs, dropped = pick(videos, found, section.min_margin, section.keep)
        ties += dropped
        for better, worse in pairs:
            answer = found[better, worse] if (better, worse) in found else 1 - found[worse, better]
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "p": answer})
    return rows, ties


def _check_same(file: Path, terms: dict[str, Any]) -> None:
    now = json.loads(json.dumps(terms))
    if not file.exists():
        write_json(file, now)
    elif json.loads(file.read_text()) != now:
        raise DataError(
            f"{file.parent}: holds videos of other rollouts than there are now; choose another output.dir, or move "
            "that folder away"
        )
