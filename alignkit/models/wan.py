"""Wan2.1: flow matching, latents [B, C, F, H, W], UMT5 text, UniPC with flow sigmas.

Wraps diffusers' own classes; the arithmetic of encoding, text and guidance is that of `WanPipeline`, which
is the oracle in the tests.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError
from alignkit.schedules import Schedule, flow_coefficients, flow_shift


@dataclass
class WanModel:
    """The parts of a Wan2.1 folder. `transformer`, `vae` and text parts are None where they were not loaded."""

    path: str
    max_sequence_length: int
    scheduler: UniPCMultistepScheduler
    transformer: WanTransformer3DModel | None
    pipeline: WanPipeline | None
    revision: str | None = None
    _embeddings: dict[str, Tensor] = field(default_factory=dict)

    family = "wan"

    def to(self, device: torch.device | str) -> "WanModel":
        for module in (self.transformer, *(self.pipeline.components.values() if self.pipeline else ())):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    @property
    def vae(self) -> AutoencoderKLWan:
        assert self.pipeline is not None
        return self.pipeline.vae

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""
        temporal, spatial = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
        multiple = spatial * 2  # the transformer's patches are 2×2 latents
        if (num_frames - 1) % temporal:
            raise ConfigError(f"data.num_frames: must be {temporal}·n + 1 for this model, got {num_frames}")
        for name, size in (("height", height), ("width", width)):
            if size % multiple:
                raise ConfigError(f"data.{name}: must be a multiple of {multiple} for this model, got {size}")
        return (self.vae.config.z_dim, (num_frames - 1) // temporal + 1, height // spatial, width // spatial)

    @staticmethod
    def region_layout(mask: Tensor) -> Tensor:
        """A mask [F, H, W] in the layout of one video's latents, one label for all channels: [1, F, H, W]."""
        return mask[None]

    @staticmethod
    def frames_of_mask(region: Tensor) -> Tensor:
        """The inverse of `region_layout`: [1, F, H, W] to [F, H, W]."""
        return region[0]

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """Text embeddings without their padding, fp32 [tokens, D] each; each prompt is encoded once."""
        assert self.pipeline is not None
        for prompt in prompts:
            if prompt not in self._embeddings:
                padded = self.pipeline._get_t5_prompt_embeds(
                    [prompt], max_sequence_length=self.max_sequence_length, device=self.vae.device
                )[0]
                used = padded.abs().amax(dim=1).nonzero()
                self._embeddings[prompt] = padded[: int(used.max()) + 1 if len(used) else 0].float().cpu()
        return [self._embeddings[prompt] for prompt in prompts]

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to normalised latents, fp32 [B, C, F, H, W]: the posterior's mean, no sampling."""
        video = frames.to(self.vae.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        mean, std = self._latent_statistics()
        return (self.vae.encode(video).latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, H, W] to frames, uint8 [B, F, H, W, 3] on CPU."""
        mean, std = self._latent_statistics()
        video = self.vae.decode((latents.to(mean.device) * std + mean).to(self.vae.dtype)).sample
        frames = (video.float().clamp(-1, 1) + 1) * 127.5
        return frames.round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        def per_channel(values) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.vae.device).view(1, -1, 1, 1, 1)

        return per_channel(self.vae.config.latents_mean), per_channel(self.vae.config.latents_std)

    def pad_text(self, embeddings: list[Tensor]) -> Tensor:
        """[tokens, D] each to [B, max_sequence_length, D]: zeros, which the network attends to, as in the pipeline."""
        padded = torch.zeros(len(embeddings), self.max_sequence_length, embeddings[0].shape[1])
        for row, embedding in zip(padded, embeddings, strict=True):
            row[: len(embedding)] = embedding
        return padded

    def new_scheduler(self) -> UniPCMultistepScheduler:
        """A scheduler with no steps taken."""
        return UniPCMultistepScheduler.from_config(self.scheduler.config)

    def schedule(self, num_steps: int) -> Schedule:
        """The states that this model's sampler visits in `num_steps`, read off the scheduler object."""
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(num_steps)
        return Schedule(flow_coefficients(scheduler.sigmas.double()), scheduler.timesteps.double())

    def training_path(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Path point of u in [0, 1], fp64 [B]: coefficients [B, 4] and network timesteps [B], with the flow shift."""
        sigmas = flow_shift(u, self.scheduler.config.flow_shift)
        return flow_coefficients(sigmas), sigmas * self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def sample(self, noise: Tensor, text: Tensor, negative: Tensor, *, num_steps: int, guidance: float) -> Tensor:
        """Latents [B, C, F, H, W] from starting noise by the model's own solver, as `WanPipeline` does it.

        text, negative: padded embeddings [B, L, D]; guidance ≤ 1 runs the conditional branch alone.
        """
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(num_steps, device=noise.device)
        scheduler.set_begin_index(0)
        latents = noise
        for t in scheduler.timesteps:
            velocity = guided(self.transformer, latents, t.expand(len(latents)), text, negative, guidance)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents

    def local_folder(self) -> Path:
        """The model's files on this machine; a hub model is already in the cache when its parts are loaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))

    def fingerprint(self) -> str:
        """Identifies the base weights: their files' bytes for a folder, id and revision for a hub model."""
        digest = hashlib.sha256()
        folder = Path(self.path)
        if not folder.is_dir():
            digest.update(json.dumps([self.path, self.revision]).encode())
        for file in sorted(folder.glob("transformer/*")) if folder.is_dir() else ():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]


def predict(transformer: nn.Module, state: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The network's output for states [B, C, F, H, W] at timesteps [B]; `transformer` may be a DeepSpeed engine."""
    return transformer(hidden_states=state, timestep=timesteps, encoder_hidden_states=text, return_dict=False)[0]


def guided(
    transformer: nn.Module, state: Tensor, timesteps: Tensor, text: Tensor, negative: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance as the pipeline computes it: two forwards, uncond + g·(cond − uncond)."""
    state = state.to(text.dtype)
    conditional = predict(transformer, state, timesteps, text)
    if guidance <= 1:
        return conditional
    unconditional = predict(transformer, state, timesteps, negative)
    return unconditional + guidance * (conditional - unconditional)


def load(
    path: str, *, revision: str | None, max_sequence_length: int, with_transformer: bool, with_encoders: bool
) -> WanModel:
    """Load a Wan2.1 folder or hub id in fp32 on CPU. Raises ModelError naming what is missing or wrong."""
    try:
        index = WanPipeline.load_config(path, revision=revision)
        if index.get("_class_name") != "WanPipeline":
            raise ModelError(f"model.path: {path}: a {index.get('_class_name')}, not a WanPipeline")
        scheduler = UniPCMultistepScheduler.from_pretrained(path, subfolder="scheduler", revision=revision)
        if not scheduler.config.use_flow_sigmas:
            raise ModelError(f"model.path: {path}/scheduler: use_flow_sigmas is off, so its states are not Wan's")
        transformer = None
        if with_transformer:
            transformer = WanTransformer3DModel.from_pretrained(path, subfolder="transformer", revision=revision)
            transformer.float().requires_grad_(False).eval()
        pipeline = None
        if with_encoders:
            pipeline = WanPipeline.from_pretrained(path, revision=revision, transformer=None)
            pipeline.vae.float().requires_grad_(False).eval()
            pipeline.text_encoder.float().requires_grad_(False).eval()
    except ModelError:
        raise
    except Exception as error:  # diffusers, safetensors and json each raise their own kinds for damaged files
        raise ModelError(f"model.path: {path}: cannot load: {' '.join(str(error).split())[:300]}") from error
    return WanModel(path, max_sequence_length, scheduler, transformer, pipeline, revision)
