"""Pairs that a stage makes while it trains: every so many steps, rollouts of the policy as it is, ranked.

A round's folder, rounds/NNNN, holds its rollouts, the ranker's answers and its pairs. What is in it follows from the
weights at the round's first step and from keys: a run that was stopped makes it again bit for bit, or finds it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from alignkit.apo.pairs import Ranking, build_ranked
from alignkit.apo.rollouts import roll_out
from alignkit.config import Config
from alignkit.errors import DataError
from alignkit.evaluation.samples import PLAYBACK_FPS
from alignkit.files import write_json, write_lines
from alignkit.media.videos import decode_clip, write_video
from alignkit.models import load_model
from alignkit.objectives.states.checks import check_origins
from alignkit.progress import say
from alignkit.rankers.protocol import Comparison
from alignkit.rankers.rollouts import (
    answers_about,
    choose,
    comparisons_of,
    decode_rollouts,
    ranking_file,
    rankings_folder,
    video_file,
)
from alignkit.stores.folders import pairs_folder, video_spec
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.distributed import on_main
from alignkit.training.run import Run

ID_STRIDE = 2**16  # a round's pairs have ids, and so noise, of their own; a key's ids end at 2³²
RECORD = "round.json"
REACHED = {"budget", "price_in", "price_out", "timeout_s", "retries", "at_once", "key_env", "max_tokens"}
FREE = {
    "output": True,
    "stages": True,
    "sample": True,
    "evaluation": True,
    "data": {"videos", "pairs", "prompts", "rollouts", "heldout_pairs", "captions"},
    "pairs": {"folder", "previews"},
    "rollout": {"folder", "previews"},
    "ranker": {"endpoint": REACHED},
    "train": {"steps", "checkpoint_every", "keep_checkpoints", "max_bad_steps"},
}
"""Of the configuration, what does not change a round's pairs: places, whose contents do, how an endpoint is reached,
and how long to train."""


@dataclass(frozen=True)
class Made:
    """What came of a round: pairs, and of `compared` prompts or rollouts how many gave none."""

    pairs: int
    dropped: int
    compared: int


class Rounds:
    """A supply of training pairs (`alignkit.training.supply`).

    anchors: a video of each prompt that rollouts are compared with (half-online); None: with each other (online).
    start: what tells the weights that the stage starts from.
    """

    def __init__(self, config: Config, prompts: list[str], start: str, anchors: dict[str, Path] | None = None):
        self._config, self._prompts, self._anchors = config, prompts, anchors
        self._stores: dict[int, tuple[PairStore | None, Made]] = {}
        self._current: int | None = None
        settings = config.model_dump(mode="json", exclude=FREE)
        sampler = asdict(config.sampler)  # what is taken from `sample`
        given = [settings, sampler, prompts, start, {prompt: _digest(file) for prompt, file in (anchors or {}).items()}]
        self._terms = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def terms(self) -> dict[str, str]:
        return {"rounds": self._terms}

    def refresh(self, run: Run, number: int) -> dict[str, float]:
        """As in `Supply`. Raises DataError where no round that may still be trained on gave a pair."""
        online = self._config.online
        current = number // online.every
        if current != self._current:
            live = [r for r in range(current + 1) if (current - r) * online.every < (online.staleness or online.every)]
            self._stores = {r: self._stores.get(r) or self._open(run, r, number) for r in live}
            run.store, run.since = self._newest(run, number), current * online.every
            self._current = current
        _, made = self._stores[current]
        return {
            "online/round": current,
            "online/pairs": len(run.store),
            "online/drop_rate": made.dropped / made.compared,
        }

    def _newest(self, run: Run, step: int) -> PairStore:
        stores = [store for _, (store, _) in sorted(self._stores.items()) if store is not None]
        for earlier in range(min(self._stores) - 1, -1, -1):
            if stores:
                break
            store, _ = self._open(run, earlier, step)
            if store is not None:
                stores = [store]
                if run.process.main:
                    say(f"no newer round gave a pair; going on with those of round {earlier}")
        if not stores:
            newest = max(self._stores)
            made = self._stores[newest][1]
            raise DataError(
                f"{self._folder(newest)}: none of {made.compared} comparisons gave a pair, and there are no older "
                "pairs to go on with; look at the videos there; with another ranker, a lower ranker.min_margin "
                "(online) or a higher rollout.per_prompt, start again in another output.dir"
            )
        joined, queue = PairStore.joined(stores), self._config.online.queue
        return joined if queue is None else joined.select(list(range(len(joined)))[-queue:])

    def _folder(self, number: int) -> Path:
        return self._config.output.dir / "rounds" / f"{number:04d}"

    def _open(self, run: Run, number: int, step: int) -> tuple[PairStore | None, Made]:
        folder, first = self._folder(number), number * self._config.online.every
        record = on_main(run.process, lambda: self._record(folder))
        if record is None:
            if step != first:
                raise DataError(
                    f"{folder}: the pairs of step {first} are gone, and so are the weights that they were sampled "
                    "from; put them back, or start again in another output.dir"
                )
            self._make(run, number)
            record = on_main(run.process, lambda: self._record(folder))
        made = Made(**{name: record[name] for name in ("pairs", "dropped", "compared")})
        if not made.pairs:
            return None, made
        store = PairStore(pairs_folder(self._round_config(number), "train"))
        check_origins(self._config, run.model, run.law, store)
        return store, made

    def _record(self, folder: Path) -> dict | None:
        try:
            record = json.loads((folder / RECORD).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / RECORD}: cannot be read ({error}); delete that folder") from None
        if record["terms"] != self._terms:
            raise DataError(
                f"{folder}: its pairs were made with other settings, prompts or weights than there are now; put them "
                "back, choose another output.dir, or delete the folder above it"
            )
        return record

    def _round_config(self, number: int) -> Config:
        """Everything of the round in its own folder, its rollouts from noise of their own."""
        config, folder = self._config, self._folder(number)
        return config.model_copy(
            update={
                "output": config.output.model_copy(update={"dir": folder}),
                "pairs": config.pairs.model_copy(update={"folder": folder / "pairs"}),
                "data": config.data.model_copy(update={"rollouts": folder / "rollouts"}),
                "rollout": config.rollout.model_copy(update={"round": config.rollout.round + number}),
            }
        )

    def _make(self, run: Run, number: int) -> None:
        config, process = self._round_config(number), run.process
        count = min(self._config.online.prompts or len(self._prompts), len(self._prompts))
        prompts = [self._prompts[(number * count + i) % len(self._prompts)] for i in range(count)]
        if process.main:
            say(f"round {number}: {config.rollout.per_prompt} rollouts of {count} prompts")
        model = load_model(config.model, with_transformer=False, device=process.device, dtype=run.model.dtype)
        model.attention = run.model.attention
        rollouts = roll_out(
            config, process, model, run.policy, prompts, self._folder(number) / "rollouts",
            network=f"{self._terms} at step {number * config.online.every}",
            agree=lambda look: on_main(process, look), show=False,
        )  # fmt: skip
        on_main(process, lambda: self._rank(config, run, rollouts, number))

    def _rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> None:
        """On the first process alone."""
        device, folder = run.process.device, rankings_folder(config)
        decode_rollouts(config, rollouts, device, show=False)
        if self._anchors is None:
            comparisons = comparisons_of(rollouts, folder)
            rows, dropped = choose(config, rollouts, answers_about(config, comparisons, show=False))
            compared = len(comparisons) if config.ranker.keep == "all" else len({c.prompt for c in comparisons})
        else:
            rows, dropped, compared = self._beside_anchors(config, rollouts)
        write_lines(ranking_file(config), rows)
        rankings = [
            Ranking(number * ID_STRIDE + i, f"{ranking_file(config).name}:{i + 1}", row["prompt"],
                    Path(row["chosen"]) if isinstance(row["chosen"], str) else row["chosen"], row["rejected"])
            for i, row in enumerate(rows)
        ]  # fmt: skip
        if rankings:
            build_ranked(config, device, run.law, rollouts, {"train": rankings}, show=False)
        say(f"round {number}: {len(rows)} pairs, {dropped} of {compared} dropped")
        made = {"pairs": len(rows), "dropped": dropped, "compared": compared, "terms": self._terms}
        write_json(self._folder(number) / RECORD, made)

    def _beside_anchors(self, config: Config, rollouts: RolloutStore) -> tuple[list[dict], int, int]:
        """Rows of anchors that win against a rollout, how many rollouts were dropped, of how many.

        SoPo's rule (arXiv 2412.05095), with P(the rollout is better) as its score: at 0.5 or above it is no loser.
        """
        assert self._anchors is not None
        folder, found = rankings_folder(config), {}
        # beside the rollouts, under names of their own: a scorer may look a folder's files up by name
        anchors = {prompt: folder / "videos" / f"anchor-{i:06d}.mp4" for i, prompt in enumerate(self._anchors)}
        comparisons = []
        for rollout in rollouts.ids:
            prompt = rollouts.prompt_of(rollout)
            if not anchors[prompt].exists():  # as large and long as the rollouts are
                clip = decode_clip(self._anchors[prompt], video_spec(config))
                write_video(anchors[prompt], clip, config.data.fps or PLAYBACK_FPS)
            comparisons.append(Comparison(str(rollout), prompt, video_file(folder, rollout), anchors[prompt]))
        for name, answer in answers_about(config, comparisons, show=False).items():
            prompt = rollouts.prompt_of(int(name))
            if answer < 0.5:
                found.setdefault(prompt, []).append((answer, int(name)))
        rows = []
        for prompt, losers in found.items():
            kept = sorted(losers) if config.ranker.keep == "all" else [min(losers)]
            rows += [
                {"prompt": prompt, "chosen": str(self._anchors[prompt].resolve()), "rejected": loser, "p": 1 - answer}
                for answer, loser in kept
            ]
        return rows, len(comparisons) - sum(map(len, found.values())), len(comparisons)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{file}: an anchor cannot be read ({error.strerror})") from None
