"""The one configuration of a run: nested sections read from YAML, with ``section.key=value`` overrides.

Every section refuses unknown keys and wrong types before any model is loaded, in one line that names
the file and the key. `load_config` is the only way in; commands get a frozen `Config`.
"""

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alignkit.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Family = Literal["wan", "cogvideox"]
"""Known to `alignkit.models`, which this module cannot ask without loading diffusers."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which base model is aligned."""

    family: Family = "wan"
    path: str = Field("tiny", description="a diffusers folder, a hub id, or 'tiny' for the shipped small model")
    revision: str | None = None
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    attention: Literal["auto", "flash_3", "flash", "cudnn", "native_flash", "xformers", "native"] = Field(
        "auto", description="auto: the best that runs here; a named one that does not is an error"
    )
    lora: tuple[Path, ...] = Field((), description="LoRA folders to merge into the weights, in this order")
    max_sequence_length: Positive = Field(512, description="text tokens that the network attends to, padding included")


class DataSection(Section):
    """Real videos, which become the winners; or pairs of videos that are ranked already."""

    videos: Path | None = Field(None, description="folder of videos with captions")
    pairs: Path | None = Field(None, description="instead: JSONL, CSV or parquet with prompt, chosen, rejected")
    heldout_pairs: Path | None = Field(None, description="the same to evaluate on; null: a share of data.pairs")
    captions: Path | None = Field(None, description="captions file, if it does not lie in the folder")
    height: Positive = 480
    width: Positive = 832
    num_frames: Positive = 81
    fps: Annotated[float, Field(gt=0)] | None = Field(None, description="resample to this rate; null: as filmed")
    heldout: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="share of the clips kept for evaluation")

    @model_validator(mode="after")
    def _one_source(self) -> "DataSection":
        if self.videos and self.pairs:
            raise ValueError("set data.videos or data.pairs, not both")
        if self.heldout_pairs and not self.pairs:
            raise ValueError("data.heldout_pairs: needs data.pairs beside it")
        return self


class MaskSection(Section):
    """Random closed regions (arXiv 2601.04068): see alignkit.localdpo.masks."""

    files: Path | None = Field(None, description="folder of your own masks by video name, instead of random ones")
    shape: Literal["bezier", "rectangle"] = "bezier"
    blobs: tuple[Positive, Positive] = (1, 5)
    moving: Fraction = Field(0.5, description="probability that a blob moves; 0: the first frame's mask for all")
    window: Fraction = Field(0.0, description="probability that the mask holds for a random run of frames only")
    area: tuple[Fraction, Fraction] = Field((0.0, 1.0), description="masks of another share of the volume are redrawn")

    @model_validator(mode="after")
    def _files_stand_alone(self) -> "MaskSection":
        if self.files is not None:
            for key, field in type(self).model_fields.items():
                if key != "files" and getattr(self, key) != field.default:
                    raise ValueError(f"mask.{key} is not read where mask.files brings the masks; leave it out")
        return self

    @model_validator(mode="after")
    def _ranges_rise(self) -> "MaskSection":
        for name in ("blobs", "area"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must rise, got [{low:g}, {high:g}]")
        return self


class PairsSection(Section):
    """How losers are made from winners."""

    folder: Path | None = Field(None, description="where the pairs are, to be shared by runs; null: output.dir/pairs")
    seed: Annotated[int, Field(ge=0)] = 0
    per_clip: Positive = Field(1, description="pairs made from each clip, with different masks and noise")
    num_inference_steps: Positive = 50
    strengths: tuple[Positive, ...] = Field((38, 40, 42, 45), description="how many of the last steps are redone")
    guidance_scale: NonNegative = 6.0
    dynamic_guidance: bool = Field(False, description="CogVideoX's use_dynamic_cfg")
    prompt_prefix: str = ""
    negative_prompt: str = ""
    block_size: Positive = Field(32, description="pairs in one file: the unit that is made, stored and resumed whole")
    batch_size: Positive = Field(1, description="videos corrupted at once")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of stored latents and text; auto: fp16, or fp32 where the network runs in it"
    )
    previews: Annotated[int, Field(ge=0)] = Field(4, description="pairs of each split shown as pictures")
    mask: MaskSection = MaskSection()

    @model_validator(mode="after")
    def _strengths_fit(self) -> "PairsSection":
        if self.strengths == () or max(self.strengths) > self.num_inference_steps:
            raise ValueError(f"strengths must lie between 1 and num_inference_steps ({self.num_inference_steps})")
        return self


class NoiseSection(Section):
    """At which states the pair is compared (the noise itself is keyed by pair and epoch)."""

    source: Literal["shared"] = "shared"
    timesteps: Literal["logit_normal", "uniform", "schedule"] = "logit_normal"


