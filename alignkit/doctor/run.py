"""`alignkit doctor RUN`: what happened to a run, what of it is saved, and the command that goes on."""

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from alignkit.config import Config, load_config
from alignkit.doctor import Finding
from alignkit.doctor.stored import Training, lines, pairs_of, stores
from alignkit.errors import AlignkitError, ConfigError
from alignkit.sharing import RUN_LOCK, run_lock_state

SETTINGS = "config.yaml"
MARKS = (SETTINGS, RUN_LOCK, "pairs/train/pairs.json", "rollouts/rollouts.json", "train", "stages", "skipped.jsonl",
         "reference/reference.json", "stages.json")  # fmt: skip
AFTER = {"sample": "samples/samples.jsonl", "eval": "summary.json", "report": "report.html"}
NAMED = 3
BETTER = (
    "start again in another output.dir with a lower train.learning_rate or a higher objective.weight_sft, or go on "
    "from there with a higher train.max_winner_error"
)


def diagnose(folder: Path, *, hashed: bool = False) -> list[Finding]:
    """What is in a run's folder, and what to do next. hashed: read every byte of its checkpoints.

    Raises ConfigError for a folder that is no run's. A stage's folder is looked at with the chain around it.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"doctor: {folder}: no such folder; give a run's output.dir")
    if folder.parent.name == "stages":
        folder = folder.parents[1]
    if not any((folder / mark).exists() for mark in MARKS):
        raise ConfigError(f"doctor: {folder}: no run of alignkit is in this folder; give a run's output.dir")
    return list(_Run(folder, hashed).findings())


class _Run:
    def __init__(self, folder: Path, hashed: bool):
        self.folder, self.hashed = folder, hashed
        self.config, self.problem = _settings(folder / SETTINGS)
        self.running, self.holder = run_lock_state(folder)
        self.stores = list(stores(folder))
        self.stages = self._stages()

    def _stages(self) -> list[tuple[str, Training, int | None]]:
        """Each training run of it: what it is called, its folder, and for how many steps it is meant to go."""
        if self.config is not None and self.config.stages:
            from alignkit.stages import stage_configs

            return [
                (
                    f"stages/{stage.output.dir.name}",
                    self._training(f"stages/{stage.output.dir.name}"),
                    stage.train.steps,
                )
                for _, stage in stage_configs(self.config)
            ]
        found = [f"stages/{path.name}" for path in sorted((self.folder / "stages").glob("*-*"))]
        steps = self.config.train.steps if self.config else None
        trains = (
            self.config or (self.folder / "train").is_dir() or any(store.command == "pairs" for store in self.stores)
        )
        names = found or ([""] if trains else [])
        return [(name or "train", self._training(name), None if name else steps) for name in names]

    def _training(self, name: str) -> Training:
        return Training(self.folder / name / "train", self.hashed)

    @property
    def exported(self) -> bool:
        return (self.folder / "export").is_dir()

    def done(self, training: Training, steps: int | None) -> bool:
        last = training is self.stages[-1][1]
        reached = steps is not None and training.newest is not None and training.newest.step >= steps
        reached |= training.newest is not None and training.stopped.get("step") == training.newest.step
        if last and not self.exported:
            return False
        return training.handed_on or (reached and last)

    def findings(self) -> Iterator[Finding]:
        about = f", {self.config.model.family} from {self.config.model.path}" if self.config else ""
        yield Finding("run", f"{self.folder}{about}")
        if self.problem:
            yield Finding("settings", *self.problem)
        yield self._lock()
        yield from self._stores()
        for name, training, steps in self.stages:
            yield from self._trained(name, training, steps)
        yield from self._results()
        yield from self._left_out()
        yield Finding("next", *self._next())

    def _lock(self) -> Finding:
        if self.running:
            who, since = self.holder or ("another command", "now")
            return Finding("writing now", f"{who}, since {since}")
        if self.holder:
            who, since = self.holder
            return Finding("writing now", f"nobody: {who}, begun {since}, was killed; its lock is free")
        return Finding("writing now", "nobody")

    def _stores(self) -> Iterator[Finding]:
        for store in self.stores:
            if not store.planned:
                yield Finding(store.name, "its terms cannot be read", "delete that folder and build it again")
                continue
            state = "done" if store.whole else "not done"
            left = sum(store.left_out.values())
            more = f", {left} left out: {_counted(store.left_out)}" if left else ""
            yield Finding(store.name, f"{state}: {store.blocks} of {store.planned} blocks, {store.rows} planned{more}")
        folder = self.folder / "rankings"
        if folder.is_dir():
            asked, answered = (len(lines(folder / f"{name}.jsonl")) for name in ("comparisons", "answers"))
            ranked = len(lines(folder / "ranking.jsonl"))
            text = f"done: {ranked} pairs" if ranked else f"not done: {answered} answers to {asked or '?'} comparisons"
            yield Finding("rankings", text)

    def _trained(self, name: str, training: Training, steps: int | None) -> Iterator[Finding]:
        if not training.folder.is_dir():
            yield Finding(name, "not begun")
            return
        of = f" of {steps}" if steps else ""
        state = "done" if self.done(training, steps) else "not done"
        last = training.metrics[-1] if training.metrics else {}
        loss = f", loss {last['loss']:.4f}" if isinstance(last.get("loss"), float) else ""
        yield Finding(name, f"{state}: step {training.step}{of} is the last one measured{loss}")
        if training.skipped_steps:
            shown = ", ".join(map(str, training.skipped_steps[-NAMED:]))
            text = (
                f"{_many(len(training.skipped_steps), 'step')} skipped, loss or gradient not finite, the last: {shown}"
            )
            yield Finding("", text)
        yield from self._saved(training)
        if training.stopped:
            change, most = training.stopped["winner_error_change"], training.stopped["max_winner_error"]
            found = "could not be told" if change is None else f"had changed by {change:+.2%}"
            text = f"the winner's error on held-out pairs {found}, and train.max_winner_error is {most:.2%}"
            yield Finding("", f"ended early after step {training.stopped['step']}: {text}", BETTER)
        for batch in training.diverged:
            pairs = pairs_of(batch)
            named = f": pairs {', '.join(pairs[:NAMED])}{', …' * (len(pairs) > NAMED)}" if pairs else ""
            yield Finding(
                "", f"gave up at {batch.name}{named}", "look at these pairs; lower the rate or objective.beta"
            )
        rounds = self.folder / name / "rounds"
        if rounds.is_dir():
            there = sorted(path.name for path in rounds.glob("[0-9]*"))
            made = sum(1 for number in there if (rounds / number / "round.json").exists())
            yield Finding("", f"rounds of rollouts: {made} whole of {len(there)} begun")

    def _saved(self, training: Training) -> Iterator[Finding]:
        found = training.newest
        looked = "every byte as it was written" if self.hashed else "whole by its manifest; --hash reads every byte"
        if found:
            again = training.step - found.step
            lost = f"; {_many(again, 'later step')} will be done again" if again > 0 else ""
            yield Finding("", f"saved: {found.name}, by {_many(found.processes, 'process', 'es')} ({looked}){lost}")
        else:
            yield Finding("", "nothing is saved" if not training.checkpoints else "no checkpoint is whole")
        for other in training.checkpoints:
            if other.damage:
                yield Finding("", f"damaged: {other.name}: {other.damage}")
        for other in training.set_aside:
            why = other.damage or ("as it was written" if self.hashed else "its files are there; --hash reads them")
            yield Finding("", f"set aside: {other.name}: {why}")
        for name in training.before_reshape:
            yield Finding("", f"kept: {name}, from another number of processes; it may be deleted")
        for name in [] if self.running else training.cut_off:
            yield Finding("", f"cut off: a save, {name}; the next one takes its place")

    def _results(self) -> Iterator[Finding]:
        folder = self.folder / "export"
        if folder.is_dir():
            lora = any(folder.glob("pytorch_lora_weights*"))
            kind = "adapters, for pipe.load_lora_weights" if lora else "a diffusers folder"
            yield Finding("export", f"{folder}: {kind}")
        elif self.stages:
            yield Finding("export", "not there: it is written after the last step")
        for command, file in AFTER.items():
            if (self.folder / file).exists():
                yield Finding(command, f"done: {self.folder / file}")

    def _left_out(self) -> Iterator[Finding]:
        rows = lines(self.folder / "skipped.jsonl")
        if rows:
            counted = Counter(row.get("reason", "?") for row in rows)
            yield Finding("skipped", f"{len(rows)} videos or pairs: {_counted(counted)}; all in skipped.jsonl")

    def _next(self) -> tuple[str, str | None]:
        if self.running:
            return "wait: it is being written", None
        for store in self.stores:
            if not store.whole and store.planned:
                return self._command(store.command), "any number of processes; what is there is kept"
        trained = [self.done(training, steps) for _, training, steps in self.stages]
        if trained and all(trained):
            for command, file in AFTER.items():
                if not (self.folder / file).exists():
                    return self._command(command), None
            return "nothing: all is done", None
        if (self.folder / "rollouts").is_dir() and not any(store.command == "pairs" for store in self.stores):
            ranked = self.folder / "rankings" / "ranking.jsonl"
            if ranked.exists():
                own = f"data.rollouts={self.folder / 'rollouts'}", f"data.pairs={ranked}"
                return self._command("pairs", *own), None
            return self._command("rank run"), None
        if self.stages:
            return self._train()
        return self._command("pairs"), None

    def _train(self) -> tuple[str, str | None]:
        at = next(i for i, (_, training, steps) in enumerate(self.stages) if not self.done(training, steps))
        training = self.stages[at][1]
        count = training.processes if training.folder.is_dir() else self.stages[0][1].processes
        nproc = ["--nproc", str(count)] if count > 1 else []
        lost = [found for found in (*training.checkpoints, *training.set_aside) if found.damage]
        if training.newest is None and (lost or training.set_aside):
            return self._command("train", "train.restart=true", *nproc), "or put a whole checkpoint back first"
        advice = f"{count} processes, as before, or started by torchrun or srun; another number: --reshape"
        saved = training.newest.step if training.newest else 0
        if training.diverged and self.config and int(training.diverged[-1].stem.rpartition("-")[2]) > saved:
            rate = f"train.learning_rate={self.config.train.learning_rate / 2:g}"
            return self._command("train", rate, "train.accept=[train.learning_rate]", *nproc), "with half the rate"
        return self._command("train", *nproc), advice if count > 1 else None

    def _command(self, name: str, *words: str) -> str:
        file = str(self.folder / SETTINGS) if self.config else "CONFIG"
        moved = self.config is None or self.config.output.dir != self.folder
        place = [f"output.dir={self.folder}"] if moved else []
        shown = shlex.join(["alignkit", *name.split(), file, *place, *words])
        return shown + ("" if self.config else "   (CONFIG: the file and keys that it was started with)")


def _settings(file: Path) -> tuple[Config | None, tuple[str, str | None] | None]:
    """The run's settings, or what is wrong with them."""
    if not file.exists():
        return None, (f"{file.name} is not there: it is written when pairs are done or training begins", None)
    try:
        return load_config(file), None
    except AlignkitError as error:
        return None, (str(error), "written by another version, or changed by hand")


def _many(count: int, thing: str, plural: str = "s") -> str:
    return f"{count} {thing}{plural * (count != 1)}"


def _counted(reasons: Counter[str]) -> str:
    shown = [f"{reason} ({count})" for reason, count in reasons.most_common(NAMED)]
    return "; ".join(shown) + ("; …" if len(reasons) > NAMED else "")
