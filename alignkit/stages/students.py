"""`distill` and `drift_correction`: a few-step student of the model as it is, and the same beside its teacher."""

import sys
from dataclasses import asdict
from pathlib import Path

from alignkit.apo.students import build_taught, teacher_config, teacher_rows
from alignkit.config import Config, ModelSection, OnlineSection
from alignkit.errors import ConfigError, DataError
from alignkit.models import load_model
from alignkit.objectives.laws import Law, start_law
from alignkit.objectives.states.checks import sampler_terms
from alignkit.stages.online import prompts_of
from alignkit.stages.rounds import ID_STRIDE, Made, Rounds, rollouts_of_round, sample_through
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.distributed import on_main
from alignkit.training.masters import MASTERS
from alignkit.training.references.copy import release_network, second_network
from alignkit.training.run import Run
from alignkit.training.teacher import Teacher
from alignkit.training.terms import difference
from alignkit.training.weights import open_start


class Distillation(Rounds):
    """One round, of the teacher's own rollouts: those of the weights that the stage starts from, with its states at the
    student's steps."""

    def __init__(self, config: Config, prompts: list[str], start: str):
        self._teacher = teacher_config(config)
        config = config.model_copy(update={"online": OnlineSection(prompts=config.online.prompts)})
        given = {"teacher": asdict(self._teacher.sampler), "steps": config.student.num_inference_steps}
        super().__init__(config, prompts, start, given, unread=("student", "ranker"))
        self.every = sys.maxsize
        self._rows = _rows_of(config)

    def refresh(self, run: Run, number: int) -> dict[str, float]:
        numbers = super().refresh(run, number)
        run.distils = True
        return {"pairs": numbers["online/pairs"]}

    def check(self, run: Run, store: PairStore) -> None:
        """Pairs of another sampler than the run's, and checked where they are built."""

    def sample(self, config: Config, run: Run, prompts: list[str], number: int) -> RolloutStore:
        sampled = config.model_copy(update={"rollout": self._teacher.rollout})
        return sample_through(run.policy, sampled, run, prompts, config.data.rollouts, self.terms["rounds"], self._rows)

    def rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> Made:
        count = build_taught(config, run.process.device, rollouts, self._rows, None, 0, self._teacher.sampler)
        return Made(count, len(rollouts) - count, len(rollouts))


class Correction(Rounds):
    """Each round's rollouts are the student's, each beside its teacher's of the same noise, which wins.

    taught: the folder of the chain's distill stage, whose rollouts are the teacher's; start: the training folder of the
    stage before that one, None for the base. Without `taught` the teacher is the model `student.teacher`.
    """

    def __init__(self, config: Config, prompts: list[str], start: str, taught: Path | None, before: Path | None):
        self._teacher = teacher_config(config)
        if taught is None:
            self._teacher = self._teacher.model_copy(update={"model": _teacher_section(config)})
        self._early = int(config.student.high_noise_first * config.train.steps)  # steps, whatever train.steps is later
        given = {"teacher": asdict(self._teacher.sampler), "early": self._early}
        super().__init__(config, prompts, start, given, unread=("ranker",))
        self._rows, self._taught, self._before = _rows_of(config), taught, before
        self._laws: tuple[Law, ...] = ()

    def refresh(self, run: Run, number: int) -> dict[str, float]:
        student = self.config.student
        if not self._laws:
            self._laws = run.law, start_law(_at_high_noise(self.config, run.law), run.model)
            if student.weight:
                run.teacher = self._teacher_of(run)
        numbers = super().refresh(run, number)
        run.distils = not student.weight and number % (student.ratio + 1) == student.ratio
        run.few_step, run.law = True, self._laws[number < self._early and not run.distils]
        return numbers | {"distils": int(run.distils)}

    def check(self, run: Run, store: PairStore) -> None:
        """Pairs of two samplers, checked where they are built."""

    def sampled_by(self, number: int) -> Config:
        """Every round is of the noise that the teacher's rollouts are of."""
        return self.config

    def sample(self, config: Config, run: Run, prompts: list[str], number: int) -> RolloutStore:
        if self._taught is None:
            self._sample_teacher(run, prompts)
        on_main(run.process, self._teachers_rollouts)  # said before the student samples
        return super().sample(config, run, prompts, number)

    def rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> Made:
        teacher = self._teachers_rollouts()
        first, sampler = number * ID_STRIDE, self._teacher.sampler
        count = build_taught(config, run.process.device, teacher, self._rows, rollouts, first, sampler)
        return Made(count, len(rollouts) - count, len(rollouts))

    def _teachers_rollouts(self) -> RolloutStore:
        try:
            return RolloutStore(self._teacher_folder)
        except DataError as error:
            raise DataError(
                f"{self._teacher_folder}: the teacher's rollouts, beside which the student is put, cannot be read; put "
                f"the folder back, or start again in another output.dir ({error})"
            ) from None

    @property
    def _teacher_folder(self) -> Path:
        if self._taught is None:
            return self.config.output.dir / "teacher"
        return rollouts_of_round(self._taught, 0)

    def _sample_teacher(self, run: Run, prompts: list[str]) -> None:
        name, made = on_main(run.process, self._name_and_whether_made)
        if made:
            return
        teacher = self._teacher_of(run)
        try:
            sample_through(teacher.network, self._teacher, run, prompts, self._teacher_folder, name, self._rows)
        finally:
            if run.teacher is None:
                release_network(teacher.network)

    def _name_and_whether_made(self) -> tuple[str, bool]:
        """The fingerprint of a teacher from elsewhere, which reads all of its weights, and whether its rollouts are
        there. Raises DataError where they are another teacher's, or sampled otherwise."""
        model = load_model(self._teacher.model, with_transformer=False, with_encoders=False)
        name = model.fingerprint()
        try:
            info = RolloutStore(self._teacher_folder).info
        except DataError:
            return name, False
        rollout = self._teacher.rollout
        wanted = sampler_terms(self._teacher, model) | {
            "network": name,
            **{key: getattr(rollout, key) for key in ("per_prompt", "seed", "round")},
            "states": {"source": "path", "rows": list(self._rows), "path_between": False},
        }
        changed = difference({key: info.made.get(key, info.model) for key in wanted}, wanted)
        if changed:
            raise DataError(
                f"{self._teacher_folder}: its rollouts were sampled with {changed}; put it back, or delete that "
                "folder and the rounds beside it"
            )
        return name, True

    def _teacher_of(self, run: Run) -> Teacher:
        """The run's, or one to be released by who asked; every process calls this."""
        if run.teacher is not None:
            return run.teacher
        config, student = self.config, self.config.student
        if self._taught is None:
            train = config.train.model_copy(update={"lora": None})
            config = config.model_copy(update={"model": self._teacher.model, "train": train})
        model = load_model(config.model, with_transformer=False, with_encoders=False)
        start = open_start(config, model, self._before / MASTERS if self._before else None)
        network = second_network(config, run.process, model, start)
        return Teacher(model, network, self._teacher.sampler, self._rows, student.weight)


