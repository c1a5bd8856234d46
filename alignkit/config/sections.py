"""The sections of a configuration that concern models, data, training and evaluation."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _expanded(path: Path) -> Path:
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool)]
"""YAML 1.1 takes 1e-4 for a text, so texts of numbers are taken."""
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[Number, Field(ge=0.0)]
Place = Annotated[Path, AfterValidator(_expanded)]
"""A file or folder: with ~ expanded, and absolute, so that it means the same wherever it is read."""
Family = Literal["wan", "cogvideox"]
"""Known to `alignkit.models`, which this module cannot ask without loading diffusers."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class ModelSection(Section):
    """Which base model is aligned."""

    family: Family = "wan"
    path: str = Field("tiny", description="a diffusers folder, a hub id, or 'tiny' for the shipped small model")
    revision: str | None = None
    variant: str | None = Field(None, description="of weight files: fp16 for diffusion_pytorch_model.fp16.safetensors")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    attention: Literal["auto", "flash_3", "flash", "cudnn", "native_flash", "xformers", "native"] = Field(
        "auto", description="auto: the best that runs here; a named one that does not is an error"
    )
    lora: tuple[Place, ...] = Field((), description="LoRA folders to merge into the weights, in this order")
    max_sequence_length: Positive = Field(512, description="text tokens that the network attends to, padding included")


class DataSection(Section):
    """Real videos, which become the winners; or pairs of videos that are ranked already."""

    videos: Place | None = Field(None, description="folder of videos with captions")
    pairs: Place | None = Field(None, description="instead: JSONL, CSV or parquet with prompt, chosen, rejected")
    prompts: Place | None = Field(None, description="of alignkit rollout: .txt, a prompt a line, or a captions file")
    rollouts: Place | None = Field(None, description="folder of rollouts that data.pairs names by their numbers")
    heldout_pairs: Place | None = Field(None, description="the same to evaluate on; null: a share of data.pairs")
    captions: Place | None = Field(None, description="captions file, if it does not lie in the folder")
    height: Positive = 480
    width: Positive = 832
    num_frames: Positive = 81
    fps: Annotated[Number, Field(gt=0)] | None = Field(None, description="resample to this rate; null: as filmed")
    heldout: Annotated[Number, Field(gt=0.0, lt=1.0)] = Field(0.1, description="share of the clips kept for evaluation")

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

    files: Place | None = Field(None, description="folder of your own masks by video name, instead of random ones")
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

    folder: Place | None = Field(None, description="where the pairs are, to be shared by runs; null: output.dir/pairs")
    seed: Count = 0
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
        "auto",
        description="of stored latents and text; auto: fp16, or fp32 where the network runs in it or noise.source "
        "solves for noise",
    )
    previews: Count = Field(4, description="pairs of each split shown as pictures")
    mask: MaskSection = MaskSection()

    @model_validator(mode="after")
    def _strengths_fit(self) -> "PairsSection":
        if self.strengths == () or max(self.strengths) > self.num_inference_steps:
            raise ValueError(f"strengths must lie between 1 and num_inference_steps ({self.num_inference_steps})")
        return self


class LoraSection(Section):
    """Low-rank adapters instead of all weights; the published recipe's values (arXiv 2601.04068)."""

    rank: Positive = 64
    alpha: Positive = 128
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class TrainSection(Section):
    """Optimisation. Pair order, noise and timesteps are functions of (seed, epoch, pair id) alone."""

    seed: Count = 0
    steps: Positive = 500
    learning_rate: NonNegative = 1e-6
    warmup_steps: Count = Field(0, description="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate after that; cosine: down to min_learning_rate at the last step"
    )
    min_learning_rate: NonNegative = Field(0.0, description="at the end of schedule cosine")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegative = 1e-3
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    global_batch_size: Positive = Field(128, description="pairs per step, over all processes")
    micro_batch_size: Positive = Field(1, description="pairs per forward on one process")
    checkpointing: Literal["full", "selective", "none"] = Field(
        "full", description="what the backward pass computes again: every layer; all of it but attention; nothing"
    )
    branches: Literal["together", "apart"] = Field(
        "together", description="winners and losers in one forward; or in turn: half the activations, a forward more"
    )
    compile: bool = Field(False, description="torch.compile of the repeated block; ZeRO-3's hooks break its graph")
    caption_dropout: Fraction = Field(0.0, description="share of pairs shown with the empty prompt, on both sides")
    checkpoint_every: Positive = Field(100, description="steps")
    checkpoint_minutes: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="save too when the last save is so long ago; null: by steps alone"
    )
    keep_checkpoints: Positive = 2
    restart: bool = Field(False, description="start over where checkpoints exist and none is whole")
    reshape: bool = Field(False, description="convert a checkpoint of another number of processes (--reshape)")
    accept: tuple[str, ...] = Field((), description="settings that may differ from the checkpoint's, by name")
    lora: LoraSection | None = Field(None, description="train adapters of this rank; null: every weight")
    max_bad_steps: Positive = Field(5, description="non-finite steps in a row after which the run stops")
    stuck_seconds: Annotated[Number, Field(gt=0)] = Field(
        300.0, description="silence of a process, beyond ten times the slowest step so far, that ends the run"
    )

    @model_validator(mode="after")
    def _rates_fit(self) -> "TrainSection":
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError("min_learning_rate: is where schedule cosine ends; set schedule: cosine, or leave it out")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate: {self.min_learning_rate:g} is above learning_rate")
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
    seeds: tuple[Count, ...] = Field((0,), min_length=1)
    batch_size: Positive = 1


class EvaluationSection(Section):
    """Held-out pairs are scored with fixed keys at these points of the inference schedule (0: pure noise)."""

    seed: Count = 0
    positions: tuple[Annotated[Number, Field(ge=0.0, lt=1.0)], ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1)
    draws: Positive = Field(1, description="noises per pair and position")
    batch_size: Positive = 16


class OutputSection(Section):
    dir: Place
