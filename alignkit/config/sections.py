"""The sections of a configuration that concern models, data, training and evaluation."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_blank(value: Any) -> Any:
    if value == "" or "\0" in str(value):
        raise ValueError("is no path")
    return value


def _expanded(path: Path) -> Path:
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


def plain_number(value: Any) -> Any:
    """Raises ValueError for what would be taken for a number, and is none as people write them."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str) and not re.fullmatch(
        r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.ASCII | re.IGNORECASE
    ):
        raise ValueError("should be a number")
    return value


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]} stands there twice")
    return values


Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]
Number = Annotated[float, BeforeValidator(plain_number)]
"""YAML 1.1 takes 1e-4 for a text, so texts of numbers are taken."""
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[Number, Field(ge=0.0, lt=1.0)]
Flag = Annotated[bool, Field(strict=True)]
EachOnce = AfterValidator(_each_once)
"""Of a list: what stands there twice would be counted, or merged, twice."""
NonNegative = Annotated[Number, Field(ge=0.0)]
Place = Annotated[Path, BeforeValidator(_no_blank), AfterValidator(_expanded)]
"""A file or folder: with ~ expanded, and absolute, so that it means the same wherever it is read."""
Family = Literal["wan", "cogvideox"]
"""Known to `alignkit.models`, which this module cannot ask without loading diffusers."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class ModelSection(Section):
    """Which base model is aligned."""

    family: Family = Field("wan", description="wan: Wan2.1, Wan2.2's A14B; cogvideox: CogVideoX, 2B and 5B")
    path: str = Field("tiny", description="a diffusers folder, a hub id, or 'tiny' for the shipped small model")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: the hub's main branch")
    variant: str | None = Field(
        None,
        description="of weight files: fp16 for diffusion_pytorch_model.fp16.safetensors, in parts that have it; "
        "null: the plain ones",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network; auto: bf16 on a GPU that multiplies it, else fp32"
    )
    attention: Literal["auto", "flash_3", "flash", "cudnn", "native_flash", "xformers", "native"] = Field(
        "auto",
        description="kernel of the network's attention; auto: the first of these that runs here, on a CPU native; a "
        "named one that does not run is an error",
    )
    lora: Annotated[tuple[Place, ...], EachOnce] = Field(
        (), description="LoRA folders to merge into the weights, in this order"
    )
    expert: Literal["high", "low"] | None = Field(
        None,
        description="of Wan2.2's A14B, which has two: the one that is trained, and that lora is of; high: at noise "
        "from the model's boundary on; low: below; null: of a model with one network",
    )
    guidance_scale_2: NonNegative | None = Field(
        None, description="of the low expert, wherever another guidance_scale is above 1; null: that one too"
    )
    max_sequence_length: Positive = Field(512, description="text tokens that the network attends to, padding included")
    vae_tiling: Flag = Field(
        False,
        description="videos are encoded and decoded in tiles of 256 pixels that overlap: less memory; the VAE's "
        "normalisation and attention see one tile at a time, so latents are others",
    )

    @model_validator(mode="after")
    def _two_scales_of_two(self) -> "ModelSection":
        if self.guidance_scale_2 is not None and self.expert is None:
            raise ValueError("guidance_scale_2: is the low expert's, of a model with two; set model.expert too")
        return self


class DataSection(Section):
    """Real videos, which become the winners; or pairs of videos that are ranked already."""

    videos: Place | None = Field(None, description="folder of videos with captions; null: none, or data.pairs")
    pairs: Place | None = Field(
        None, description="instead: JSONL, CSV or parquet with prompt, chosen, rejected; null: none"
    )
    prompts: Place | None = Field(
        None, description="of alignkit rollout: .txt, a prompt a line, or a captions file; null: none"
    )
    rollouts: Place | None = Field(
        None, description="folder of rollouts that data.pairs names by their numbers; null: none"
    )
    heldout_pairs: Place | None = Field(
        None, description="as data.pairs, to evaluate on; null: a share data.heldout of data.pairs"
    )
    captions: Place | None = Field(
        None, description="captions file, .jsonl or .csv; null: it, or a .txt a video, lies in data.videos"
    )
    height: Positive = Field(
        480, description="pixels: videos are scaled to cover it and cropped; what the model takes is checked"
    )
    width: Positive = Field(832, description="pixels, as height")
    num_frames: Positive = Field(
        81, description="frames of a video; shorter videos are passed over; 4n + 1 for both families"
    )
    fps: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="resample to this many frames a second; null: as filmed"
    )
    heldout: Annotated[Number, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="share of the clips, or of the prompts of rollouts, kept for evaluation"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSection":
        if self.videos and self.pairs:
            raise ValueError("set data.videos or data.pairs, not both")
        if self.heldout_pairs and not self.pairs:
            raise ValueError("data.heldout_pairs: needs data.pairs beside it")
        if self.rollouts and not self.pairs:
            raise ValueError("data.rollouts: needs data.pairs beside it, which says which rollout is better")
        if self.rollouts and self.heldout_pairs:
            raise ValueError("data.heldout_pairs: with data.rollouts a share data.heldout of the prompts is held out")
        return self


class MaskSection(Section):
    """Random closed regions (arXiv 2601.04068): see alignkit.localdpo.masks."""

    files: Place | None = Field(None, description="folder of your own masks by video name; null: random ones")
    shape: Literal["bezier", "rectangle"] = Field(
        "bezier", description="of a blob; a rectangle is as large as a closed Bézier curve is on average"
    )
    blobs: tuple[Positive, Positive] = Field((1, 5), description="the least and the most blobs of a mask")
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


HANDLING = {"folder", "previews", "context_parallel"}
"""Of `pairs` and `rollout`, what says where and by whom they are made, and not which they are."""


class PairsSection(Section):
    """How losers are made from winners."""

    folder: Place | None = Field(None, description="where the pairs are, to be shared by runs; null: output.dir/pairs")
    seed: Seed = Field(0, description="of masks, strengths and noise, and of which clips are held out")
    per_clip: Positive = Field(1, description="pairs made from each clip, with different masks and noise")
    num_inference_steps: Positive = Field(50, description="steps of the schedule on which regions are redone")
    strengths: tuple[Positive, ...] = Field(
        (38, 40, 42, 45), description="how many of the last steps are redone; each pair draws one"
    )
    guidance_scale: NonNegative = Field(
        6.0, description="of the base model that redoes regions; 1 and below: no guidance"
    )
    dynamic_guidance: Flag = Field(False, description="CogVideoX's use_dynamic_cfg")
    prompt_prefix: str = Field(
        "", description="put before each caption where regions are redone; training sees the plain one"
    )
    negative_prompt: str = Field(
        "", description="what guidance leads away from where regions are redone, and in training with noise.guided"
    )
    block_size: Positive = Field(32, description="pairs in one file: the unit that is made, stored and resumed whole")
    batch_size: Positive = Field(1, description="videos corrupted at once")
    context_parallel: Positive = Field(
        1,
        description="processes that share the tokens of each video that a pair is made of (Ulysses); an online stage "
        "makes its pairs on one",
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="of stored latents and text; auto: fp16, or fp32 where the network runs in it or noise.source "
        "solves for noise",
    )
    previews: Count = Field(4, description="pairs of each split shown as pictures")
    mask: MaskSection = Field(MaskSection(), description="which regions are redone")

    @model_validator(mode="after")
    def _strengths_fit(self) -> "PairsSection":
        if self.strengths == () or max(self.strengths) > self.num_inference_steps:
            raise ValueError(f"strengths must lie between 1 and num_inference_steps ({self.num_inference_steps})")
        return self


class LoraSection(Section):
    """Low-rank adapters instead of all weights; the published recipe's values (arXiv 2601.04068)."""

    rank: Positive = Field(64, description="of each adapter")
    alpha: Positive = Field(128, description="an adapter adds alpha / rank times its product")
    targets: Annotated[tuple[Annotated[str, Field(pattern=r"\S")], ...], EachOnce] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="ends of the names of the linear layers that get one",
    )


