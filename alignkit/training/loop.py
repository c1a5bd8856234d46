"""`alignkit train`: iterates over a run's steps, saves, logs and exports."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit.config import Config, dump_config
from alignkit.config.batches import accumulation_steps
from alignkit.errors import AlignkitError, CheckpointError
from alignkit.files import write_atomically, write_json
from alignkit.launch import end_signals
from alignkit.models import VideoModel, load_model
from alignkit.objectives.states.checks import check_noise, check_origins
from alignkit.progress import progress, say
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training import checkpoints
from alignkit.training.context import check_context
from alignkit.training.distributed import Process, any_process, check_shared, group_lock, on_main
from alignkit.training.engine import check_checkpointing, full_precision_weights, load_network, process_put_back
from alignkit.training.export import averaged, export, export_folder, export_lora, export_record
from alignkit.training.health import in_short, timings
from alignkit.training.heartbeat import Pulse, heartbeat
from alignkit.training.lora import check_targets
from alignkit.training.masters import MASTERS, hand_on, handed_on
from alignkit.training.metrics import MetricsLog
from alignkit.training.optimizers import check_optimizer
from alignkit.training.references import check_reference, reads_cache
from alignkit.training.references.cached import cache_digest, cache_info, check_cache
from alignkit.training.run import Abandoned, Run, Step, start_run
from alignkit.training.settings import check_deepspeed
from alignkit.training.supply import Supply, Waiting
from alignkit.training.terms import difference, run_terms
from alignkit.training.validation import STOPPED, check_validation, start_validation
from alignkit.training.weights import empty_network, open_start

PAIRS_NAMED = 4


class TrainingDiverged(AlignkitError):
    """Too many steps in a row had a non-finite loss or gradient."""


def train_folder(config: Config) -> Path:
    return config.output.dir / "train"


@dataclass(frozen=True)
class Link:
    """A run's place in a chain of stages. start: the training folder of the stage before, None for the first.
    export: where the last one's model goes, None for the others. accepted() is called, by the first process, when the
    stage may go on from what is in its folder, before anything is written there. few_steps: in which the last one's
    model samples, of a student.
    """

    start: Path | None
    export: Path | None
    accepted: Callable[[], None] = lambda: None
    few_steps: int | None = None


AtPeak = Callable[[Config, Process, bool], float | None]
"""Seconds of a step's arithmetic at the devices' peak, of a later stage or not; None where no peak is known."""


@process_put_back()
def train(
    config: Config,
    process: Process,
    link: Link | None = None,
    supply: Supply | None = None,
    at_peak: AtPeak = lambda *_: None,
) -> bool:
    """Train from the newest whole checkpoint to `train.steps`, then export; returns True. Every process calls this.

    SIGTERM, an interrupt, SIGHUP or SIGUSR1 ends it after the micro-batch under way, with a checkpoint of the last
    whole step; it then returns False. As a stage (`link`) it starts from the weights of the stage before and hands its
    own on; once it has, it is not run again.
    supply: makes the pairs along the way; they are else those of the configuration. at_peak: what the log's `mfu` is
    taken from.
    """
    accumulation_steps(config, process.world_size)  # refused before anything loads
    check_optimizer(config)
    check_deepspeed(config, process)
    if link is None:
        check_reference(config)
    check_shared(process, config.output.dir)
    with group_lock(process, config.output.dir, "train"), heartbeat(process, config.train.stuck_seconds) as pulse:
        return _train(config, process, link, supply, pulse, at_peak)


def check_training(config: Config, process: Process) -> None:
    """What can be wrong with a run whatever its pairs are, a switch that cannot work with another, say. Raises
    ConfigError; no weight is read, no other process asked."""
    accumulation_steps(config, process.world_size)
    check_optimizer(config)
    check_deepspeed(config, process)
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_context(config, process, model, None)
    check_checkpointing(config, process, model)
    check_noise(config, model)
    if config.train.lora:
        check_targets(empty_network(model), config.train.lora)


def _train(
    config: Config, process: Process, link: Link | None, supply: Supply | None, pulse: Pulse, at_peak: AtPeak
) -> bool:
    folder = train_folder(config)
    store = None if supply else PairStore(pairs_folder(config, "train"))
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_context(config, process, model, store)
    check_validation(config, model, folder)
    check_checkpointing(config, process, model)
    law = check_noise(config, model)
    if store is not None:
        check_origins(config, model, law, store)
    # reads all weights: once is enough
    terms, done = on_main(process, lambda: _terms_of(config, process, store, model, folder, link, supply))
    if done:
        return True
    if reads_cache(config) and process.device.type == "cpu":
        torch.set_num_threads(1)  # as the errors were computed: on some processors bits depend on the number
    start = open_start(config, model, link.start / MASTERS if link and link.start else None)
    model.transformer, attention = load_network(config, process, model, start)
    terms |= {"attention": attention}
    if process.main:
        say(
            f"training on {process.world_size} process(es), {process.device}, {torch.get_num_threads()} threads each, "
            f"attention: {attention}"
        )
        if store is not None:
            _say_inversions(config, store)
    run = start_run(config, process, model, store, start)
    del start  # the first process may hold a copy
    run.pulse = pulse
    try:
        ideal = at_peak(config, process, bool(link and link.start)) if process.main else None
        if not _iterate(run, folder, terms, link, supply, ideal):
            return False
        pulse.at("exporting")
        target = link.export if link else export_folder(config)
        if target:
            _export_average(run, averaged(target), link)  # first: a stage that has handed its weights on is done
        weights = full_precision_weights(run.policy)
        if process.main:
            _finish(run, weights, target, terms, link)
        torch.distributed.barrier()
    finally:
        run.release()
    return True


def _say_inversions(config: Config, store: PairStore) -> None:
    """How well the pairs' videos came back from their inversions, where they have some."""
    errors = [error for error in store.inversion_errors if error is not None]
    if not errors:
        return
    mean = sum(errors) / len(errors)
    line = f"inversions of {len(errors)} pairs: round-trip error {mean:.3f}, largest {max(errors):.3f}"
    most = config.noise.max_inversion_error
    if most is not None:
        line += f"; {sum(error > most for error in errors)} are flagged, above noise.max_inversion_error {most:g}"
    say(line)


