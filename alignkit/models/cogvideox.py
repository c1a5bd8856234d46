"""CogVideoX: v-prediction, latents [B, F, C, H, W], T5 text concatenated with the video's tokens, DDIM.

Wraps diffusers' own classes; the arithmetic of encoding, text and guidance is that of `CogVideoXPipeline`,
which is the oracle in the tests. The 2B adds sin-cos positions to its tokens (text included, so its text
length is fixed), the 5B rotates queries and keys; both are read off the transformer's config.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from einops import rearrange
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError
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
from alignkit.progress import say
from alignkit.schedules import Schedule, v_coefficients

TRANSFORMER = CogVideoXTransformer3DModel
GUIDED_AT_ONCE = 2
_TOKENS, _POSITIONS = ContextParallelInput(1, expected_dims=3), ContextParallelInput(0, expected_dims=2)
CONTEXT_PLAN = {
    "": {"image_rotary_emb": (_POSITIONS, _POSITIONS)},
    "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
    "proj_out": ContextParallelOutput(1, expected_dims=3),
}
"""diffusers has none for it. Text and video meet in attention, so both are split: each process holds a part of the text
before its part of the video, and attention, which has no mask, does not ask for their order."""


class CogVideoXModel(ModelFolder):
    """The parts of a CogVideoX folder."""

    family = "cogvideox"
    stochastic = False
    """Whether the folder's own scheduler is the DPM one, in whose place DDIM samples."""

    def tile_vae(self) -> None:
        # diffusers' own sizes go by the config, and their seams do not fit together for every one
        overlap = 1 - STRIDE / TILE
        self.vae.enable_tiling(TILE, TILE, overlap, overlap)

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""
        vae = self.vae_config
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        # The decoder gives every frame of an even number of latent frames back fourfold, the first one too.
        chunk = 2 * int(vae["temporal_compression_ratio"])
        frames, rows, columns = grid_of(num_frames, height, width, temporal=chunk, spatial=spatial, patch=2)
        return 2 * frames - 1, rows, columns

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of one video's latents. Raises ConfigError for sizes the model cannot take."""
        frames, rows, columns = self.latent_grid(num_frames, height, width)
        return (frames, self.vae_config["latent_channels"], rows, columns)

    @staticmethod
    def region_layout(mask: Tensor) -> Tensor:
        """A mask [F, H, W] in the layout of one video's latents, one label for all channels: [F, 1, H, W]."""
        return mask[:, None]

    @staticmethod
    def frames_of_mask(region: Tensor) -> Tensor:
        """The inverse of `region_layout`: [F, 1, H, W] to [F, H, W]."""
        return region[:, 0]

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> Tensor:
        """With its padding, fp32 [max_sequence_length, D]: nothing masks it, so its embeddings are not zero."""
        assert self.pipeline is not None
        embeddings = self.pipeline._get_t5_prompt_embeds(
            [prompt], max_sequence_length=self.max_sequence_length, device=self.vae.device
        )
        return embeddings[0].float().cpu()

    def pad_text(self, embeddings: list[Tensor]) -> Tensor:
        """[max_sequence_length, D] each to [B, max_sequence_length, D]; there is nothing left to pad.

        Raises ConfigError for embeddings of another length, made with another `model.max_sequence_length`.
        """
        for embedding in embeddings:
            if len(embedding) != self.max_sequence_length:
                raise ConfigError(
                    f"model.max_sequence_length: {self.max_sequence_length}, but the stored text has "
                    f"{len(embedding)} tokens; CogVideoX encodes the padding too, so it must be the same"
                )
        return torch.stack(embeddings)

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to scaled latents, fp32 [B, F, C, H, W]: the posterior's mean, no sampling.

        The inverse of the pipeline's decoding; `invert_scale_latents` concerns image conditions, which text to
        video has none of.
        """
        latents = self.vae.encode(to_unit(frames, self.vae)).latent_dist.mode().float()
        return rearrange(latents * self.vae.config.scaling_factor, "b c f h w -> b f c h w").contiguous()

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, F, C, H, W] to frames, uint8 [B, F, H, W, 3] on CPU."""
        latents = rearrange(latents.to(self.vae.device, self.vae.dtype), "b f c h w -> b c f h w")
        return to_frames(self.vae.decode(1 / self.vae.config.scaling_factor * latents).sample)

    def new_scheduler(self) -> CogVideoXDDIMScheduler:
        """A scheduler with no steps taken."""
        return CogVideoXDDIMScheduler.from_config(self.scheduler.config)

    def _scheduler_of(self, num_steps: int, device: torch.device | None = None) -> CogVideoXDDIMScheduler:
        """Before the first of `num_steps`. Raises ConfigError for more than it has timesteps."""
        scheduler = self.new_scheduler()
        if num_steps > len(scheduler.alphas_cumprod):
            raise ConfigError(
                f"num_inference_steps: {num_steps}, but DDIM takes a step from one of this model's "
                f"{len(scheduler.alphas_cumprod)} timesteps to another; take no more steps than these"
            )
        scheduler.set_timesteps(num_steps, device=device)
        return scheduler

    def few_step_scheduler(self, num_steps: int) -> CogVideoXDDIMScheduler:
        """DDIM, also in the place of a folder's DPM. Raises ConfigError for steps that it does not walk row by row."""
        reason = self.first_order(num_steps)
        if reason:
            raise ConfigError(f"student.num_inference_steps: {reason}; take a number that divides 1000: 2, 4, 5 or 8")
        return self.new_scheduler()

    def schedule(self, num_steps: int) -> Schedule:
        """The states that this model's sampler visits in `num_steps`, read off the scheduler object. Raises ConfigError
        for more than it has timesteps.

        DDIM steps down by 1000 // num_steps whatever the spacing of its timesteps: where `num_steps` does not
        divide 1000, its states lie up to one timestep beside those that the network is told, and these here.
        """
        scheduler = self._scheduler_of(num_steps)
        visited = scheduler.alphas_cumprod[scheduler.timesteps].double()
        return Schedule(v_coefficients(torch.cat([visited, visited.new_ones(1)])), scheduler.timesteps.double())

    def training_path(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Path point of u in [0, 1], fp64 [B]: coefficients [B, 4] and network timesteps [B], whole numbers."""
        alphas = self.scheduler.alphas_cumprod.to(u.device, torch.float64)
        timesteps = (u * len(alphas)).long().clamp(max=len(alphas) - 1)
        return v_coefficients(alphas[timesteps]), timesteps.double()

    def between(self, row: Tensor, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Points of the path a share u of the way from schedule rows to the next ones: coefficients and timesteps.

        The network knows whole timesteps alone, so a point lies on the first of them at or above that share.
        """
        timesteps = torch.cat([self.schedule(num_steps).timesteps, torch.zeros(1, dtype=torch.float64)])
        timestep = ((1 - u) * timesteps[row] + u * timesteps[row + 1]).ceil()
        return v_coefficients(self.scheduler.alphas_cumprod.double()[timestep.long()]), timestep

    def first_order(self, num_steps: int) -> str | None:
        timesteps = self.schedule(num_steps).timesteps
        step = len(self.scheduler.alphas_cumprod) // num_steps
        if not torch.equal(timesteps[:-1] - step, timesteps[1:]) or timesteps[-1] - step >= 0:
            return f"DDIM steps down by {step} timesteps, which are not those from row to row of its {num_steps} steps"
        return None

    @property
    def forgets_noise(self) -> str | None:
        if self.stochastic:
            return "CogVideoX's DPM draws new noise at every step and drops the starting noise at the first"
        return None

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
        """Latents [B, F, C, H, W] from starting noise by DDIM (η = 0), as `CogVideoXPipeline` does it.

        text, negative: padded embeddings [B, L, D]; guidance ≤ 1 runs the conditional branch alone; `dynamic`
        is the pipeline's `use_dynamic_cfg`. solver: "first_order" is the same DDIM in fp32 on the rows of `schedule`,
        whatever the number of steps. `watch` as in `VideoModel`.
        """

        def predict(state: Tensor, timesteps: Tensor) -> Tensor:
            scale = guidance
            if dynamic and guidance > 1:
                scale = dynamic_guidance(guidance, timesteps[0].item(), num_steps)
            return _guided(self.transformer, state, timesteps, text, negative, scale, guidance > 1)

        if solver == "first_order":
            return first_order_sample(noise, predict, self.schedule(num_steps), text.dtype, watch)
        scheduler = self._scheduler_of(num_steps, noise.device)
        latents = (noise * scheduler.init_noise_sigma).to(text.dtype)
        for i, t in enumerate(scheduler.timesteps):
            watch(i, latents.to(text.dtype))
            velocity = predict(latents, t.expand(len(latents)))
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0].to(text.dtype)
        watch(num_steps, latents)
        return latents


