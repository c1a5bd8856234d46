"""`train.validate_every`: looks at held-out pairs and at samples while a run trains, which leave its training as it is.

Every process calls the same, and forwards are equally many on each, so that it works under every preset. What is looked
at is a function of keys, never of the step: two looks differ by what was trained between them.
"""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit.config import Config
from alignkit.errors import CheckpointError, DataError
from alignkit.files import write_atomically, write_json
from alignkit.media.videos import PLAYBACK_FPS
from alignkit.models import VideoModel, load_model
from alignkit.objectives.diagnostics import accuracy
from alignkit.objectives.scored import score
from alignkit.objectives.states import predictions
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training import manifest
from alignkit.training.context import own_group
from alignkit.training.distributed import gather, on_main
from alignkit.training.heldout import points, rows_of, shape_of, shown_at
from alignkit.training.metrics import VALIDATION, MetricsLog, read_metrics
from alignkit.training.run import Run
from alignkit_kernels import NoiseKey, Stream, keyed_randn, losses

STOPPED = "stopped.json"
BETA = 2.0  # of logits of which only the sign is read


@dataclass(frozen=True)
class Errors:
    """Sums over regions, fp64 [comparisons, 2 sides, R], and elements of each, fp64 [comparisons, R]; a comparison is
    a pair at a point, in the order of `points`."""

    error: Tensor
    count: Tensor


def check_validation(config: Config, model: VideoModel, folder: Path) -> None:
    """Raises DataError where there is nothing to look at, CheckpointError where the run in `folder` was begun without
    looking, or at something else: what its errors were before the first step can no longer be told."""
    if config.train.validate_every is None:
        return
    terms = _terms(config, model, _heldout(config))
    rows_of(config, model)
    if manifest.candidates(folder / "checkpoints") and not config.train.restart:
        _read_start(folder, terms)


def _heldout(config: Config) -> PairStore:
    try:
        store = PairStore(pairs_folder(config, "heldout"))
    except DataError as error:
        raise DataError(f"train.validate_every: looks at held-out pairs: {error}") from None
    if not len(store):
        raise DataError(f"train.validate_every: {store.folder}: no pairs are held out; raise data.heldout")
    return store


def _start_file(folder: Path) -> Path:
    return folder / "validation" / "start.safetensors"


def _terms(config: Config, model: VideoModel, store: PairStore) -> dict[str, Any]:
    """What two looks must share to be compared."""
    section = config.evaluation
    return {
        "held-out pairs": store.fingerprint,
        **{f"evaluation.{key}": getattr(section, key) for key in ("seed", "draws", "batch_size")},
        "evaluation.positions": list(section.positions),
        "schedule": model.schedule(config.sample.num_inference_steps).fingerprint,
        "model.max_sequence_length": config.model.max_sequence_length,
    }


def _read_start(folder: Path, terms: dict[str, Any]) -> Errors:
    """The errors before the first step of the run in `folder`."""
    file = _start_file(folder)
    if not file.exists():
        raise CheckpointError(
            f"train.validate_every: {folder}: this run was begun without it, and the errors before the first step, "
            "with which later ones are compared, are not there; leave it out, or start in another output.dir"
        )
    stored = load_tensors(file.read_bytes())
    was = json.loads(bytes(stored["terms"].tolist()))
    changed = next((name for name in terms if was.get(name) != terms[name]), None)
    if changed is not None:
        raise CheckpointError(
            f"train.validate_every: {folder}: was begun with {changed} = {was.get(changed)!r}, now it is "
            f"{terms[changed]!r}; put it back, or start in another output.dir"
        )
    return Errors(stored["error"], stored["count"])