def _export(run: Run, weights: dict[str, torch.Tensor], target: Path, link: Link | None) -> None:
    if run.config.train.lora:
        export_lora(run.model, weights, run.config.train.lora, target)
    else:
        export(run.model, weights, target, link.few_steps if link else None)


def _export_average(run: Run, target: Path, link: Link | None) -> None:
    """Every process calls this."""
    if run.average is not None:
        weights = run.average.weights()
        if run.process.main:
            _export(run, weights, target, link)


def _finish(
    run: Run, weights: dict[str, torch.Tensor], target: Path | None, terms: dict[str, Any], link: Link | None
) -> None:
    """Export what was trained to `target` and hand it on, each where it is to go. For the first process alone."""
    if target:
        record = export_record(target)
        record.unlink(missing_ok=True)  # whose export it was
        _export(run, weights, target, link)
    if link:
        digest = hand_on(train_folder(run.config), weights, terms, run.config.train.steps)
        if target:
            write_json(record, {"masters": digest})


def _terms_of(
    config: Config,
    process: Process,
    store: PairStore | None,
    model: VideoModel,
    folder: Path,
    link: Link | None,
    supply: Supply | None,
) -> tuple[dict[str, Any], bool]:
    """The run's terms, and whether it is a stage that is done. Raises CheckpointError if it is, under other terms, and
    DataError for cached errors of another reference."""
    terms = run_terms(config, store, model) | (supply.terms if supply else {})
    cache = cache_info(config, process, model, store) if store is not None and reads_cache(config) else None
    if cache:
        terms["reference.cache"] = cache_digest(cache)
    if link and link.start:
        before = handed_on(link.start)
        assert before is not None
        terms["stage before"] = before["sha256"]
    done = link is not None and _is_done(config, terms, folder, link)
    if cache and store is not None and not done:
        check_cache(config, cache, store)
    return terms, done


def _is_done(config: Config, terms: dict[str, Any], folder: Path, link: Link) -> bool:
    record = handed_on(folder)
    if record is None or record["steps"] < config.train.steps:
        return False
    if record["steps"] > config.train.steps:
        raise CheckpointError(_too_far(folder, record["steps"], config.train.steps))
    changed = difference(record["terms"], terms)
    if changed:
        raise CheckpointError(
            f"{folder}: this stage was done with {changed}; put it back, or choose another output.dir"
        )
    return link.export is None or _exported(link.export) == record["sha256"]


def _exported(target: Path) -> str | None:
    """The digest of the masters that `target` was exported from, if a chain's last stage exported it."""
    try:
        return json.loads(export_record(target).read_text())["masters"] if target.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _too_far(folder: Path, done: int, steps: int) -> str:
    return f"{folder}: this stage was trained for {done} steps, more than its train.steps, {steps}; put it back"


