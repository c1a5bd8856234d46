"""`alignkit train`: the training loop, from stored pairs to an exported model."""

import math
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from alignkit.config import OBJECTIVE_KEYS, Config, dump_config
from alignkit.errors import AlignkitError, DataError
from alignkit.files import write_atomically, write_json
from alignkit.models import load_model
from alignkit.objectives.preference import diagnostics, training_loss
from alignkit.objectives.states import training_states
from alignkit.progress import progress, say
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairBatch, PairStore, collate
from alignkit.training import checkpoints
from alignkit.training.distributed import Process, on_main
from alignkit.training.engine import (
    accumulation_steps,
    full_precision_weights,
    load_network,
    start_policy,
    start_reference,
)
from alignkit.training.export import export, export_folder, export_lora
from alignkit.training.metrics import MetricsLog
from alignkit.training.order import global_batch, rank_share
from alignkit.training.weights import base_weights

NOISE_BUCKETS = 4  # quarters of the noise level, for the error by timestep


class TrainingDiverged(AlignkitError):
    """Too many steps in a row had a non-finite loss or gradient."""


def train_folder(config: Config) -> Path:
    return config.output.dir / "train"


@contextmanager
def _linear_put_back():
    """ZeRO-3 replaces `F.linear` for the whole process, with other rounding, which later stages must not inherit."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


@_linear_put_back()
def train(config: Config, process: Process) -> bool:
    """Train from the newest whole checkpoint to `train.steps`, then export; returns True. Every process calls this.

    SIGTERM or an interrupt ends it after the step under way, with a checkpoint; it then returns False.
    """
    accumulation = accumulation_steps(config, process.world_size)
    store = PairStore(pairs_folder(config, "train"))
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    terms = on_main(process, lambda: _checked_terms(config, store, model))  # reads all weights: once is enough
    weights = base_weights(config.model, model)
    model.transformer, attention = load_network(config, process, model, weights)
    terms |= {"attention": attention}
    folder = train_folder(config)
    if process.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())
        write_json(folder / "run.json", terms | {"processes": process.world_size})
        say(
            f"training on {process.world_size} process(es), {process.device}, {torch.get_num_threads()} threads each, "
            f"attention: {attention}"
        )
    policy = start_policy(config, process, model.transformer, weights)
    reference = start_reference(config, process, policy, model, weights)
    del weights  # the first process may hold a copy
    done = checkpoints.load_latest(policy, folder / "checkpoints", terms)
    if done and process.main:
        say(f"resuming after step {done}")
    log = MetricsLog(folder, done) if process.main else None

    bad_in_a_row = 0
    with _stop_signals() as stop, progress("training", config.train.steps, done=done, show=process.main) as bar:
        for step in range(done, config.train.steps):
            start = time.perf_counter()
            rows = global_batch(len(store), config.train.seed, step, config.train.global_batch_size)
            share = rank_share(rows, process.rank, process.world_size)
            _set_learning_rate(policy, config, step)
            numbers = [
                _forward_backward(config, model, policy, reference, store, micro, process, step)
                for micro in _chunks(share, accumulation)
            ]
            applied = _applied(policy)
            metrics = _mean_over_processes(numbers, process)
            metrics |= {"lr": policy.optimizer.param_groups[0]["lr"], "epoch": rows[-1][1], "skipped": int(not applied)}
            metrics["grad_norm"] = float(policy.get_global_grad_norm()) if applied else math.nan
            bad_in_a_row = 0 if applied else bad_in_a_row + 1
            if log:
                log.write(step + 1, _printable(metrics), _timings(start, len(rows)))
                bar.advance(note=f"loss {metrics['loss']:.4f}  winner's error {metrics['error_w']:.4f}")
            if bad_in_a_row >= config.train.max_bad_steps:
                _stop_diverged(config, folder, step, rows, store, process)
            stopping = _any_process(stop(), process)
            if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == config.train.steps or stopping:
                if log:
                    log.flush_to_disk()
                checkpoints.save(policy, folder / "checkpoints", step + 1, terms, config.train.keep_checkpoints)
            if stopping:
                if process.main:
                    say(f"stopped after step {step + 1} with a checkpoint; the same command continues")
                return False
    if log:
        log.close()
    trained = full_precision_weights(policy)
    if process.main:
        if config.train.lora:
            export_lora(model, trained, config.train.lora, export_folder(config))
        else:
            export(model, trained, export_folder(config))
    torch.distributed.barrier()
    return True


def run_terms(config: Config, store: PairStore, model) -> dict:
    """What a checkpoint and the run that resumes it must share; how long to train and how often to save are free."""
    train = config.train.model_dump(
        mode="json", exclude={"steps", "checkpoint_every", "keep_checkpoints", "max_bad_steps"}
    )
    return {
        "model": model.fingerprint(),
        "pairs": store.fingerprint,
        **{f"train.{key}": value for key, value in train.items()},
        **{f"objective.{key}": value for key, value in config.objective.model_dump(mode="json").items()},
        **{f"noise.{key}": value for key, value in config.noise.model_dump(mode="json").items()},
        "dtype": config.model.dtype,
        "deepspeed": config.deepspeed.model_dump(mode="json"),
    }


def _checked_terms(config: Config, store: PairStore, model) -> dict:
    _check_store(store, model, config)
    return run_terms(config, store, model)


def _check_store(store: PairStore, model, config: Config) -> None:
    """Pairs must come from this family's VAE, and from this network where a network made them."""
    for name in ("family", "model", "vae"):
        theirs = getattr(store.info, name)
        ours = model.family if name == "family" else model.fingerprint("transformer" if name == "model" else name)
        if theirs not in (None, ours):
            raise DataError(
                f"{store.folder}: its pairs were made with {name} {theirs!r}, but model.path "
                f"{config.model.path!r} is {ours!r}; build the pairs again with this model"
            )
    if "strength_range" in OBJECTIVE_KEYS[config.objective.name]:
        low, high = config.objective.strength_range
        for strength in {value for value in store.rows["strength"] if value is not None}:
            if not low <= strength <= high:
                raise DataError(
                    f"{store.folder}: has pairs of strength {strength:g}, outside objective.strength_range "
                    f"[{low:g}, {high:g}]; widen it, or build the pairs with other pairs.strengths"
                )