class TrainSection(Section):
    """Optimisation. Pair order, noise and timesteps are functions of (seed, epoch, pair id) alone."""

    seed: Seed = Field(0, description="of pair order, noise, timesteps, caption dropout and new adapters")
    steps: Positive = Field(500, description="optimizer steps in all; of a chain, in each stage")
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit"] = Field(
        "adamw",
        description="its two moments in fp32, in bf16 or in 8 bits (bitsandbytes, `alignkit[8bit]`): 8, 4 or 2 bytes a "
        "parameter; the masters stay fp32",
    )
    learning_rate: NonNegative = Field(1e-6, description="of AdamW, after the warm-up")
    warmup_steps: Count = Field(0, description="steps over which the learning rate rises evenly; 0: none")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate after that; cosine: down to min_learning_rate at the last step"
    )
    min_learning_rate: NonNegative = Field(0.0, description="at the end of schedule cosine")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="AdamW's decay of its first and second moments")
    weight_decay: NonNegative = Field(1e-3, description="AdamW's, of everything that is trained")
    max_grad_norm: Annotated[Number, Field(gt=0)] = Field(
        1.0, description="norm, over all weights, to which a larger gradient is scaled"
    )
    global_batch_size: Positive = Field(128, description="pairs per step, over all processes")
    micro_batch_size: Positive = Field(
        1,
        description="pairs per forward on one process; times the processes, or their groups of context_parallel, it "
        "must divide global_batch_size",
    )
    context_parallel: Positive = Field(
        1, description="processes that share the tokens of the same videos (Ulysses): so much less of activations each"
    )
    checkpointing: Literal["full", "selective", "none"] = Field(
        "full", description="what the backward pass computes again: every layer; all of it but attention; nothing"
    )
    branches: Literal["together", "apart"] = Field(
        "together", description="winners and losers in one forward; or in turn: half the activations, a forward more"
    )
    compile: Flag = Field(False, description="torch.compile of the repeated block; ZeRO-3's hooks break its graph")
    caption_dropout: Fraction = Field(0.0, description="share of pairs shown with the empty prompt, on both sides")
    checkpoint_every: Positive = Field(
        100, description="steps from one checkpoint to the next; the last step is saved too"
    )
    checkpoint_minutes: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="save too when the last save is so many minutes ago; null: by steps alone"
    )
    keep_checkpoints: Positive = Field(2, description="the newest so many stay, older ones are removed")
    restart: Flag = Field(False, description="start over where checkpoints exist and none is whole")
    reshape: Flag = Field(False, description="convert a checkpoint of another number of processes (--reshape)")
    accept: tuple[str, ...] = Field((), description="settings that may differ from the checkpoint's, by name")
    validate_every: Positive | None = Field(
        None, description="steps from one look at the held-out pairs to the next, the first before any; null: none"
    )
    validate_samples: Count = Field(4, description="videos sampled at each look, from the same noise every time")
    max_winner_error: NonNegative | None = Field(
        None,
        description="end the run when a look finds the winner's error above where the run began by more than this "
        "share of it; null: never",
    )
    lora: LoraSection | None = Field(None, description="train adapters, {} for the defaults; null: every weight")
    ema: Annotated[Number, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="decay of an average of what is trained, e.g. 0.999, exported beside it; null: none"
    )
    max_bad_steps: Positive = Field(5, description="non-finite steps in a row after which the run stops")
    stuck_seconds: Annotated[Number, Field(gt=0)] = Field(
        300.0,
        description="of silence, or in one part of a step and beyond ten times the slowest one, that end the run; "
        "loading, saving and exporting have twelve times as long",
    )

    @model_validator(mode="after")
    def _rates_fit(self) -> "TrainSection":
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError("min_learning_rate: is where schedule cosine ends; set schedule: cosine, or leave it out")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate: {self.min_learning_rate:g} is above learning_rate")
        return self

    @model_validator(mode="after")
    def _moments_that_move(self) -> "TrainSection":
        # a bf16 number moves if it is to change by more than 1/256 of itself, whatever it is
        if self.optimizer == "adamw_bf16" and 1 - max(self.betas) <= 2**-8:
            raise ValueError(
                f"betas: {max(self.betas):g} is too slow for optimizer 'adamw_bf16', whose moments are rounded to 8 "
                "bits; 0.996 or less, or another optimizer"
            )
        return self

    @model_validator(mode="after")
    def _looked_at(self) -> "TrainSection":
        if self.max_winner_error is not None and self.validate_every is None:
            raise ValueError("max_winner_error: is what looks at held-out pairs find; set validate_every too")
        return self

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if isinstance(given, dict) and "gradient_checkpointing" in given:
            raise ValueError("gradient_checkpointing is train.checkpointing now: full for true, none for false")
        return given

    @model_validator(mode="after")
    def _compiled_or_selective(self) -> "TrainSection":
        if self.compile and self.checkpointing == "selective":
            raise ValueError("checkpointing: torch compiles nothing under 'selective'; with train.compile use another")
        return self


OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "what train.global_batch_size leaves for a process",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "model.dtype, bf16 or fp32",
    "sequence_parallel_size": "train.context_parallel",
}
"""Keys of DeepSpeed's that are set by others of a configuration."""


def _numbers(value: Any) -> Any:
    """5e8, which YAML 1.1 takes for a text, is a number in DeepSpeed's JSON."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


class DeepSpeedSection(Section):
    """ZeRO stage and anything else of DeepSpeed's own JSON, passed through untouched."""

    preset: Literal["auto", "zero2", "zero3", "zero3-offload"] = Field(
        "zero3",
        description="zero2: optimizer and gradients are shared out; zero3: weights too; zero3-offload: and kept "
        "in main memory; auto: the first of these that fits by the plan's numbers, chosen when a run begins and kept",
    )
    config: Annotated[dict[str, Any], AfterValidator(_numbers)] = Field(
        default_factory=dict, description="any keys of DeepSpeed's JSON, over what the preset and train say"
    )

    @model_validator(mode="after")
    def _only_what_is_not_ours(self) -> "DeepSpeedSection":
        for key, value in self.config.items():
            if key in OURS:
                raise ValueError(f"config: {key}: this is {OURS[key]}")
            if key in ("zero_optimization", "bf16", "data_types") and not isinstance(value, dict):
                raise ValueError(f"config: {key}: should be a section of keys, got {value!r}")
        return self