_PREFERENCE = {"beta": 5000.0, "beta_min": 50.0, "beta_max": 5000.0, "loser_safeguard": None, "weight_sft": 0.0}
_SMOOTHED = _PREFERENCE | {"label_smoothing": 0.0}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "local_dpo": _PREFERENCE
    | {"weight_sft": 0.1, "weight_region": 1.0, "weight_global": 1.0, "weight_region_sft": 0.0}
    | {"strength_range": (0.75, 0.90)},
    "dpo": _SMOOTHED,
    "robust_dpo": _SMOOTHED,
    "poly_dpo": _PREFERENCE | {"poly_alpha": 1.0},
    "winner_guarded": _PREFERENCE | {"guard_weight": 1.0, "guard_exponent": 2.0},
    "ipo": _PREFERENCE,
    "hinge": _PREFERENCE,
    "region_dpo": _SMOOTHED,
    "sft": {},
}
"""Every objective: the keys of `objective` that it reads, each with the value it has there unless it is set. What it
computes is the function of its name in `alignkit.objectives.heads`."""


def _beta(value: Any) -> float | str:
    try:
        beta = value if value == "auto" else float(math.nan if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        beta = math.nan
    if beta != "auto" and not 0 < beta < math.inf:
        raise ValueError("should be a number greater than 0, or auto")
    return beta


class ObjectiveSection(Section):
    """The loss; see docs/losses.md for the objectives, what each key does and how betas convert.

    A default that differs between objectives is that of OBJECTIVES.
    """

    name: Literal[*OBJECTIVES] = "local_dpo"  # type: ignore[valid-type]
    beta: Annotated[float | Literal["auto"], BeforeValidator(_beta)] = Field(5000.0, description="a number, or auto")
    beta_min: Annotated[float, Field(gt=0)] = Field(50.0, description="with beta: auto, the lowest it may get")
    beta_max: Annotated[float, Field(gt=0)] = Field(5000.0, description="the highest, and what it starts from")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(0.0, description="share of swapped labels")
    loser_safeguard: Fraction | None = Field(
        None, description="μ: holds the loser's gradient back where it would raise the winner's error; null: off"
    )
    poly_alpha: Annotated[float, Field(ge=-1)] = Field(1.0, description="α of Poly-DPO; 0 is plain dpo")
    guard_weight: NonNegative = Field(1.0, description="of the winner's error in the guard, times a power of a")
    guard_exponent: NonNegative = Field(2.0, description="that power; 0: the same guard at every noise level")
    strength_range: tuple[float, float] = (0.75, 0.90)
    weight_region: NonNegative = 1.0
    weight_global: NonNegative = 1.0
    weight_sft: NonNegative = Field(0.0, description="of the winner's own error; 0.1 for local_dpo, else 0")
    weight_region_sft: NonNegative = 0.0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, given: Any) -> Any:
        name = given.get("name", "local_dpo") if isinstance(given, dict) else None
        return OBJECTIVES[name] | given if isinstance(name, str) and name in OBJECTIVES else given

    @model_validator(mode="after")
    def _keys_are_read(self) -> "ObjectiveSection":
        """Defaults pass, even written out and of another objective: a dumped configuration holds every key."""
        for key, field in type(self).model_fields.items():
            defaults = [field.default, *(keys[key] for keys in OBJECTIVES.values() if key in keys)]
            if key != "name" and key not in OBJECTIVES[self.name] and getattr(self, key) not in defaults:
                readers = ", ".join(name for name, keys in OBJECTIVES.items() if key in keys)
                raise ValueError(f"{key} is not read by the objective {self.name!r}, only by {readers}; leave it out")
        return self

    @model_validator(mode="after")
    def _beta_has_a_range(self) -> "ObjectiveSection":
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min is {self.beta_min:g}, above beta_max, {self.beta_max:g}")
        for key in ("beta_min", "beta_max"):
            if self.beta != "auto" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is read with beta: auto alone; leave it out")
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "ObjectiveSection":
        names = "weight_region", "weight_global", "weight_sft", "weight_region_sft"
        if self.name == "local_dpo" and not any(getattr(self, name) for name in names):
            raise ValueError(f"{', '.join(names)} are all 0: there is nothing to train")
        return self

    @property
    def largest_beta(self) -> float:
        """β, or with `beta: auto` the highest that it may get."""
        return self.beta_max if self.beta == "auto" else self.beta


class ReferenceSection(Section):
    """The frozen model that the policy is compared with."""

    strategy: Literal["auto", "copy", "adapter"] = Field(
        "auto",
        description="copy: a second model; adapter: the policy with its LoRA off; auto: adapter where there is one",
    )