class AttentionProcessor:
    """CogVideoX's joint attention of text and video, through diffusers' dispatcher.

    diffusers' own `CogVideoXAttnProcessor2_0` calls scaled_dot_product_attention directly, so
    `set_attention_backend` passes it by; with the native backend this one computes the same bits.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text_length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(tokens).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat(
                    [x[:, :text_length], apply_rotary_emb(x[:, text_length:], image_rotary_emb, sequence_dim=1)], dim=1
                )
                for x in (query, key)
            )
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        mixed = attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).to(query.dtype)))
        return mixed[:, text_length:], mixed[:, :text_length]


def dynamic_guidance(guidance: float, timestep: float, num_steps: int) -> float:
    """The pipeline's `use_dynamic_cfg`: 1 + g·(1 − cos(π·((N − t)/N)⁵))/2.

    The timestep t counts to 999 and N to `num_steps`, so for N < 1000 the argument of the cosine is huge and
    the scale jumps about in [1, 1 + g] from step to step; it is kept as published.
    """
    return 1 + guidance * ((1 - math.cos(math.pi * ((num_steps - timestep) / num_steps) ** 5.0)) / 2)


def predict(transformer: nn.Module, state: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The network's output for states [B, F, C, H, W] at timesteps [B]; `transformer` may be a DeepSpeed engine."""
    return transformer(
        hidden_states=state,
        encoder_hidden_states=text,
        timestep=timesteps,
        image_rotary_emb=rotary_positions(getattr(transformer, "module", transformer).config, state),
        return_dict=False,
    )[0]


