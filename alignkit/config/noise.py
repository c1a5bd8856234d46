"""At which states pairs are compared, what videos are sampled for training, and the model compared with."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from alignkit.config.sections import BelowOne, Count, Flag, NonNegative, Number, Place, Positive, Section, Seed

HIGH_NOISE = (0.75, 0.95)
"""t ∈ [750, 950] of 1000, which nearly matches the whole range in LPO's ablation (arXiv 2502.01051)."""

SOURCES = ("shared", "initial", "path", "inversion")
READERS: dict[str, tuple[str, ...]] = {"path_between": ("path", "inversion"), "guided": ("initial", "path")}
"""By key of `noise`: the sources that it changes, where not all. What only says how states are stored may stand beside
any source, so that one override compares the sources."""


def _interval(value: Any) -> Any:
    if value is None or value == "high_noise":
        return value
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1 for x in numbers):
        raise ValueError("should be [low, high] between 0 and 1, or high_noise")
    return tuple(map(float, numbers))


class NoiseSection(Section):
    """At which states the pair is compared (what is drawn is keyed by pair and epoch); see docs/apo.md."""

    source: Literal[*SOURCES] = Field(  # type: ignore[valid-type]
        "shared",
        description="shared: one fresh noise for both sides; initial: what each side was sampled from; path: states "
        "that its sampler visited; inversion: states that lead to it",
    )
    timesteps: Literal["logit_normal", "uniform", "schedule", "adaptive"] = Field(
        "logit_normal",
        description="logit_normal: the sigmoid of a normal on the model's path; uniform: evenly on it; schedule: the "
        "sampler's own steps; adaptive: among them, more often those that teach more",
    )
    interval: Annotated[tuple[float, float] | Literal["high_noise"] | None, BeforeValidator(_interval)] = Field(
        None,
        description="[low, high] of the network's timesteps as shares of its range, 1 is "
        "noise; high_noise: [0.75, 0.95]; null: all",
    )
    path_steps: Positive = Field(4, description="states stored of each video, at steps drawn for its prompt")
    path_between: Flag = Field(False, description="store the states after them too, and train in between")
    anchor: Literal["inversion", "shared"] = Field(
        "inversion", description="for a real video beside a sampled one: its inversion, or the pair's fresh noise"
    )
    guided: Flag = Field(False, description="train the guided prediction instead of the conditional one")
    inversion_guidance: NonNegative = Field(
        1.0, description="of inversions; above 1 they drift: what is undone is amplified"
    )
    max_inversion_error: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="relative round-trip error of an inversion above which its pair is flagged and counted; null: none",
    )

    @model_validator(mode="after")
    def _interval_rises(self) -> "NoiseSection":
        if isinstance(self.interval, tuple) and not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must rise, got [{self.interval[0]:g}, {self.interval[1]:g}]")
        return self

    @model_validator(mode="after")
    def _keys_are_read(self) -> "NoiseSection":
        for key, readers in READERS.items():
            if getattr(self, key) and self.source not in readers:
                raise ValueError(
                    f"{key} is not read by the source {self.source!r}, only by {', '.join(readers)}; leave it out"
                )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """`interval` as numbers."""
        if isinstance(self.interval, tuple):
            return self.interval
        return (0.0, 1.0) if self.interval is None else HIGH_NOISE

    @property
    def stores_states(self) -> bool:
        """Whether rollouts keep states of their paths for this source."""
        return self.source == "path"

    def inverts(self, kind: str, beside: str) -> bool:
        """Whether this source wants the inversion of a side whose origin is `kind`, beside one of the kind `beside`."""
        if self.source == "inversion":
            return True
        anchored = kind == "real" and beside == "rollout"
        return self.source != "shared" and self.anchor == "inversion" and anchored


class RolloutSection(Section):
    """Videos sampled for training, `alignkit rollout`; null: as in `sample`."""

    folder: Place | None = Field(None, description="where they are, to be shared by runs; null: output.dir/rollouts")
    per_prompt: Positive = Field(4, description="videos sampled for each prompt, from different noise")
    seed: Seed = Field(0, description="of the noise that videos start from")
    round: Annotated[int, Field(ge=0, lt=2**31 - 1, strict=True)] = Field(
        0, description="which rollouts of these prompts: another number starts from other noise"
    )
    solver: Literal["model", "first_order"] = Field(
        "model", description="the model's own; or Euler (flow) and DDIM (v) on the same steps"
    )
    num_inference_steps: Positive | None = Field(None, description="steps of the sampler; null: as in sample")
    guidance_scale: NonNegative | None = Field(
        None, description="classifier-free guidance, 1 and below: none; null: as in sample"
    )
    dynamic_guidance: Flag | None = Field(None, description="CogVideoX's use_dynamic_cfg; null: as in sample")
    negative_prompt: str | None = Field(None, description="what guidance leads away from; null: as in sample")
    block_size: Positive = Field(8, description="videos in one file: the unit that is made and resumed whole")
    batch_size: Positive = Field(1, description="videos sampled at once; a smaller last batch is filled up")
    context_parallel: Positive = Field(
        1,
        description="processes that sample each video together, sharing its tokens (Ulysses); within training those of "
        "train.context_parallel do",
    )
    previews: Count = Field(4, description="videos written for people to look at")


@dataclass(frozen=True)
class Sampler:
    """How videos are sampled for training: `rollout`, with what it leaves open taken from `sample`."""

    solver: str
    num_steps: int
    guidance: float
    dynamic: bool
    negative_prompt: str


class ReferenceSection(Section):
    """The frozen model that the policy is compared with."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    strategy: Literal["auto", "copy", "adapter", "cached", "ema", "sync"] = Field(
        "auto",
        description="copy: a second model; adapter: the policy with its LoRA off; cached: errors that alignkit "
        "cache-reference computed; ema: a second model that follows it; sync: one set equal to it now and then; "
        "auto: adapter where there is one, else copy",
    )
    cache: Place | None = Field(None, description="folder of the cached errors; null: output.dir/reference")
    every: Positive = Field(1, description="with ema and sync: steps from one move of the reference to the next")
    decay: BelowOne = Field(0.99, description="with ema: what is kept at each move")
    from_: Literal["stage", "base"] = Field(
        "stage", alias="from", description="in a chain: what the stage starts from, or the model under all stages"
    )

    @model_validator(mode="after")
    def _keys_are_read(self) -> "ReferenceSection":
        readers = {"cache": ("cached",), "every": ("ema", "sync"), "decay": ("ema",), "from_": ("copy", "ema", "sync")}
        for key, names in readers.items():
            field = type(self).model_fields[key]
            if self.strategy not in names and getattr(self, key) != field.default:
                raise ValueError(
                    f"{field.alias or key} is not read by the strategy {self.strategy!r}, only by {', '.join(names)}; "
                    "leave it out"
                )
        return self