@dataclass
class Validation:
    """Looks of one run. found: the winner's error's change by step, of the looks there were."""

    run: Run
    folder: Path
    log: MetricsLog | None
    store: PairStore
    terms: dict[str, Any]
    start: Errors | None
    found: dict[int, float]
    texts: tuple[list[Tensor], Tensor] | None = None
    decoder: VideoModel | None = field(default=None, repr=False)

    def look(self, step: int) -> str | None:
        """After `step` steps, where a look is due and not yet there; returns why the run is to end after this step and
        what to do, None where it goes on. Raises Abandoned; every process calls this."""
        train = self.run.config.train
        assert train.validate_every is not None
        if step % train.validate_every == 0 and step not in self.found:
            self._look(step)
        over = self._over(step)
        if over and self.log:
            self._record_stop(step)
        return over

    def _look(self, step: int) -> None:
        run, engine = self.run, self.run.policy
        was = engine.training
        engine.eval()
        try:
            errors = self._score(step)
            videos = self._sample(step)
        finally:
            engine.train(was)
        run.pulse.at(f"validating after step {step}, the rest")
        if step == 0:
            self.start = errors
            if self.log:
                self._keep_start()
        numbers = self._numbers(errors)
        self.found[step] = numbers["winner_error_change"]
        if self.log:
            readable = {name: value if _finite(value) else None for name, value in numbers.items()}
            self.log.write_validation(step, readable, videos, run.config.data.fps or PLAYBACK_FPS)
        torch.distributed.barrier()  # videos take time to decode

    def _over(self, step: int) -> str | None:
        most, change = self.run.config.train.max_winner_error, self.found.get(step)
        if most is None or change is None or change <= most:
            return None
        return (
            f"after step {step} the winner's error on held-out pairs has changed by {100 * change:+.2f} % since this "
            f"run began, more than train.max_winner_error ({100 * most:g} %) allows, so it ends here; start again in "
            "another output.dir with a lower train.learning_rate or a higher objective.weight_sft, or go on from here "
            "with a higher train.max_winner_error"
        )

    def _record_stop(self, step: int) -> None:
        """For whoever looks at the run later."""
        most, change = self.run.config.train.max_winner_error, _or_none(self.found[step])
        row = {"step": step, "winner_error_change": change, "max_winner_error": most}
        write_json(self.folder / STOPPED, row)

    def _keep_start(self) -> None:
        assert self.start is not None
        file = _start_file(self.folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        words = torch.frombuffer(bytearray(json.dumps(self.terms).encode()), dtype=torch.uint8)
        write_atomically(file, save_tensors({"error": self.start.error, "count": self.start.count, "terms": words}))

    @torch.no_grad()
    def _score(self, step: int) -> Errors:
        run, process = self.run, self.run.process
        group, groups = own_group(run.config, process)
        wanted = points(run.config, run.model, self.store)
        dtype = next(run.policy.module.parameters()).dtype
        own: dict[int, tuple[Tensor, Tensor]] = {}
        for first in range(0, len(wanted), groups):
            self._next(step, f"held-out pairs, part {first + 1} of {len(wanted)}")
            number = min(first + group, len(wanted) - 1)  # one over again where none is left
            batch, states = shown_at(run.config, run.model, self.store, wanted[number], process.device, dtype)
            winner, loser = predictions(run.model, run.policy, states).chunk(2)
            sums = score((winner, loser), None, batch, states)
            own[number] = torch.stack([sums.error_w, sums.error_l], dim=1).cpu(), sums.count.double().cpu()
        parts = {number: part for found in gather(own) for number, part in found.items()}
        errors, counts = zip(*(parts[number] for number in range(len(wanted))), strict=True)
        return Errors(torch.cat(errors), torch.cat(counts))

    def _numbers(self, now: Errors) -> dict[str, Any]:
        """Means over all comparisons; accuracy as in `alignkit eval`, against the run's own start."""
        assert self.start is not None
        (error_w, error_l), (start_w, start_l) = now.error.unbind(1), self.start.error.unbind(1)
        means = losses.pair_means(error_w, error_l, error_w - start_w, error_l - start_l, now.count)
        before_w, before_l = means.error_w - means.gap_w, means.error_l - means.gap_l
        region = losses.logits_of(means.region_gap_w, means.region_gap_l, BETA)
        whole = losses.logits_of(means.gap_w, means.gap_l, BETA)
        levels = shape_of(self.run.config, self.run.model, self.store)[0]
        return {
            "region_accuracy": accuracy(region).mean().item(),
            "global_accuracy": accuracy(whole).mean().item(),
            "winner_error": means.error_w.mean().item(),
            "winner_error_change": _change(means.error_w, before_w),
            "loser_error": means.error_l.mean().item(),
            "loser_error_change": _change(means.error_l, before_l),
            "winner_error_change_by_noise": [
                _or_none(_change(*sides))
                for sides in zip(means.error_w.chunk(levels), before_w.chunk(levels), strict=True)
            ],
        }

    def _sample(self, step: int) -> list[Tensor]:
        """The first videos that `alignkit sample` would make of the policy, uint8 [F, H, W, 3], on the first process
        alone."""
        run, process, config = self.run, self.run.process, self.run.config
        count, sampler, data = config.train.validate_samples, config.usual_sampler, config.data
        if not count:
            return []
        shape = run.model.latent_shape(data.num_frames, data.height, data.width)
        batches = torch.arange(count).split(config.sample.batch_size)
        texts, negative = self._texts()
        group, groups = own_group(config, process)
        walker = copy.copy(run.model)
        walker.transformer, walker.dtype = run.policy, next(run.policy.module.parameters()).dtype
        own: dict[int, Tensor] = {}
        for first in range(0, len(batches), groups):
            self._next(step, f"samples, part {first + 1} of {len(batches)}")
            number = min(first + group, len(batches) - 1)
            ids = batches[number]
            key = NoiseKey(config.sample.seeds[0], ids, 0, Stream.ROLLOUT)
            own[number] = walker.sample(
                keyed_randn((len(ids), *shape), key, device=process.device),
                walker.pad_text([texts[i] for i in ids.tolist()]).to(process.device, walker.dtype),
                walker.pad_text([negative] * len(ids)).to(process.device, walker.dtype),
                num_steps=sampler.num_steps,
                guidance=sampler.guidance,
                dynamic=sampler.dynamic,
                solver=sampler.solver,
            ).cpu()
        parts = {number: part for found in gather(own) for number, part in found.items()}
        if self.decoder is None:
            return []
        self.decoder.vae.to(process.device)
        try:
            return [video for number in sorted(parts) for video in self._decode(parts[number])]
        finally:
            self.decoder.vae.to("cpu")

    def _decode(self, latents: Tensor) -> Tensor:
        assert self.decoder is not None
        return self.decoder.decode_video(latents.to(self.decoder.vae.device))

    def _texts(self) -> tuple[list[Tensor], Tensor]:
        """Of the prompts that are sampled, and of the negative one; the text encoder is there for no longer than that
        takes."""
        if self.texts is None:
            self.run.pulse.at("loading the VAE and the text encoder")
            self.texts = on_main(self.run.process, self._encode)
        return self.texts

    def _encode(self) -> tuple[list[Tensor], Tensor]:
        config = self.run.config
        prompts = list(dict.fromkeys(self.store.rows["prompt"]))
        wanted = [prompts[i % len(prompts)] for i in range(config.train.validate_samples)]
        self.decoder = load_model(config.model, with_transformer=False)
        texts = self.decoder.encode_text(wanted), self.decoder.encode_text([config.usual_sampler.negative_prompt])[0]
        self.decoder.pipeline.text_encoder = None
        return texts

    def _next(self, step: int, what: str) -> None:
        self.run.pulse.at(f"validating after step {step}, {what}")
        self.run.leave_if_stopped(f"the validation after step {step}")


def start_validation(run: Run, folder: Path, done: int, log: MetricsLog | None) -> Validation | None:
    """None without `train.validate_every`. Every process calls this, `log` is the first one's."""
    if run.config.train.validate_every is None:
        return None
    store = _heldout(run.config)
    terms = _terms(run.config, run.model, store)

    def stored() -> tuple[Errors | None, dict[int, float]]:
        if not done:
            return None, {}
        rows = read_metrics(folder / VALIDATION) if (folder / VALIDATION).exists() else []
        changes = {row["step"]: row["winner_error_change"] for row in rows}
        found = {step: math.nan if change is None else change for step, change in changes.items()}
        return _read_start(folder, terms), found

    start, found = on_main(run.process, stored)
    return Validation(run, folder, log, store, terms, start, found)


def _change(now: Tensor, before: Tensor) -> float:
    return now.mean().item() / before.mean().item() - 1


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