def _teacher_section(config: Config) -> ModelSection:
    """Of a teacher from elsewhere."""
    return config.model.model_copy(update={"path": config.student.teacher, "revision": None, "lora": ()})


def distillation_of(config: Config, start: str) -> Distillation:
    """Raises ConfigError for a teacher whose steps are not the student's too, or that is not the stage's start, and
    DataError for prompts or videos that cannot be used."""
    if config.student.teacher is not None:
        raise ConfigError("stage distill: student.teacher: is what the stage starts from, model.path; leave it out")
    return Distillation(config, _prompts("distill", config), start)


def correction_of(config: Config, start: str, taught: Config | None, before: Path | None) -> Correction:
    """taught: of the chain's distill stage; start: the digest of what this one starts from; before: as of `Correction`.

    Raises ConfigError for a teacher that is not there, whose steps are not the student's too or that is another kind of
    model, and for settings under which the student's rollouts are not those of the teacher's noise; DataError for
    prompts or videos that cannot be used.
    """
    where = "stage drift_correction"
    prompts = _prompts("drift_correction", config)
    if taught is None and config.student.teacher is None:
        raise ConfigError(f"{where}: student.teacher: not set, and no stage before this one is distill")
    if taught is None:
        _check_teacher(config)
        return Correction(config, prompts, start, None, before)
    if config.student.teacher is not None:
        raise ConfigError(f"{where}: student.teacher: is the one of the chain's distill; leave it out")
    alike = {"rollout": ("per_prompt", "seed", "round"), "student": ("num_inference_steps", "teacher_steps")}
    for section, keys in alike.items():
        for key in keys:
            own, theirs = (getattr(getattr(stage, section), key) for stage in (config, taught))
            if own != theirs:
                raise ConfigError(
                    f"{where}: {section}.{key}: {own}, and {theirs} in the stage distill; the student stands beside "
                    "what its teacher made there, so they must be the same"
                )
    known = _prompts("distill", taught)
    if prompts != known[: len(prompts)]:
        raise ConfigError(
            f"{where}: online.prompts: its {len(prompts)} prompts are not the first ones of the {len(known)} of the "
            "stage distill, whose rollouts the student stands beside"
        )
    return Correction(config, prompts, start, taught.output.dir, before)


def _check_teacher(config: Config) -> None:
    """Of a teacher from elsewhere; the VAE's files are read."""
    student, teacher = (
        load_model(section, with_transformer=False, with_encoders=False)
        for section in (config.model, _teacher_section(config))
    )
    steps = teacher_config(config).sampler.num_steps
    differs = {
        "schedule": teacher.schedule(steps).fingerprint != student.schedule(steps).fingerprint,
        "VAE": teacher.fingerprint("vae") != student.fingerprint("vae"),
    }
    for part, other in differs.items():
        if other:
            raise ConfigError(
                f"stage drift_correction: student.teacher: {config.student.teacher} has another {part} than the "
                f"student, {config.model.path}"
            )


def _prompts(name: str, config: Config) -> list[str]:
    """The first `online.prompts` of them: each round's rollouts stand beside the same ones of the teacher."""
    return prompts_of(name, config)[: config.online.prompts]


def _rows_of(config: Config) -> tuple[int, ...]:
    return teacher_rows(config, load_model(config.model, with_transformer=False, with_encoders=False))


def _at_high_noise(config: Config, law: Law) -> Config:
    """The noisier half of the student's steps alone."""
    last = (len(law.schedule) + 1) // 2 - 1
    low = law.schedule.timesteps[last].item() / law.model.scheduler.config.num_train_timesteps
    return config.model_copy(update={"noise": config.noise.model_copy(update={"interval": (low, 1.0)})})
