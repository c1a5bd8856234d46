"""A training run: what it is put together from, and one step of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from alignkit.config import Config, TrainSection
from alignkit.config.batches import accumulation_steps
from alignkit.errors import AlignkitError
from alignkit.models import VideoModel
from alignkit.objectives.beta import AutoBeta
from alignkit.objectives.diagnostics import diagnostics, inversion_numbers, signal
from alignkit.objectives.distillation import distillation_states, with_next_steps
from alignkit.objectives.laws import SIGNAL, Law, start_law
from alignkit.objectives.preference import TrainingLoss, preference_loss, supervised_loss
from alignkit.objectives.states import States, predictions, training_states
from alignkit.stores.pairs import PairBatch, PairStore, collate
from alignkit.training.average import Average
from alignkit.training.branches import Sides, backward_apart, predict_sides
from alignkit.training.context import own_group
from alignkit.training.distributed import Process, any_process, gather
from alignkit.training.engine import release, start_policy
from alignkit.training.health import Clock
from alignkit.training.heartbeat import Pulse
from alignkit.training.order import global_batch, rank_share
from alignkit.training.references import Reference, start_reference
from alignkit.training.references.cached import Visited
from alignkit.training.references.copy import release_network
from alignkit.training.teacher import Teacher
from alignkit.training.weights import Start

ROW = "row"  # of the schedule, beside a pair's signal
NOISE_BUCKETS = 4  # quarters of the noise level, for the error by timestep


class Abandoned(Exception):
    """A step that was left between two micro-batches; no weight has changed."""


@dataclass(frozen=True)
class Step:
    """What came of one step: means over the global batch, its (row, epoch) pairs, whether the optimizer took it, and if
    not, the rows of pairs whose own numbers are not finite; and where this process's time went, seconds by part."""

    metrics: dict[str, Any]
    rows: list[tuple[int, int]]
    applied: bool
    bad_rows: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """The policy's engine and all that a step needs beside it. Each of `law`, `beta` and `reference` may have a
    state, which checkpoints hold (`parts`), and a hook that is called after each step that the optimizer took.

    starts_apart: the policy does not start where the reference does. since: the step at which `store` became what it
    is; its pairs' epochs are counted from there, and no two steps share one. distils: whether the next step moves the
    policy along its teacher's paths (`distillation_states`) instead of comparing pairs. few_step: whether pairs are
    compared at a few-step student's own targets (`with_next_steps`). teacher: whom it is held to. average: of its
    weights. stop: whether this process was told to end. pulse: what tells the others how far it is.
    """

    config: Config
    process: Process
    model: VideoModel
    store: PairStore
    policy: Any
    reference: Reference | None
    law: Law
    beta: AutoBeta | None
    starts_apart: bool = False
    since: int = 0
    distils: bool = False
    few_step: bool = False
    teacher: Teacher | None = None
    average: Average | None = None
    stop: Callable[[], bool] = lambda: False
    pulse: Pulse = field(default_factory=lambda: Pulse(math.inf))
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.process.device)

    @property
    def sides(self) -> int:
        """Videos of a pair that the next step learns from."""
        return 1 if self.reference is None or self.distils else 2

    @property
    def parts(self) -> dict[str, object]:
        return {"law": self.law, "beta": self.beta, "reference": self.reference, "ema": self.average}

    def leave_if_stopped(self, what: str) -> None:
        """Raises Abandoned, on every process alike, where a signal has come to one of them; every process calls this
        between two parts of `what`, which is done again by the run that goes on."""
        if any_process(self.process, self.stop())[0]:
            raise Abandoned(f"stopped in {what}, which will be done again")

    def step(self, number: int) -> Step:
        """Step `number`, counted from 0: every micro-batch through loss and backward, then the optimizer.

        Raises Abandoned where it is to stop between two micro-batches; the run is then over.
        """
        config, process = self.config, self.process
        rows = self._rows(number)
        share = rank_share(rows, *own_group(config, process))
        self._set_learning_rate(number)
        micro_batches = _chunks(share, accumulation_steps(config, process.world_size))
        numbers: list[dict[str, Tensor]] = []
        for i, micro in enumerate(micro_batches, 1):
            self.pulse.at(f"step {number + 1}, micro-batch {i} of {len(micro_batches)}", in_step=True)
            if numbers:
                self.leave_if_stopped(f"step {number + 1}")
            self.policy.set_gradient_accumulation_boundary(i == len(micro_batches))
            numbers.append(self._forward_backward(micro, number))
        # DeepSpeed skips the step, on every process, when a gradient is not finite
        applied = bool(self.policy.was_step_applied())
        signals = self._signals(numbers) if SIGNAL in numbers[0] else {}
        metrics = mean_over_processes(numbers, process)
        metrics |= {
            "lr": self.policy.optimizer.param_groups[0]["lr"],
            "epoch": rows[-1][1],
            "skipped": int(not applied),
        }
        metrics["grad_norm"] = float(self.policy.get_global_grad_norm()) if applied else math.nan
        if applied:
            parts: tuple[Any, ...] = self.law, self.beta
            for part in parts:
                if hasattr(part, "observe") and not self.distils:
                    part.observe(metrics | signals)
            if self.reference is not None and hasattr(self.reference, "after_step"):
                self.clock.at("reference")
                self.reference.after_step(self.policy)
            if self.average is not None:
                self.average.after_step()
        bad_rows = () if applied else self._bad_rows(numbers, share)
        return Step(metrics, rows, applied, bad_rows, self.clock.stop())

    def keep_optimizer_settings(self) -> None:
        """The optimizer's settings are the file's; a checkpoint that was loaded has put its own in their place."""
        train = self.config.train
        for group in self.policy.optimizer.param_groups:
            group["betas"], group["weight_decay"] = tuple(train.betas), train.weight_decay

    def _bad_rows(self, numbers: list[dict[str, Tensor]], share: list[tuple[int, int]]) -> tuple[int, ...]:
        """Rows of the step's pairs whose loss or error is not finite, of all processes."""
        values = torch.cat([torch.stack([part["loss"], part["error_w"]]).isfinite().all(0) for part in numbers])
        bad = [row for (row, _), fine in zip(share, values.tolist(), strict=True) if not fine]
        return tuple(sorted({row for part in gather(bad) for row in part}))

    def states(self, batch: PairBatch, epochs: Tensor) -> Visited:
        """The states at which a micro-batch is compared in `epochs`, int64 [B]."""
        dtype = next(self.policy.module.parameters()).dtype
        return visited_states(self.config, self.model, self.law, self.store, batch, epochs, dtype)

    def loss(self, batch: PairBatch, states: States, sides: Sides | None = None) -> TrainingLoss:
        """The loss of a micro-batch: one forward of each network over both sides, or of the policy over the winners.

        sides: the policy's predictions, where they are there already."""
        if self.reference is None:
            return supervised_loss(predictions(self.model, self.policy, states, slice(len(batch))), batch, states)
        self.clock.at("reference")
        references = self.reference.answer(batch, states)
        self.clock.at("policy")
        beta = None if self.beta is None else self.beta.value
        winner, loser = sides or predictions(self.model, self.policy, states).chunk(2)
        loss = preference_loss(self.config.objective, (winner, loser), references, batch, states, beta)
        if self.teacher is None:
            return loss
        self.clock.at("teacher")
        distance = self.teacher.distance(loser, states, self.store.negative_text)
        self.clock.at("policy")
        return loss.beside(distance, self.teacher.weight)

    def distillation(self, batch: PairBatch, epochs: Tensor) -> tuple[TrainingLoss, States]:
        """The loss of a micro-batch in a step that distils, and the states that it was taken at."""
        dtype = next(self.policy.module.parameters()).dtype
        taught, states = distillation_states(self.model, self.law, batch, epochs, dtype)
        return supervised_loss(predictions(self.model, self.policy, states), taught, states), states

    def _forward_backward(self, micro: list[tuple[int, int]], number: int) -> dict[str, Tensor]:
        self.clock.at("data")
        batch = load_rows(self.store, [row for row, _ in micro], self.process.device)
        epochs = torch.tensor([epoch for _, epoch in micro])
        sides = None
        if self.distils:
            self.clock.at("policy")
            result, states = self.distillation(batch, epochs)
        else:
            states = self.states(batch, epochs)
            if self.few_step:
                batch = with_next_steps(self.law, batch, epochs)
            self.clock.at("policy")
            if self.config.train.branches == "apart" and self.reference is not None:
                sides = predict_sides(self.model, self.policy, states)
            result = self.loss(batch, states, sides)
        if number == 0 and not self.starts_apart:
            check_first_logits(result.logits)
        loss = result.loss * self.config.train.context_parallel  # `alignkit.training.context` has the reason
        if sides is None:
            self.policy.backward(loss)
        else:
            backward_apart(self.model, self.policy, states, sides, loss)
        self.clock.at("optimizer")
        self.policy.step()
        self.clock.at("policy")
        numbers = diagnostics(self.config.objective, result, states)
        if self.store.inverted:
            numbers |= inversion_numbers(batch, self.config.noise.max_inversion_error)
        if hasattr(self.law, "observe") and states.rows is not None:
            numbers |= {SIGNAL: signal(result), ROW: states.rows.double()}
        return numbers

    def _signals(self, numbers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The sum of the step's signals and the number of its pairs by row of the schedule, fp64 [2, N], of all
        processes; taken out of `numbers`."""
        size = len(self.model.schedule(self.config.sampler.num_steps))
        values = torch.cat([part.pop(SIGNAL) for part in numbers]).cpu()
        rows = torch.cat([part.pop(ROW) for part in numbers]).long().cpu()
        sums = torch.stack([torch.bincount(rows, weights, size) for weights in (values, torch.ones_like(values))])
        if self.process.rank % self.config.train.context_parallel:  # the same pairs as the first of its group
            sums.zero_()
        if self.process.world_size > 1:
            shared = sums.to(self.process.device)
            torch.distributed.all_reduce(shared)
            sums = shared.cpu()
        return {SIGNAL: sums}

    def release(self) -> None:
        """Free the engines, for the next run of this process; this one ends with it."""
        if self.reference is not None and hasattr(self.reference, "release"):
            self.reference.release()
        if self.teacher is not None:
            release_network(self.teacher.network)
        release(self.policy)

    def _rows(self, number: int) -> list[tuple[int, int]]:
        """(row, epoch) of the step's pairs."""
        size = self.config.train.global_batch_size
        seed, epoch = self.config.train.seed, self.since * size
        return global_batch(len(self.store), seed, number - self.since, size, epoch)

    def _set_learning_rate(self, number: int) -> None:
        rate = learning_rate(self.config.train, number)
        for group in self.policy.optimizer.param_groups:
            group["lr"] = rate


def learning_rate(train: TrainSection, number: int) -> float:
    """Of step `number`, counted from 0: linear warm-up, then constant, or half a cosine to the last step (arXiv
    1608.03983, Eq. 5, without restarts). A function of the step alone: a run that is resumed has the same."""
    if number < train.warmup_steps:
        return train.learning_rate * (number + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    through = (number + 1 - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    low = train.min_learning_rate
    return low + (train.learning_rate - low) * (1 + math.cos(math.pi * min(through, 1.0))) / 2


def start_run(config: Config, process: Process, model: VideoModel, store: PairStore | None, start: Start) -> Run:
    """The run at its first step; `model.transformer`, as `load_network` gave it, becomes the policy. Every process
    calls this."""
    policy = start_policy(config, process, model.transformer, start)
    reference = start_reference(config, process, policy, model, start)
    beta = AutoBeta(config.objective) if reference is not None and config.objective.beta == "auto" else None
    apart = start.later and config.reference.from_ == "base"
    store = cast(PairStore, store)  # where there is none yet, a supply puts one in before the first step
    average = Average(policy, config.train.ema) if config.train.ema else None
    law = start_law(config, model)
    return Run(config, process, model, store, policy, reference, law, beta, apart, average=average)


def visited_states(
    config: Config, model: VideoModel, law: Law, store: PairStore, batch: PairBatch, epochs: Tensor, dtype: torch.dtype
) -> Visited:
    """The states at which a network in `dtype` is shown a micro-batch of `store` in `epochs`, int64 [B]."""
    texts = {"empty_text": store.empty_text}
    if config.noise.guided:
        texts["negative_text"] = store.negative_text
    states = training_states(config, model, law, batch, epochs, dtype=dtype, **texts)
    return Visited(**vars(states), epochs=epochs)


def load_rows(store: PairStore, rows: list[int], device: torch.device) -> PairBatch:
    batch = collate([store[row] for row in rows])
    return replace(batch, **{name: getattr(batch, name).to(device) for name in ("winner", "loser", "mask")})


def check_first_logits(logits: dict[str, Tensor]) -> None:
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


def mean_over_processes(parts: list[dict[str, Tensor]], process: Process) -> dict[str, Any]:
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


def _chunks(rows: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    size = len(rows) // count
    return [rows[i * size : (i + 1) * size] for i in range(count)]
