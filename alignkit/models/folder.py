"""What the model families share: a diffusers folder or hub id, its parts, its text cache, its fingerprint."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.schedules import Schedule, one_step

REMEMBERED_PROMPTS = 64  # an embedding of a full model takes megabytes
Watch = Callable[[int, Tensor], None]
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it


@dataclass
class ModelFolder:
    """The parts of a model. `transformer` and `pipeline` (VAE and text) are None where they were not loaded; the
    schedule and the training path need the scheduler alone, the latents' sizes `vae_config`.

    dtype: the transformer's, and that of the text and states it is given; the other parts are fp32.
    attention: the backend that the transformer runs on, where one was chosen.
    """

    path: str
    max_sequence_length: int
    scheduler: object
    vae_config: dict = field(default_factory=dict)
    transformer: nn.Module | None = None
    pipeline: DiffusionPipeline | None = None
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    attention: str | None = None
    lora: tuple[Path, ...] = ()
    _embeddings: dict[str, Tensor] = field(default_factory=dict)

    family: ClassVar[str]

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part."""
        for module in (self.transformer, *(self.pipeline.components.values() if self.pipeline else ())):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    @property
    def vae(self) -> nn.Module:
        assert self.pipeline is not None
        return self.pipeline.vae

    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """Text embeddings as `pad_text` takes them, fp32 [tokens, D] each on CPU; the last prompts are remembered."""
        found = []
        for prompt in prompts:
            embedding = self._embeddings.pop(prompt, None)
            self._embeddings[prompt] = self._encode_prompt(prompt) if embedding is None else embedding
            found.append(self._embeddings[prompt])
        for prompt in list(self._embeddings)[:-REMEMBERED_PROMPTS]:
            del self._embeddings[prompt]
        return found

    def _encode_prompt(self, prompt: str) -> Tensor:
        raise NotImplementedError

    def local_folder(self) -> Path:
        """The model's files on this machine; a hub model is already in the cache when its parts are loaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))

    def fingerprint(self, part: str = "transformer") -> str:
        """Identifies the weights of a part: its files' bytes for a folder, id and commit for a hub model."""
        digest = hashlib.sha256()
        folder = Path(self.path)
        if not folder.is_dir():
            digest.update(json.dumps([self.path, self.local_folder().name]).encode())  # …/snapshots/COMMIT
        files = sorted(folder.glob(f"{part}/*")) if folder.is_dir() else []
        adapters = [adapter / LORA_FILE for adapter in self.lora] if part == "transformer" else []
        for file in [*files, *adapters]:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]

    def merge_lora(self, folder: Path) -> None:
        """Add the adapters of `folder` to the weights. Raises ModelError where they do not fit or are missing."""
        if not (folder / LORA_FILE).is_file():
            raise ModelError(f"model.lora: {folder / LORA_FILE}: no such file")
        self.lora = (*self.lora, folder)
        if self.transformer is None:
            return
        try:
            self.transformer.load_lora_adapter(str(folder), weight_name=LORA_FILE, prefix="transformer")
        except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
            problem = " ".join(str(error).split())[:300]
            raise ModelError(f"model.lora: {folder / LORA_FILE}: cannot load: {problem}") from error
        self.transformer.fuse_lora()
        self.transformer.unload_lora()
        frozen(self.transformer)


def unwatched(i: int, state: Tensor) -> None:
    """For nobody to see."""


@torch.no_grad()
def first_order_sample(
    noise: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    dtype: torch.dtype,
    watch: Watch,
) -> Tensor:
    """Walk `schedule` from starting noise by `one_step`, fp32; predict(state, timesteps [B]) is the guided network.

    dtype: the network's, in which `watch` sees its inputs.
    """
    state = noise.float()
    for i in range(len(schedule)):
        timesteps = schedule.timesteps[i].expand(len(state)).to(state.device, torch.float32)
        watch(i, state.to(dtype))
        state = one_step(state, predict(state, timesteps).float(), *schedule.coefficients[i : i + 2])
    watch(len(schedule), state)
    return state


def grid_of(num_frames: int, height: int, width: int, *, temporal: int, spatial: int, patch: int) -> tuple:
    """(F, H, W) of the latents of a video of these sizes, for a VAE with these factors and `patch` latents a token.

    Raises ConfigError for sizes that do not divide.
    """
    multiple = spatial * patch
    if (num_frames - 1) % temporal:
        raise ConfigError(f"data.num_frames: must be {temporal}·n + 1 for this model, got {num_frames}")
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            raise ConfigError(f"data.{name}: must be a multiple of {multiple} for this model, got {size}")
    return ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)


def to_unit(frames: Tensor, like: nn.Module) -> Tensor:
    """uint8 [B, F, H, W, 3] to [B, 3, F, H, W] in [-1, 1], where `like` lies and in its precision."""
    return rearrange(frames.to(like.device), "b f h w c -> b c f h w").to(like.dtype) / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] to uint8 [B, F, H, W, 3] on CPU."""
    frames = (video.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(frames.round().to(torch.uint8), "b c f h w -> b f h w c").cpu()


def frozen(module: nn.Module) -> nn.Module:
    """Without gradients, in eval mode."""
    return module.requires_grad_(False).eval()


def settings_of(part: type[nn.Module], path: str, subfolder: str, revision: str | None) -> dict:
    """A part's settings, the class's defaults for those that its config.json leaves out, without its weights."""
    with torch.device("meta"):
        return part.from_config(part.load_config(path, subfolder=subfolder, revision=revision)).config


@contextmanager
def loading(path: str, pipeline: type[DiffusionPipeline], revision: str | None) -> Iterator[None]:
    """Turn whatever loading raises into a ModelError that names `path`; refuse a folder of another pipeline first."""
    try:
        index = pipeline.load_config(path, revision=revision)
        if index.get("_class_name") != pipeline.__name__:
            raise ModelError(f"model.path: {path}: a {index.get('_class_name')}, not a {pipeline.__name__}")
        yield
    except AlignkitError:
        raise
    except Exception as error:  # diffusers, safetensors and json each raise their own kinds for damaged files
        raise ModelError(f"model.path: {path}: cannot load: {' '.join(str(error).split())[:300]}") from error