def guided(
    transformer: nn.Module, state: Tensor, timesteps: Tensor, text: Tensor, negative: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance as the pipeline computes it: one forward of both, uncond + g·(cond − uncond), fp32."""
    return _guided(transformer, state, timesteps, text, negative, guidance, guidance > 1)


def _guided(
    transformer: nn.Module,
    state: Tensor,
    timesteps: Tensor,
    text: Tensor,
    negative: Tensor,
    scale: float,
    both: bool,
) -> Tensor:
    """`both` is apart from the scale: a dynamic scale of 1 is still computed from both branches."""
    state = state.to(text.dtype)
    if not both:
        return predict(transformer, state, timesteps, text).float()
    inputs = torch.cat([state] * 2), torch.cat([timesteps] * 2), torch.cat([negative, text])
    unconditional, conditional = predict(transformer, *inputs).float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def rotary_positions(config: Any, state: Tensor) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) [tokens, head dim] for states [B, F, C, H, W], as the pipeline makes them; None for sin-cos models."""
    if not config.use_rotary_positional_embeddings:
        return None
    frames, _, height, width = state.shape[1:]
    patch = config.patch_size
    trained = (config.sample_height // patch, config.sample_width // patch)
    return _rotary_table(config.attention_head_dim, frames, (height // patch, width // patch), trained, state.device)


@lru_cache(maxsize=8)
def _rotary_table(
    dim: int, frames: int, grid: tuple[int, int], trained: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of another grid of patches are scaled to the one that the model was trained on."""
    coordinates = get_resize_crop_region_for_grid(grid, trained[1], trained[0])
    return get_3d_rotary_pos_embed(
        embed_dim=dim, crops_coords=coordinates, grid_size=grid, temporal_size=frames, device=device
    )


def split_lengths(config: Any, grid: tuple[int, ...], text_length: int) -> dict[str, int]:
    """Tokens that CONTEXT_PLAN splits, for latents of `grid`, (F, H, W), and a text."""
    frames, height, width = grid
    video = frames * (height // config.patch_size) * (width // config.patch_size)
    return {"tokens of a video": video, "tokens of a text (model.max_sequence_length)": text_length}


def outline(vae: dict[str, Any], max_sequence_length: int) -> tuple[CogVideoXModel, nn.Module]:
    """A model of which nothing is loaded, for the sizes of its latents, and the VAE of that config."""
    decoder = AutoencoderKLCogVideoX.from_config(vae)
    return CogVideoXModel("", max_sequence_length, None, decoder.config), decoder


def build_transformer(config: dict[str, Any]) -> nn.Module:
    """The network of a transformer/config.json, without its weights."""
    transformer = CogVideoXTransformer3DModel.from_config(config)
    transformer.set_attn_processor(AttentionProcessor())
    return transformer


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
) -> CogVideoXModel:
    """Load a CogVideoX folder or hub id on CPU, the transformer in `dtype`, the rest in fp32.

    Raises ModelError naming what is missing or wrong, ConfigError for a text length that the model cannot take.
    """
    with loading(
        path, CogVideoXPipeline, revision, variant, expert, with_transformer=True, with_encoders=with_encoders
    ):  # of the transformer at least its config
        scheduler, stochastic = _load_scheduler(path, revision)
        config = CogVideoXTransformer3DModel.load_config(path, subfolder="transformer", revision=revision)
        if config.get("patch_size_t") is not None:
            # Its patches are of two latent frames, but the VAE makes an odd number: the pipeline samples one more
            # and throws it away, and a video to train on has none.
            raise ModelError(f"model.path: {path}/transformer: patch_size_t is set: CogVideoX 1.5 is not supported")
        _check_text_length(config, max_sequence_length)
        vae_config = settings_of(AutoencoderKLCogVideoX, path, "vae", revision)
        transformer: Any = None
        if with_transformer:
            transformer = load_transformer(CogVideoXTransformer3DModel, path, revision, variant, dtype)
            transformer.set_attn_processor(AttentionProcessor())
        pipeline = None
        if with_encoders:
            pipeline = load_encoders(CogVideoXPipeline, path, revision, variant, transformer=None, scheduler=scheduler)
        model = CogVideoXModel(
            path, max_sequence_length, scheduler, vae_config, transformer, pipeline, dtype, revision, variant=variant
        )
        model.stochastic = stochastic
        return model


def _load_scheduler(path: str, revision: str | None) -> tuple[CogVideoXDDIMScheduler, bool]:
    """DDIM with the folder's settings, and whether the folder itself names DPM."""
    config = CogVideoXDDIMScheduler.load_config(path, subfolder="scheduler", revision=revision)
    where = f"model.path: {path}/scheduler/{SCHEDULER_CONFIG_NAME}"
    if config.get("prediction_type") != "v_prediction":
        raise ModelError(f"{where}: prediction_type is {config.get('prediction_type')}, CogVideoX predicts v")
    if not config.get("set_alpha_to_one", True):
        raise ModelError(f"{where}: set_alpha_to_one is off, so its last step does not end at the clean latents")
    stochastic = config.get("_class_name") == "CogVideoXDPMScheduler"
    if stochastic:
        say(f"{where}: DPM's first step multiplies the starting noise by 0; sampling with DDIM of the same config")
    shift = config.get("snr_shift_scale", 3.0)
    if not isinstance(shift, int | float) or shift <= 0:
        raise ModelError(f"{where}: snr_shift_scale is {shift!r}, not a number above 0")
    # clip_sample and its kin are not read by CogVideoX's DDIM.
    scheduler = CogVideoXDDIMScheduler.from_config(config)
    known, said = len(scheduler.alphas_cumprod), scheduler.config.num_train_timesteps
    if known != said:
        raise ModelError(f"{where}: trained_betas has {known} numbers, but num_train_timesteps is {said}")
    checked_path(CogVideoXModel(path, 0, scheduler))
    return scheduler, stochastic


def _check_text_length(config: dict[str, Any], length: int) -> None:
    known = config["max_text_seq_length"]
    if not config["use_rotary_positional_embeddings"] and length != known:
        raise ConfigError(
            f"model.max_sequence_length: this model's table of positions holds {known} text tokens, got {length}"
        )
    if length > known:
        raise ConfigError(f"model.max_sequence_length: this model knows up to {known} text tokens, got {length}")