def load_rows(store: PairStore, rows: list[int], device: torch.device) -> PairBatch:
    batch = collate([store[row] for row in rows])
    return PairBatch(
        batch.ids, batch.winner.to(device), batch.loser.to(device), batch.mask.to(device), batch.text, batch.strength
    )


def _forward_backward(config, model, policy, reference, store, micro, process, step) -> dict[str, torch.Tensor]:
    """One micro-batch through loss, backward and (at the last one of a step) the optimizer."""
    batch = load_rows(store, [row for row, _ in micro], process.device)
    epochs = torch.tensor([epoch for _, epoch in micro])
    dtype = next(policy.module.parameters()).dtype
    states = training_states(config, model, batch, epochs, store.empty_text, dtype)
    result = training_loss(config, model, policy, reference, batch, states)
    if step == 0:
        check_first_logits(result.logits)
    policy.backward(result.loss)
    policy.step()
    return diagnostics(config, result, states)


def check_first_logits(logits: dict[str, torch.Tensor]) -> None:
    """Policy and reference are the same weights before the first update: any logit but 0 is a fault of the set-up.

    A logit that is not finite comes from the pair itself, and its step is skipped like any other such step.
    An objective without a reference has none.
    """
    largest = max((z.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for z in logits.values()), default=0.0)
    if largest != 0.0:
        raise AlignkitError(
            f"step 0: policy and reference differ by {largest:g} logits where they must agree exactly; they do not run "
            "in the same precision, attention or partitioning (is a key of deepspeed.config the cause?)"
        )


def _applied(policy) -> bool:
    """Whether the optimizer took the step: DeepSpeed skips it, on every process, when a gradient is not finite."""
    return bool(policy.was_step_applied())


def _set_learning_rate(policy, config: Config, step: int) -> None:
    warmup = config.train.warmup_steps
    rate = config.train.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)
    for group in policy.optimizer.param_groups:
        group["lr"] = rate


def _mean_over_processes(parts: list[dict[str, torch.Tensor]], process: Process) -> dict:
    """Means over the global batch, in fp64, and the winner's error by noise level (None where no pair fell)."""
    names = list(parts[0])
    values = torch.stack([torch.cat([part[name] for part in parts]) for name in names])  # [metric, pair]
    bucket = (values[names.index("noise_level")] * NOISE_BUCKETS).long().clamp(max=NOISE_BUCKETS - 1)
    member = torch.nn.functional.one_hot(bucket, NOISE_BUCKETS).double()  # [pair, bucket]
    count = torch.tensor([values.shape[1]], dtype=torch.float64, device=values.device)
    sums = torch.cat([values.sum(dim=1), count, values[names.index("error_w")] @ member, member.sum(dim=0)])
    if process.world_size > 1:
        torch.distributed.all_reduce(sums)
    means, (total, *rest) = sums[: len(names)].tolist(), sums[len(names) :].tolist()
    by_noise = zip(rest[:NOISE_BUCKETS], rest[NOISE_BUCKETS:], strict=True)
    return {name: value / total for name, value in zip(names, means, strict=True)} | {
        "error_by_timestep": [error / pairs if pairs else None for error, pairs in by_noise]
    }


def _any_process(flag: bool, process: Process) -> bool:
    if process.world_size == 1:
        return flag
    together = torch.tensor([int(flag)], device=process.device)
    torch.distributed.all_reduce(together)
    return bool(together.item())


def _chunks(rows: list, count: int) -> list[list]:
    size = len(rows) // count
    return [rows[i * size : (i + 1) * size] for i in range(count)]


def _printable(metrics: dict) -> dict:
    """JSON has no NaN: a number that is not finite is written as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()
    }


def _timings(start: float, pairs: int) -> dict[str, float]:
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "pairs_per_second": pairs / seconds, "peak_memory_gb": peak / 1e9}


def _stop_diverged(config: Config, folder: Path, step: int, rows: list, store: PairStore, process: Process) -> None:
    """Nothing is saved over the last good checkpoint; the batch is named, so that it can be looked at."""
    file = folder / f"diverged-step-{step + 1}.parquet"
    if process.main:
        store.rows.select([row for row, _ in rows]).to_parquet(str(file))
    raise TrainingDiverged(
        f"step {step + 1}: loss or gradient not finite in {config.train.max_bad_steps} steps in a row; the last "
        f"batch is in {file}, the last checkpoint is untouched; lower train.learning_rate or objective.beta"
    )


@contextmanager
def _stop_signals():
    """Yields a function that says whether SIGTERM or an interrupt has come; a second interrupt ends at once."""
    seen = []

    def note(number, _frame):
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
