"""Model families. What is particular to one lives in its module here and nowhere else."""

from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from alignkit.config import ModelSection, check_model_place
from alignkit.models.attention import set_attention
from alignkit.models.context import LOAD, TokenGroup, lead, split_tokens
from alignkit.models.experts import Experts
from alignkit.models.folder import Watch, unwatched
from alignkit.schedules import Schedule


class VideoModel(Protocol):
    """A text-to-video model as the rest of alignkit sees it; "the family's layout" is its own order of C, F, H, W.

    `transformer` is None without `with_transformer`, `pipeline` (diffusers' own, for VAE and text) without
    `with_encoders`.
    """

    family: ClassVar[str]
    path: str
    scheduler: Any
    transformer: Any
    pipeline: Any
    dtype: torch.dtype
    attention: str | None
    context_parallel: int
    """Processes that share the tokens of the videos that `transformer` is shown."""
    expert: str | None
    """Of two, the one that is trained, "high" or "low"; None of a model with one network. `transformer` is then both,
    `experts.Experts`, where the model is loaded whole."""

    @property
    def vae(self) -> Any: ...

    @property
    def part(self) -> str:
        """The folder of the network that is trained."""

    @property
    def own_timesteps(self) -> tuple[float, float]:
        """[first, end): those that the network which is trained is for."""

    @property
    def network(self) -> Any:
        """Of `transformer`, what is trained: one of two experts, where it is both."""

    def to(self, device: torch.device | str) -> Self: ...

    def tile_vae(self) -> None:
        """From now on videos of more than 256 pixels a side are encoded and decoded in tiles of 256 that overlap by 64
        and are blended there."""

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The same with channels, in the family's layout."""

    def video_tokens(self, num_frames: int, height: int, width: int) -> int:
        """What the network makes of one video's latents; text is not counted."""

    def region_layout(self, mask: Tensor) -> Tensor:
        """A mask [F, H, W] in the family's layout, with one channel."""

    def frames_of_mask(self, region: Tensor) -> Tensor:
        """The inverse of `region_layout`."""

    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """fp32 [tokens, D] each, on CPU; what `pad_text` takes and pairs store."""

    def pad_text(self, embeddings: list[Tensor]) -> Tensor:
        """[B, max_sequence_length, D] as the network takes it."""

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to fp32 latents as the network sees them, without sampling."""

    def decode_video(self, latents: Tensor) -> Tensor:
        """The inverse: uint8 [B, F, H, W, 3] on CPU."""

    def schedule(self, num_steps: int) -> Schedule:
        """The states that the model's sampler visits, read off its scheduler object."""

    def few_step_scheduler(self, num_steps: int) -> Any:
        """diffusers' scheduler by which the family's pipeline walks `schedule(num_steps)` by `schedules.one_step`."""

    def training_path(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u in [0, 1], fp64 [B], to coefficients (a, s, c, d) fp64 [B, 4] and timesteps fp64 [B]; u = 1 is noise."""

    def between(self, row: Tensor, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Points of the path from schedule rows, int64 [B], a share u in [0, 1), fp64 [B], of the way to the next ones:
        coefficients fp64 [B, 4] and timesteps fp64 [B]."""

    def first_order(self, num_steps: int) -> str | None:
        """Why the model's own solver is not `schedules.one_step` from row to row of `schedule(num_steps)`; None if it
        is."""

    @property
    def forgets_noise(self) -> str | None:
        """Why videos of the model's own sampler do not follow from their starting noise; None if they do."""

    def sample(
        self,
        noise: Tensor,
        text: Tensor,
        negative: Tensor,
        *,
        num_steps: int,
        guidance: float,
        dynamic: bool = False,
        solver: str = "model",
        watch: Watch = unwatched,
    ) -> Tensor:
        """Latents from starting noise, bit for bit what the family's diffusers pipeline makes of it.

        solver: "model", the model's own, or "first_order" (Euler for flow, DDIM for v) on the same schedule.
        watch(i, state) is called with what the network is shown at step i, and with the result as step number N.
        """

    def merge_lora(self, folder: Path) -> None:
        """Add the adapters of `folder` to the weights of `network`."""

    def local_folder(self) -> Path:
        """The model's files on this machine."""

    def fingerprint(self, part: str = "transformer") -> str:
        """Identifies the weights of a part: "transformer" (all that make videos), "vae" or "text_encoder"."""


class Family(Protocol):
    """A module of this package."""

    TRANSFORMER: type[nn.Module]
    GUIDED_AT_ONCE: int
    """Branches of classifier-free guidance that `guided` runs in one forward."""
    CONTEXT_PLAN: dict[str, Any] | None
    """What context parallelism splits and gathers, as diffusers' `_cp_plan` has it; None of a network without one."""

    def outline(self, vae: dict[str, Any], max_sequence_length: int) -> tuple[VideoModel, nn.Module]:
        """A model of which nothing is loaded, for the sizes of its latents, and the VAE of a vae/config.json."""

    def split_lengths(self, config: Any, grid: tuple[int, ...], text_length: int) -> dict[str, int]:
        """Tokens that CONTEXT_PLAN splits, by what they are of, for a network's config, latents (F, H, W) and text."""

    def load(
        self,
        path: str,
        *,
        revision: str | None,
        variant: str | None,
        max_sequence_length: int,
        with_transformer: bool,
        with_encoders: bool,
        dtype: torch.dtype,
        expert: str | None,
    ) -> VideoModel:
        """The transformer in `dtype`, the rest in fp32, on CPU.

        Raises ModelError naming what is missing, damaged or of another family, ConfigError for an `expert` that the
        model has not, or that it needs.
        """

    def build_transformer(self, config: dict[str, Any]) -> nn.Module:
        """The network of a transformer/config.json, without its weights."""

    def predict(self, transformer: nn.Module, state: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The network's output for a batch of states in the family's layout; the network may be an engine's."""

    def guided(
        self,
        transformer: nn.Module,
        state: Tensor,
        timesteps: Tensor,
        text: Tensor,
        negative: Tensor,
        guidance: float,
    ) -> Tensor:
        """Classifier-free guidance as the pipeline computes it; guidance ≤ 1 is the conditional branch alone."""

    def dynamic_guidance(self, guidance: float, timestep: float, num_steps: int) -> float:
        """The scale at one step for `dynamic_guidance: true`; ConfigError where the pipeline knows no such thing."""


def shipped_model(family: str) -> Path:
    """Folder of the small model of that family that comes with alignkit."""
    return Path(__file__).parent.parent / "tiny" / family


def family_module(name: str) -> Family:
    """The module that knows the family `name`."""
    from alignkit.models import cogvideox, wan

    return {"wan": wan, "cogvideox": cogvideox}[name]


def working_dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32, unless the section names one."""
    if section.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[section.dtype]


def load_model(
    section: ModelSection,
    *,
    with_transformer: bool = True,
    with_encoders: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    group: TokenGroup | None = None,
) -> VideoModel:
    """Load the parts of `section`'s model that are asked for: the transformer in `dtype`, the rest in fp32.

    To CPU, or to `device`, with the attention backend that the section names for it. With a `group`, which needs a
    device, its processes share the transformer's tokens: what its first one shows to it, the others are to `follow`.
    Raises ModelError when files are missing, damaged or of another family, ConfigError when the attention backend
    cannot run there.
    """
    assert group is None or device is not None
    if group and group.first and with_transformer:
        group.say(LOAD)
    path = str(shipped_model(section.family)) if section.path == "tiny" else section.path
    local = Path(path)
    check_model_place(section)
    if local.expanduser().is_dir():
        path = str(local.expanduser())
    model = family_module(section.family).load(
        path,
        revision=section.revision,
        variant=section.variant or None,
        max_sequence_length=section.max_sequence_length,
        with_transformer=with_transformer,
        with_encoders=with_encoders,
        dtype=dtype,
        expert=section.expert,
    )
    if isinstance(model.transformer, Experts):
        model.transformer.low_guidance = section.guidance_scale_2
    for folder in section.lora:
        model.merge_lora(folder)
    if device is not None:
        model.to(device)
        if model.transformer is not None:
            shared = "context_parallel" if group else None  # of whichever section: it was tried before
            model.attention = set_attention(model.transformer, section.attention, device, dtype, shared=shared)
            if group:
                split_tokens(model.transformer, family_module(section.family), group.parallel)
                model.context_parallel = group.degree
                if group.first:
                    lead(model.transformer, group)
    if section.vae_tiling and model.pipeline is not None:
        model.tile_vae()
    return model
