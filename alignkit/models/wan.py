"""Wan2.1 and the two experts of Wan2.2: flow matching, latents [B, C, F, H, W], UMT5 text, UniPC with flow sigmas.

Wraps diffusers' own classes; the arithmetic of encoding, text and guidance is that of `WanPipeline`, which
is the oracle in the tests.
"""

import math
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError
from alignkit.models.experts import PARTS, Experts, boundary_timestep
from alignkit.models.folder import (
    STRIDE,
    TILE,
    ModelFolder,
    Watch,
    checked_path,
    first_order_sample,
    grid_of,
    load_encoders,
    load_transformer,
    loading,
    settings_of,
    to_frames,
    to_unit,
    unwatched,
)
from alignkit.schedules import Schedule, flow_coefficients, flow_shift

TRANSFORMER = WanTransformer3DModel
GUIDED_AT_ONCE = 1
# "" splits timesteps of each token, which Wan2.1 has none of, and warns of it
CONTEXT_PLAN = {name: part for name, part in WanTransformer3DModel._cp_plan.items() if name}
"""The video's tokens and their positions; every process has the whole text."""
WANS_OPTIONS = {
    "use_flow_sigmas": True, "use_dynamic_shifting": False, "shift_terminal": None, "final_sigmas_type": "zero",
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "prediction_type": "flow_prediction", "predict_x0": True, "thresholding": False,
}  # fmt: skip
"""Of UniPC, which is a solver for other families too."""


