"""Pairs for a few-step student: what its teacher sampled, alone or beside what the student made of the same noise."""

from collections.abc import Callable

import torch

from alignkit.config import Config, RolloutSection, Sampler
from alignkit.errors import ConfigError, DataError
from alignkit.media.captions import Problem
from alignkit.models import VideoModel, family_module, load_model, working_dtype
from alignkit.schedules import common_rows
from alignkit.stores.blocks import build_store
from alignkit.stores.folders import pairs_folder, stored_dtype
from alignkit.stores.origins import Trajectory
from alignkit.stores.pairs import LATENT_DTYPES, Pair, PairStore, fault_of
from alignkit.stores.rollouts import Rollout, RolloutStore
from alignkit.stores.store import StoreInfo


def teacher_config(config: Config) -> Config:
    """What a student's teacher samples by: as `sample` says, in `student.teacher_steps`, from the student's noise."""
    rollout = config.rollout
    own = RolloutSection(
        num_inference_steps=config.student.teacher_steps,
        **{name: getattr(rollout, name) for name in ("per_prompt", "seed", "round", "block_size", "batch_size")},
    )
    return config.model_copy(update={"rollout": own})


def teacher_rows(config: Config, model: VideoModel) -> tuple[int, ...]:
    """The rows of the teacher's schedule at which the student's steps are.

    Raises ConfigError where one is none, for steps that diffusers would not walk as the student is trained to, and for
    guidance that the family does not know.
    """
    sampler = teacher_config(config).sampler
    few, many = config.student.num_inference_steps, sampler.num_steps
    if sampler.dynamic:
        family_module(model.family).dynamic_guidance(sampler.guidance, 0, many)
    model.few_step_scheduler(few)
    rows = common_rows(model.schedule(few), model.schedule(many))
    if rows is None:
        fits = [n for n in range(2, 101) if n > few and common_rows(model.schedule(few), model.schedule(n))]
        near = sorted(sorted(fits, key=lambda n: abs(n - many))[:3])
        hint = f", for example to {', '.join(map(str, near))}" if near else ""
        raise ConfigError(
            f"student.num_inference_steps: the {few} steps are no subset of the teacher's {many}; set "
            f"student.teacher_steps to a number of which they are{hint}"
        )
    return rows


def build_taught(
    config: Config,
    device: torch.device,
    teacher: RolloutStore,
    rows: tuple[int, ...],
    student: RolloutStore | None,
    first_id: int,
    sampler: Sampler,
) -> int:
    """Make the training pairs of `config`'s folder that are not there yet; returns how many there are.

    With a `student`, each of its rollouts is the loser beside the teacher's from the same noise; without, a pair is the
    teacher's rollout alone, on both sides. Winners have the teacher's states at `rows` of its schedule, as rows 0, 1, …
    of the student's. sampler: the teacher's.

    Raises DataError for rollouts of the two that are not of the same noise, for a teacher's without those states, and
    where no pair can be used.
    """
    dtype = working_dtype(config.model, device)
    model = load_model(config.model, with_transformer=False, device=device, dtype=dtype)
    stored = stored_dtype(config, dtype)
    made = {"teacher": teacher.info.made, "rows": list(rows), "student": student.info.made if student else None}
    info = StoreInfo(
        kind="rollouts",
        family=model.family,
        model=(student or teacher).info.model,
        vae=model.fingerprint("vae"),
        text_encoder=model.fingerprint("text_encoder"),
        pairs=len(student or teacher),
        block_size=config.pairs.block_size,
        dtype=stored,
        made=made | {"states": True, "max_sequence_length": config.model.max_sequence_length},
    )

    def make(numbers: range, advance: Callable[[int], None]) -> tuple[list[Pair], list[Problem]]:
        pairs, problems = [], []
        for number in numbers:
            loser = student[number] if student else None
            winner = _beside(loser, teacher) if loser else teacher[number]
            pair = _pair(model, winner, rows, loser, first_id + number)
            fault = fault_of(pair, LATENT_DTYPES[stored]) if student else _unusable(pair)
            if fault:
                problems.append(Problem(pair.source, fault))
            else:
                pairs.append(pair)
            advance(1)
        return pairs, problems

    members = [[number, (student or teacher).prompt_of(number)] for number in (student or teacher).ids]
    build_store(
        pairs_folder(config, "train"), model, info, members, make, "making train pairs",
        negative_prompt=sampler.negative_prompt, show=False,
    )  # fmt: skip
    return len(PairStore(pairs_folder(config, "train")))


def _beside(loser: Rollout, teacher: RolloutStore) -> Rollout:
    if loser.id not in teacher:
        raise DataError(f"{teacher.folder}: holds no rollout {loser.id} to stand beside the student's")
    winner = teacher.by_id(loser.id)
    if (loser.prompt, loser.origin.key) != (winner.prompt, winner.origin.key):
        raise DataError(
            f"{teacher.folder}: rollout {loser.id} is not of the noise and prompt of the student's; sample the two "
            "with the same prompts, rollout.seed and rollout.per_prompt"
        )
    return winner


def _pair(model: VideoModel, winner: Rollout, rows: tuple[int, ...], loser: Rollout | None, number: int) -> Pair:
    path = taught_path(winner, rows)
    (text,) = model.encode_text([winner.prompt])
    frames = model.frames_of_mask(winner.latents).shape[-3:]
    mask = torch.ones(frames, dtype=torch.uint8)
    source = f"rollout {winner.id} of the teacher"
    own = tuple(range(len(rows)))
    if loser is None:  # the mask of nothing: then nothing is stored twice
        nothing = model.region_layout(torch.zeros_like(mask))
        return Pair(
            number, source, winner.prompt, text, winner.latents, winner.latents, nothing,
            origin_w=winner.origin, origin_l=winner.origin, path_rows=own, path_w=path,
        )  # fmt: skip
    return Pair(
        number, f"{source} over the student's", winner.prompt, text, winner.latents, loser.latents,
        model.region_layout(mask), origin_w=winner.origin, origin_l=loser.origin,
        path_rows=own, path_w=path, path_l=loser.path,
    )  # fmt: skip


def taught_path(rollout: Rollout, rows: tuple[int, ...]) -> Trajectory:
    """The teacher's states at `rows`. Raises DataError where one was not kept."""
    held = {} if rollout.path is None else dict(zip(rollout.path_rows, rollout.path.states, strict=True))
    missing = [row for row in rows if row not in held]
    if missing:
        raise DataError(f"rollout {rollout.id} of the teacher holds no state at its step {missing[0]}; sample it again")
    return Trajectory(torch.stack([held[row] for row in rows]))


def _unusable(pair: Pair) -> str | None:
    assert pair.path_w is not None
    finite = all(x.isfinite().all() for x in (pair.winner, pair.path_w.states))
    return None if finite else "a state of its path is not finite; try model.dtype=fp32"