class SampleSection(Section):
    """How `alignkit sample` samples held-out prompts, and rollouts where `rollout` does not say otherwise."""

    num_inference_steps: Positive = Field(
        50, description="steps of the model's sampler; also of the schedule that evaluation.positions are on"
    )
    guidance_scale: NonNegative = Field(5.0, description="classifier-free guidance; 1 and below: none")
    dynamic_guidance: Flag = Field(False, description="CogVideoX's use_dynamic_cfg")
    negative_prompt: str = Field("", description="what guidance leads away from")
    count: Positive = Field(64, description="videos sampled per seed and model, from held-out prompts")
    seeds: Annotated[tuple[Seed, ...], EachOnce] = Field(
        (0,), min_length=1, description="of starting noise; every prompt is sampled once with each, by both models"
    )
    batch_size: Positive = Field(1, description="videos sampled at once")
    weights: Literal["trained", "ema"] = Field(
        "trained",
        description="which of a run's exports `sample` and `eval` take; ema: the average that train.ema makes",
    )


class EvaluationSection(Section):
    """How `alignkit eval` scores held-out pairs: with fixed noise, at fixed points of the inference schedule."""

    seed: Seed = Field(0, description="of the noise that pairs are scored with")
    positions: Annotated[tuple[BelowOne, ...], EachOnce] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="points of the schedule as shares of its steps; 0: pure noise",
    )
    draws: Positive = Field(1, description="noises per pair and position")
    batch_size: Positive = Field(16, description="pairs scored, and clips sent through the VAE, at once")


class OutputSection(Section):
    """Where a run lives."""

    dir: Place = Field(description="the run's folder: all that is made goes there; the same for every command of a run")
