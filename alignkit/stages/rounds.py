"""Pairs that a stage makes while it trains: every so many steps, rollouts of the policy as it is, ranked.

A round's folder, rounds/NNNN, holds its rollouts, the ranker's answers and its pairs. What is in it follows from the
weights at the round's first step and from keys: a run that was stopped makes it again bit for bit, or finds it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.apo.pairs import Ranking, build_ranked
from alignkit.apo.rollouts import roll_out
from alignkit.config import Config
from alignkit.config.sections import HANDLING
from alignkit.errors import DataError
from alignkit.files import write_json, write_lines
from alignkit.models import load_model
from alignkit.moment import end_if_of_the_moment
from alignkit.objectives.states.checks import check_origins
from alignkit.progress import say
from alignkit.rankers.rollouts import ranking_file
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training import terms
from alignkit.training.distributed import on_main, on_main_at_length
from alignkit.training.run import Run

ID_STRIDE = 2**16  # a round's pairs have ids, and so noise, of their own; a key's ids end at 2³²
RECORD = "round.json"
TERMS = "terms.json"  # of all rounds, from the first one's beginning
REACHED = {"budget", "price_in", "price_out", "timeout_s", "retries", "at_once", "key_env", "max_tokens"}
FREE = {
    "model": {"path", "revision", "variant"},  # its weights are told by `start`
    "output": True,
    "stages": True,
    "sample": True,
    "evaluation": True,
    "data": {"videos", "pairs", "prompts", "rollouts", "heldout_pairs", "captions"},
    "pairs": HANDLING,
    "rollout": HANDLING,
    "ranker": {"endpoint": REACHED},
    "train": terms.FREE,
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
    """A supply of training pairs (`alignkit.training.supply`); what is made of a round's rollouts is a subclass's.

    start: what tells the weights that the stage starts from. given: what else the pairs depend on, for JSON. unread:
    sections that they do not depend on.
    """

    def __init__(
        self,
        config: Config,
        prompts: list[str],
        start: str,
        given: object = None,
        unread: tuple[str, ...] = ("student",),
    ):
        self.config, self.prompts, self.every = config, prompts, config.online.every
        self._stores: dict[int, tuple[PairStore | None, Made]] = {}
        exclude: Any = FREE | dict.fromkeys(unread, True)
        # a key that is new, and at its default, changes no older run
        settings = config.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
        sampler = asdict(config.sampler)  # what is taken from `sample`
        depends = json.dumps([settings, sampler, prompts, start, given], sort_keys=True)
        self._terms = hashlib.sha256(depends.encode()).hexdigest()[:16]

    def rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> Made:
        """Make the training pairs of round `number` from its rollouts, in the folders of `config`. On the first process
        alone."""
        raise NotImplementedError

    def check(self, run: Run, store: PairStore) -> None:
        """Raises DataError for pairs that cannot be trained on as the configuration says."""
        check_origins(self.config, run.model, run.law, store)

    @property
    def terms(self) -> dict[str, str]:
        return {"rounds": self._terms}

    def refresh(self, run: Run, number: int) -> dict[str, float]:
        """As in `Supply`. Raises DataError where no round that may still be trained on gave a pair."""
        current = number // self.every
        staleness = self.config.online.staleness or self.every
        live = [r for r in range(current + 1) if number - r * self.every < staleness]
        if live != list(self._stores):
            dropped = (live[0] - 1) * self.every + staleness if live[0] else 0  # the step at which the last one was
            self._stores = {r: self._stores.get(r) or self._open(run, r, number) for r in live}
            run.store, run.since = self._newest(run, number), max(current * self.every, dropped)
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
        joined, queue = PairStore.joined(stores), self.config.online.queue
        return joined if queue is None else joined.select(list(range(len(joined)))[-queue:])

    def _folder(self, number: int) -> Path:
        return round_folder(self.config.output.dir, number)

    def _open(self, run: Run, number: int, step: int) -> tuple[PairStore | None, Made]:
        folder, first = self._folder(number), number * self.every
        record = on_main(run.process, lambda: self._record(folder))
        if record is None:
            if step != first:
                raise DataError(
                    f"{folder}: the pairs of step {first} are gone, and so are the weights that they were sampled "
                    "from; put them back, or start again in another output.dir"
                )
            self._make(run, number)
            record = on_main(run.process, lambda: self._record(folder))
        assert record is not None
        made = Made(**{name: record[name] for name in ("pairs", "dropped", "compared")})
        if not made.pairs:
            return None, made
        store = PairStore(pairs_folder(self._round_config(number), "train"))
        self.check(run, store)
        return store, made

    def _record(self, folder: Path) -> dict[str, Any] | None:
        try:
            record = json.loads((folder / RECORD).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            end_if_of_the_moment(folder / RECORD, error)
            raise DataError(f"{folder / RECORD}: cannot be read ({error}); delete that folder") from None
        self._check_terms(folder.parent, record["terms"])
        return record

    def check_made(self) -> None:
        """As in `Supply`: of rounds that were begun, too."""
        folder = self._folder(0).parent
        if (folder / TERMS).exists():
            self._check_terms(folder, json.loads((folder / TERMS).read_text()))

    def _check_terms(self, folder: Path, made: str) -> None:
        if made != self._terms:
            raise DataError(
                f"{folder}: its pairs were made with other settings, prompts or weights than there are now; put them "
                "back, choose another output.dir, or delete that folder"
            )

    def _round_config(self, number: int) -> Config:
        """Everything of the round in its own folder."""
        config, folder = self.sampled_by(number), self._folder(number)
        return config.model_copy(
            update={
                "output": config.output.model_copy(update={"dir": folder}),
                "pairs": config.pairs.model_copy(update={"folder": folder / "pairs"}),
                "data": config.data.model_copy(update={"rollouts": rollouts_of_round(config.output.dir, number)}),
            }
        )

    def sampled_by(self, number: int) -> Config:
        """What round `number` is sampled by: each from noise of its own."""
        rollout = self.config.rollout
        return self.config.model_copy(update={"rollout": rollout.model_copy(update={"round": rollout.round + number})})

    def _make(self, run: Run, number: int) -> None:
        config, process = self._round_config(number), run.process
        count = min(self.config.online.prompts or len(self.prompts), len(self.prompts))
        prompts = [self.prompts[(number * count + i) % len(self.prompts)] for i in range(count)]
        if process.main:
            self._folder(number).mkdir(parents=True, exist_ok=True)
            write_json(self._folder(0).parent / TERMS, self._terms)
            say(f"round {number}: {config.rollout.per_prompt} rollouts of {count} prompts")
        rollouts = self.sample(config, run, prompts, number)
        on_main_at_length(process, lambda: self._record_pairs(config, run, rollouts, number))

    def sample(self, config: Config, run: Run, prompts: list[str], number: int) -> RolloutStore:
        """The rollouts of a round, by the policy as it is. Every process calls this."""
        name = f"{self._terms} at step {number * self.every}"
        return sample_through(run.policy, config, run, prompts, config.data.rollouts, name)

    def _record_pairs(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> None:
        made = self.rank(config, run, rollouts, number)
        say(f"round {number}: {made.pairs} pairs, {made.dropped} of {made.compared} dropped")
        write_json(self._folder(number) / RECORD, asdict(made) | {"terms": self._terms})


def round_folder(stage: Path, number: int) -> Path:
    """Of the stage in the folder `stage`."""
    return stage / "rounds" / f"{number:04d}"


def rollouts_of_round(stage: Path, number: int) -> Path:
    return round_folder(stage, number) / "rollouts"


def sample_through(
    engine: nn.Module,
    config: Config,
    run: Run,
    prompts: list[str],
    folder: Path | None,
    network: str,
    rows: tuple[int, ...] | None = None,
) -> RolloutStore:
    """`roll_out` by `engine` in the regime of `run`; every process calls this."""
    process = run.process
    assert folder is not None
    model = load_model(config.model, with_transformer=False, device=process.device, dtype=run.model.dtype)
    model.attention = run.model.attention
    return roll_out(
        config, process, model, engine, prompts, folder, network=network,
        agree=lambda look: on_main(process, look), rows=rows,
        between=partial(run.leave_if_stopped, "a round's rollouts"), show=False,
    )  # fmt: skip


def build_rows(config: Config, run: Run, rollouts: RolloutStore, rows: list[dict[str, Any]], number: int) -> None:
    """Write the ranking of round `number` and build its pairs."""
    write_lines(ranking_file(config), rows)
    rankings = [
        Ranking(number * ID_STRIDE + i, f"{ranking_file(config).name}:{i + 1}", row["prompt"],
                Path(row["chosen"]) if isinstance(row["chosen"], str) else row["chosen"], row["rejected"])
        for i, row in enumerate(rows)
    ]  # fmt: skip
    if rankings:
        build_ranked(config, run.process.device, run.law, rollouts, {"train": rankings}, show=False)
