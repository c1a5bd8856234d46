"""All sections together, and what must hold between them."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from alignkit.config.noise import NoiseSection, ReferenceSection, RolloutSection, Sampler
from alignkit.config.objective import OBJECTIVES, ObjectiveSection
from alignkit.config.online import OnlineSection
from alignkit.config.ranker import RankerSection
from alignkit.config.sections import (
    DataSection,
    DeepSpeedSection,
    EvaluationSection,
    ModelSection,
    OutputSection,
    PairsSection,
    SampleSection,
    Section,
    TrainSection,
)
from alignkit.config.student import StudentSection

WHOLE_SEQUENCES = "flash_3", "xformers"
"""Of `model.attention`: those around which diffusers cannot exchange tokens for heads, on any device."""
ACCEPTED = ("train", "objective", "noise", "reference")


Changes = Annotated[dict[str, Any], Field(default_factory=dict, description="keys of this section that differ here")]


class StageSection(Section):
    """One stage of a chain: its name, and what it changes of the sections around it. The name alone will do."""

    name: Literal["localdpo", "sft", "offline", "online", "half_online", "distill", "drift_correction"] = Field(
        description="what kind of stage; each stands once in a chain (docs/apo.md)"
    )
    data: Changes
    pairs: Changes
    rollout: Changes
    ranker: Changes
    online: Changes
    student: Changes
    noise: Changes
    objective: Changes
    reference: Changes
    train: Changes
    deepspeed: Changes

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


class Config(Section):
    """Everything a run depends on."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    pairs: PairsSection = PairsSection()
    noise: NoiseSection = NoiseSection()
    rollout: RolloutSection = RolloutSection()
    ranker: RankerSection = RankerSection()
    online: OnlineSection = OnlineSection()
    student: StudentSection = StudentSection()
    objective: ObjectiveSection = ObjectiveSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    sample: SampleSection = SampleSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection
    stages: tuple[StageSection, ...] | None = Field(
        None,
        min_length=1,
        description="trained one after the other, each from the weights of the one before; null: one run",
    )

    @property
    def sampler(self) -> Sampler:
        """How training's rollouts are sampled."""
        own, usual = self.rollout, self.sample

        def choose(name: str) -> Any:
            return getattr(usual if getattr(own, name) is None else own, name)

        names = ("num_inference_steps", "guidance_scale", "dynamic_guidance", "negative_prompt")
        return Sampler(own.solver, *(choose(name) for name in names))

    @property
    def few_step_sampler(self) -> Sampler | None:
        """How the student that the chain makes is sampled; None where it makes none."""
        made = [stage for stage in self.stages or () if stage.name in ("distill", "drift_correction")]
        if not made:
            return None
        section = self.student.model_copy(update=made[-1].student)
        return Sampler("first_order", section.num_inference_steps, 1.0, False, self.sample.negative_prompt)

    @property
    def usual_sampler(self) -> Sampler:
        """How every other model is sampled to be looked at: `sample`."""
        names = ("num_inference_steps", "guidance_scale", "dynamic_guidance", "negative_prompt")
        return Sampler("model", *(getattr(self.sample, name) for name in names))

    @model_validator(mode="after")
    def _each_stage_once(self) -> "Config":
        names = [stage.name for stage in self.stages or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"stages: {twice!r} stands there twice; a stage's folder bears its name")
        return self

    @model_validator(mode="after")
    def _accepted_are_settings(self) -> "Config":
        for name in self.train.accept:
            section, _, key = name.partition(".")
            known = section in ACCEPTED and key in type(getattr(self, section)).model_fields
            if name != "pairs" and (not known or name in ("train.lora", "train.optimizer")):
                raise ValueError(
                    f"train.accept: {name}: no setting that may change within a run; one of {', '.join(ACCEPTED)} with "
                    "its key, as train.learning_rate, or pairs"
                )
        return self

    @model_validator(mode="after")
    def _moments_beside_the_weights(self) -> "Config":
        if self.train.optimizer == "adamw_8bit" and self.deepspeed.preset == "zero3-offload":
            raise ValueError(
                "train.optimizer: 'adamw_8bit' is not for moments in main memory, deepspeed.preset 'zero3-offload'; "
                "use adamw or adamw_bf16 with it"
            )
        return self

    @model_validator(mode="after")
    def _base_that_stays(self) -> "Config":
        written = [os.path.realpath(self.output.dir / name) for name in ("export", "export-ema")]
        for key, places in (
            ("model.path", [self.model.path]),
            ("model.lora", self.model.lora),
            ("student.teacher", [self.student.teacher] if self.student.teacher else []),
        ):
            for place in places:
                path = os.path.expanduser(place)
                found = os.path.realpath(path)
                is_folder = path.startswith((".", "/")) or os.path.exists(found)  # else a hub's id
                if is_folder and any(Path(found).is_relative_to(folder) for folder in written):
                    raise ValueError(f"{key}: {place} is what this run replaces as it ends; choose another output.dir")
        return self

    @model_validator(mode="after")
    def _average_to_look_at(self) -> "Config":
        if self.sample.weights == "ema" and self.train.ema is None and not self.stages:
            raise ValueError("sample.weights: 'ema' needs train.ema, the decay of the average that a run exports")
        return self

    @model_validator(mode="after")
    def _adapter_to_switch_off(self) -> "Config":
        if self.reference.strategy == "adapter" and self.train.lora is None:
            raise ValueError("reference.strategy: 'adapter' needs train.lora; without it use 'copy'")
        return self

    @model_validator(mode="after")
    def _attention_shares_tokens(self) -> "Config":
        if self.model.attention in WHOLE_SEQUENCES:
            for name in ("train", "pairs", "rollout"):
                if getattr(self, name).context_parallel > 1:
                    raise ValueError(
                        f"model.attention: {self.model.attention!r} cannot share tokens among processes, which "
                        f"{name}.context_parallel asks for; leave it at auto"
                    )
        return self

    @model_validator(mode="after")
    def _network_to_share(self) -> "Config":
        inverted = self.noise.inverts("real", beside="rollout" if self.data.rollouts else "real")
        if self.pairs.context_parallel > 1 and self.data.pairs and not inverted:
            raise ValueError(
                "pairs.context_parallel: pairs of given videos are shown to no network unless they are inverted "
                "(noise.source or noise.anchor); leave it at 1"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_learns_from_pairs(self) -> "Config":
        if self.noise.timesteps == "adaptive":
            if self.reference.strategy == "cached":
                raise ValueError(
                    "noise.timesteps: 'adaptive' visits states that depend on the training itself, so "
                    "reference.strategy 'cached' cannot know them; use 'copy', or another law"
                )
            if "beta" not in OBJECTIVES[self.objective.name]:
                raise ValueError(f"noise.timesteps: 'adaptive' needs pairs compared; {self.objective.name!r} does not")
        return self

    @model_validator(mode="after")
    def _one_prediction_to_guide(self) -> "Config":
        if self.noise.guided:
            if self.train.caption_dropout:
                raise ValueError("noise.guided: with train.caption_dropout both branches would be the same; use one")
            if self.sampler.dynamic:
                raise ValueError("noise.guided: not with dynamic_guidance, which has another scale at every step")
            if self.sampler.guidance <= 1:
                raise ValueError(
                    f"noise.guided: a guidance_scale of {self.sampler.guidance:g} guides nothing; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _one_expert_at_hand(self) -> "Config":
        if self.model.expert is None:
            return self
        if self.train.validate_every is not None and self.train.validate_samples:
            raise ValueError(
                "train.validate_samples: a run holds one of two experts (model.expert), and samples need both; set it "
                "to 0, and use alignkit sample when it is over"
            )
        if self.noise.path_between:
            raise ValueError("noise.path_between: not with model.expert: between two steps another expert may begin")
        if self.noise.guided and self.model.guidance_scale_2 is not None:
            raise ValueError("noise.guided: has one scale, not with model.guidance_scale_2; leave one out")
        return self

    @model_validator(mode="after")
    def _masks_of_one_source(self) -> "Config":
        if self.data.pairs and self.pairs.mask.files:
            raise ValueError("pairs.mask.files: is for data.videos; with data.pairs give masks in its column 'mask'")
        return self

    @model_validator(mode="after")
    def _strengths_in_range(self) -> "Config":
        if self.data.pairs or self.stages or "strength_range" not in OBJECTIVES[self.objective.name]:
            return self
        low, high = self.objective.strength_range
        for k in self.pairs.strengths:
            alpha = k / self.pairs.num_inference_steps
            if not low <= alpha <= high:
                raise ValueError(
                    f"pairs.strengths: {k} of {self.pairs.num_inference_steps} steps is a strength of {alpha:g}, "
                    f"outside objective.strength_range [{low:g}, {high:g}]"
                )
        return self