class WanModel(ModelFolder):
    """The parts of a Wan folder."""

    family = "wan"

    def tile_vae(self) -> None:
        self.vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""
        config = self.vae_config  # the transformer's patches are 2×2 latents
        temporal, spatial = config["scale_factor_temporal"], config["scale_factor_spatial"]
        return grid_of(num_frames, height, width, temporal=temporal, spatial=spatial, patch=2)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""
        return (self.vae_config["z_dim"], *self.latent_grid(num_frames, height, width))

    @staticmethod
    def region_layout(mask: Tensor) -> Tensor:
        """A mask [F, H, W] in the layout of one video's latents, one label for all channels: [1, F, H, W]."""
        return mask[None]

    @staticmethod
    def frames_of_mask(region: Tensor) -> Tensor:
        """The inverse of `region_layout`: [1, F, H, W] to [F, H, W]."""
        return region[0]

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> Tensor:
        """Without its padding, fp32 [tokens, D]."""
        assert self.pipeline is not None
        padded = self.pipeline._get_t5_prompt_embeds(
            [prompt], max_sequence_length=self.max_sequence_length, device=self.vae.device
        )[0]
        used = padded.abs().amax(dim=1).nonzero()
        return padded[: int(used.max()) + 1 if len(used) else 0].float().cpu()

    def pad_text(self, embeddings: list[Tensor]) -> Tensor:
        """[tokens, D] each to [B, max_sequence_length, D]: zeros, which the network attends to, as in the pipeline."""
        padded = torch.zeros(len(embeddings), self.max_sequence_length, embeddings[0].shape[1])
        for row, embedding in zip(padded, embeddings, strict=True):
            row[: len(embedding)] = embedding
        return padded

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to normalised latents, fp32 [B, C, F, H, W]: the posterior's mean, no sampling."""
        mean, std = self._latent_statistics()
        return (self.vae.encode(to_unit(frames, self.vae)).latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, H, W] to frames, uint8 [B, F, H, W, 3] on CPU."""
        mean, std = self._latent_statistics()
        return to_frames(self.vae.decode((latents.to(mean.device) * std + mean).to(self.vae.dtype)).sample)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        def per_channel(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.vae.device).view(1, -1, 1, 1, 1)

        return per_channel(self.vae.config.latents_mean), per_channel(self.vae.config.latents_std)

    def new_scheduler(self) -> UniPCMultistepScheduler:
        """A scheduler with no steps taken."""
        return UniPCMultistepScheduler.from_config(self.scheduler.config)

    def few_step_scheduler(self, num_steps: int) -> UniPCMultistepScheduler:
        """UniPC that uses no earlier step's prediction is Euler on its own noise levels."""
        settings = self.scheduler.config
        return UniPCMultistepScheduler.from_config(settings, solver_order=1, disable_corrector=list(range(num_steps)))

    def schedule(self, num_steps: int) -> Schedule:
        """The states that this model's sampler visits in `num_steps`, read off the scheduler object."""
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(num_steps)
        return Schedule(flow_coefficients(scheduler.sigmas.double()), scheduler.timesteps.double())

    def training_path(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Path point of u in [0, 1], fp64 [B]: coefficients [B, 4] and network timesteps [B], with the flow shift."""
        sigmas = flow_shift(u, self.scheduler.config.flow_shift)
        return flow_coefficients(sigmas), sigmas * self.scheduler.config.num_train_timesteps

    def between(self, row: Tensor, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Points of the path a share u of the way from schedule rows to the next ones: coefficients and timesteps."""
        schedule = self.schedule(num_steps)
        sigmas = schedule.coefficients[:, 1]
        timesteps = torch.cat([schedule.timesteps, schedule.timesteps.new_zeros(1)])
        sigma, timestep = ((1 - u) * x[row] + u * x[row + 1] for x in (sigmas, timesteps))
        return flow_coefficients(sigma), timestep

    def first_order(self, num_steps: int) -> str | None:
        return "UniPC uses the predictions of earlier steps too"

    forgets_noise = None

    @torch.no_grad()
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
        """Latents [B, C, F, H, W] from starting noise by the model's own solver, as `WanPipeline` does it, or by Euler.

        text, negative: padded embeddings [B, L, D]; guidance ≤ 1 runs the conditional branch alone. `watch` as in
        `VideoModel`: the predictor's states, not UniPC's corrected ones. Raises ConfigError for `dynamic`, which the
        pipeline does not know.
        """
        if dynamic:
            dynamic_guidance(guidance, 0, num_steps)
        if solver == "first_order":

            def predict(state: Tensor, timesteps: Tensor) -> Tensor:
                return guided(self.transformer, state, timesteps, text, negative, guidance)

            return first_order_sample(noise, predict, self.schedule(num_steps), text.dtype, watch)
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(num_steps, device=noise.device)
        scheduler.set_begin_index(0)
        latents = noise
        for i, t in enumerate(scheduler.timesteps):
            watch(i, latents.to(text.dtype))
            velocity = guided(self.transformer, latents, t.expand(len(latents)), text, negative, guidance)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        watch(num_steps, latents)
        return latents


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
    if isinstance(transformer, Experts):
        guidance = transformer.guidance(guidance, timesteps)
    return unconditional + guidance * (conditional - unconditional)


def dynamic_guidance(guidance: float, timestep: float, num_steps: int) -> float:
    """Wan's pipeline guides all steps alike: raises ConfigError."""
    raise ConfigError("dynamic_guidance: Wan has none; leave it off")


def split_lengths(config: Any, grid: tuple[int, ...], text_length: int) -> dict[str, int]:
    """Tokens that CONTEXT_PLAN splits, for latents of `grid`, (F, H, W)."""
    return {"tokens of a video": math.prod(size // patch for size, patch in zip(grid, config.patch_size, strict=True))}


def outline(vae: dict[str, Any], max_sequence_length: int) -> tuple[WanModel, nn.Module]:
    """A model of which nothing is loaded, for the sizes of its latents, and the VAE of that config."""
    decoder = AutoencoderKLWan.from_config(vae)
    return WanModel("", max_sequence_length, None, decoder.config), decoder


def build_transformer(config: dict[str, Any]) -> nn.Module:
    """The network of a transformer/config.json, without its weights."""
    return WanTransformer3DModel.from_config(config)


def load(
    path: str,
    *,
    revision: str | None,
    variant: str | None = None,
    max_sequence_length: int,
    with_transformer: bool,
    with_encoders: bool,
    dtype: torch.dtype = torch.float32,
    expert: str | None = None,
) -> WanModel:
    """Load a Wan folder or hub id on CPU, the transformer, or both experts, in `dtype`, the rest in fp32.

    Raises ModelError naming what is missing or wrong.
    """
    with loading(
        path, WanPipeline, revision, variant, expert, with_transformer=with_transformer, with_encoders=with_encoders
    ) as index:
        if index.get("expand_timesteps"):
            raise ModelError(f"model.path: {path}: expand_timesteps is on: Wan2.2's 5B is not supported")
        scheduler = _load_scheduler(path, revision)
        vae_config = settings_of(AutoencoderKLWan, path, "vae", revision)
        boundary = None
        if expert:
            boundary = boundary_timestep(index["boundary_ratio"], scheduler.config.num_train_timesteps)
        transformer: Any = None
        if with_transformer:
            high, *low = (
                load_transformer(WanTransformer3DModel, path, revision, variant, dtype, part)
                for part in (PARTS.values() if expert else ["transformer"])
            )
            transformer = high if boundary is None else Experts(high, *low, boundary=boundary)
        pipeline = None
        if with_encoders:
            pipeline = load_encoders(WanPipeline, path, revision, variant, transformer=None, transformer_2=None)
        return WanModel(
            path, max_sequence_length, scheduler, vae_config, transformer, pipeline, dtype, revision,
            variant=variant, expert=expert, boundary=boundary,
        )  # fmt: skip


def _load_scheduler(path: str, revision: str | None) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler.from_pretrained(path, subfolder="scheduler", revision=revision)
    where = f"model.path: {path}/scheduler/{SCHEDULER_CONFIG_NAME}"
    for option, wanted in WANS_OPTIONS.items():
        found = scheduler.config[option]
        if (found or None) != (wanted or None):
            raise ModelError(f"{where}: {option} is {found!r}; on Wan's path it is {wanted!r}")
    shift = scheduler.config.flow_shift
    if not isinstance(shift, int | float) or shift <= 0:
        raise ModelError(f"{where}: flow_shift is {shift!r}, not a number above 0")
    checked_path(WanModel(path, 0, scheduler))
    return scheduler