class LoraSection(Section):
    """Low-rank adapters instead of all weights; the published recipe's values (arXiv 2601.04068)."""

    rank: Positive = 64
    alpha: Positive = 128
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class TrainSection(Section):
    """Optimisation. Pair order, noise and timesteps are functions of (seed, epoch, pair id) alone."""

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Positive = 500
    learning_rate: NonNegative = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegative = 1e-3
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    global_batch_size: Positive = Field(128, description="pairs per step, over all processes")
    micro_batch_size: Positive = Field(1, description="pairs per forward on one process")
    gradient_checkpointing: bool = True
    compile: bool = Field(False, description="torch.compile of the repeated block; ZeRO-3's hooks break its graph")
    caption_dropout: Fraction = Field(0.0, description="share of pairs shown with the empty prompt, on both sides")
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    lora: LoraSection | None = Field(None, description="train adapters of this rank; null: every weight")
    max_bad_steps: Positive = Field(5, description="non-finite steps in a row after which the run stops")


class DeepSpeedSection(Section):
    """ZeRO stage and anything else of DeepSpeed's own JSON, passed through untouched."""

    preset: Literal["zero2", "zero3", "zero3-offload"] = "zero3"
    config: dict[str, Any] = Field(default_factory=dict)


class SampleSection(Section):
    num_inference_steps: Positive = 50
    guidance_scale: NonNegative = 5.0
    dynamic_guidance: bool = Field(False, description="CogVideoX's use_dynamic_cfg")
    negative_prompt: str = ""
    count: Positive = Field(64, description="videos sampled per seed and model, from held-out prompts")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    batch_size: Positive = 1


class EvaluationSection(Section):
    """Held-out pairs are scored with fixed keys at these points of the inference schedule (0: pure noise)."""

    seed: Annotated[int, Field(ge=0)] = 0
    positions: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1)
    draws: Positive = Field(1, description="noises per pair and position")
    batch_size: Positive = 16


class OutputSection(Section):
    dir: Path


class StageSection(Section):
    """One stage of a chain: its name, and what it changes of the sections around it."""

    name: Literal["localdpo", "sft"]
    noise: dict[str, Any] = Field(default_factory=dict)
    objective: dict[str, Any] = Field(default_factory=dict)
    reference: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    deepspeed: dict[str, Any] = Field(default_factory=dict)

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
    objective: ObjectiveSection = ObjectiveSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    sample: SampleSection = SampleSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection
    stages: tuple[StageSection, ...] | None = Field(
        None, min_length=1, description="trained one after the other, each from the weights of the one before"
    )

    @model_validator(mode="after")
    def _each_stage_once(self) -> "Config":
        names = [stage.name for stage in self.stages or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"stages: {twice!r} stands there twice; a stage's folder bears its name")
        return self

    @model_validator(mode="after")
    def _adapter_to_switch_off(self) -> "Config":
        if self.reference.strategy == "adapter" and self.train.lora is None:
            raise ValueError("reference.strategy: 'adapter' needs train.lora; without it use 'copy'")
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


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (YAML) and apply `overrides` ("train.steps=20"; values are YAML).

    Raises ConfigError for a missing or malformed file, an unknown key (with the nearest known one),
    a value of the wrong type or range.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'train:', got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from None


def changed(config: Config, changes: dict[str, dict], where: str) -> Config:
    """`config` with the keys of `changes` (by section) changed, checked as a whole; `where` begins a ConfigError.

    An objective of another name begins with its own defaults.
    """
    tree = config.model_dump(mode="json")
    objective = changes.get("objective", {})
    if objective.get("name", config.objective.name) != config.objective.name:
        tree["objective"] = {}
    if objective.get("beta", "auto") != "auto":  # its limits were for an automatic one
        tree["objective"] = {k: v for k, v in tree["objective"].items() if k not in ("beta_min", "beta_max")}
    tree = merged(tree, changes)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None


def shipped_config(name: str) -> Path:
    """Path of a configuration that comes with alignkit: `configs/`, which a link makes part of the package."""
    path = Path(__file__).parent / "configs" / name
    if not path.is_file():
        raise ConfigError(f"{path}: this configuration should come with alignkit but is missing; reinstall it")
    return path


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def merged(tree: dict, changes: dict) -> dict:
    both = {key for key, value in changes.items() if isinstance(value, dict) and isinstance(tree.get(key), dict)}
    return tree | {key: merged(tree[key], value) if key in both else value for key, value in changes.items()}


def _apply(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example train.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    for part in parts[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
        tree = child
    tree[parts[-1]] = value


def _describe(error: ValidationError) -> str:
    """The first problem as one line; unknown keys get the nearest known name."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}{more}"
    if problem["type"] == "missing":
        return f"{where}: missing; set it in the file or as {where}=...{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"valid dictionary or instance of \w+", "section of keys", message)
    message = (
        message.replace("valid tuple", "list").replace("Tuple", "List").replace("valid dictionary", "section of keys")
    )
    if not where:
        return message + more
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"  # else it names the keys itself
    return f"{where}: {message[0].lower()}{message[1:]}{got}{more}"


def _known_keys(location: tuple) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str):  # a number is a place in a list
            section = next(_sections_in(section.model_fields[part].annotation))
    return list(section.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