def _iterate(
    run: Run, folder: Path, terms: dict[str, Any], link: Link | None, supply: Supply | None, at_peak: float | None
) -> bool:
    """Every step that is left, each logged, some of them saved; False if a signal ended it early, or a stage of a chain
    was ended by what it found on held-out pairs.

    at_peak: seconds of a step's arithmetic at the devices' peak."""
    process, policy, train = run.process, run.policy, run.config.train
    done, changed, reshaped = checkpoints.load_latest(policy, folder / "checkpoints", terms, run.parts, train)
    if supply:
        on_main(process, supply.check_made)
    run.keep_optimizer_settings()  # of the file, where they may differ from the checkpoint's
    if process.main:  # not before: a run that is refused leaves everything as it was
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.config.output.dir / "config.yaml", dump_config(run.config).encode())
        write_json(folder / "run.json", terms | {"processes": process.world_size, "accepted": changed})
        if done:
            say(f"resuming after step {done}")
        (folder / STOPPED).unlink(missing_ok=True)
        if link:
            link.accepted()
    log = MetricsLog(folder, done) if process.main else None
    if process.world_size > 1:
        torch.distributed.barrier()  # what it drops of its files is gone
    watch = start_validation(run, folder, done, log)
    saved, bad_in_a_row = Saved(-1 if reshaped else done), 0
    data = run.config.data
    tokens = run.model.video_tokens(data.num_frames, data.height, data.width)

    def save(step: int) -> None:
        if step == saved.step:
            return
        run.pulse.at(f"saving step {step}")
        if log:
            log.flush_to_disk()
        checkpoints.save(policy, folder / "checkpoints", step, terms, train.keep_checkpoints, run.parts, changed)
        saved.step, saved.at = step, time.monotonic()

    if reshaped:
        save(done)
    with _stop_signals() as stop, progress("training", train.steps, done=done, show=process.main) as bar:
        run.stop = stop
        ended = None
        if watch:
            try:
                ended = watch.look(done)
            except Abandoned as reason:
                return _stopped(process, reason)
        for number in range(done, done if ended else train.steps):
            begun = time.perf_counter()
            try:
                supplied = {}
                if supply:
                    run.pulse.at(f"making pairs for step {number + 1}")
                    supplied = supply.refresh(run, number)
                stepping = time.perf_counter()
                videos = run.sides * train.global_batch_size
                peak = None if run.distils else at_peak
                step = run.step(number)
            except (Waiting, Abandoned) as reason:
                save(number)
                return _stopped(process, reason)
            run.pulse.took(time.perf_counter() - stepping)
            bad_in_a_row = 0 if step.applied else bad_in_a_row + 1
            if log:
                step.seconds["data"] += stepping - begun
                health = timings(time.perf_counter() - begun, step.seconds, len(step.rows), videos * tokens, peak)
                log.write(number + 1, _printable(step.metrics | supplied), health)
                noted = f"loss {step.metrics['loss']:.4f}  winner's error {step.metrics['error_w']:.4f}"
                bar.advance(note=noted, beside=in_short(step.metrics, health))
                if not step.applied:
                    say(f"step {number + 1} is skipped, its loss or gradient is not finite: {_at_fault(run, step)}")
            if bad_in_a_row >= train.max_bad_steps:
                _stop_diverged(run, folder, number, step.rows)
            if watch:
                with suppress(Abandoned):  # whoever was told to stop still is, and the look will be made up for
                    ended = watch.look(number + 1)
            stopping, due = any_process(process, stop(), process.main and saved.due(train.checkpoint_minutes))
            if (number + 1) % train.checkpoint_every == 0 or number + 1 == train.steps or stopping or due or ended:
                save(number + 1)
            if stopping:
                if process.main:
                    say(f"stopped after step {number + 1} with a checkpoint; the same command continues")
                return False
            if ended:
                break
    if log:
        log.close()
        if ended:
            say(ended)
    return not (ended and link)


def _stopped(process: Process, reason: Exception) -> bool:
    if process.main:
        say(f"{reason}; the same command continues")
    return False


@dataclass
class Saved:
    """The step of the newest checkpoint, and when it was made or this run began."""

    step: int
    at: float = field(default_factory=lambda: time.monotonic())

    def due(self, minutes: float | None) -> bool:
        return minutes is not None and time.monotonic() - self.at >= 60 * minutes


def _at_fault(run: Run, step: Step) -> str:
    """The pairs whose own numbers are not finite, by id and source; all of the step's, where each pair's are."""
    pairs = [(run.store.rows[row]["id"], run.store.rows[row]["source"]) for row in step.bad_rows or _rows(step)]
    named = ", ".join(f"{pair} ({source})" for pair, source in pairs[:PAIRS_NAMED])
    more = f" and {len(pairs) - PAIRS_NAMED} more" if len(pairs) > PAIRS_NAMED else ""
    return f"pair {named}{more}" if step.bad_rows else f"in the gradient alone, one of pairs {named}{more}"


def _rows(step: Step) -> list[int]:
    return [row for row, _ in step.rows]


def _printable(metrics: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite is written as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()
    }


def _stop_diverged(run: Run, folder: Path, number: int, rows: list[tuple[int, int]]) -> None:
    """Nothing is saved over the last good checkpoint; the batch is named, so that it can be looked at."""
    file = folder / f"diverged-step-{number + 1}.parquet"
    if run.process.main:
        run.store.rows.select([row for row, _ in rows]).to_parquet(str(file))
    raise TrainingDiverged(
        f"step {number + 1}: loss or gradient not finite in {run.config.train.max_bad_steps} steps in a row; the last "
        f"batch is in {file}, the last checkpoint is untouched; lower train.learning_rate or objective.beta"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether one of `end_signals` has come; a second interrupt ends at once."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in seen:  # a launcher passes a terminal's on, as SIGTERM: no second one
            raise KeyboardInterrupt
        _leave_lost_terminal()
        seen.append(number)

    before = {number: signal.signal(number, note) for number in end_signals()}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """What is written to a terminal that is gone is an error, which would end a run that has only to be saved."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
