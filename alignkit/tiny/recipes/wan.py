"""The tiny Wan2.1."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from alignkit.models.wan import WanModel
from alignkit.tiny.recipes import per_channel
from alignkit.tiny.stages import log

TITLE = "Wan2.1"
PIPELINE = WanPipeline
ADAPTER = WanModel
LATENT_CHANNELS, TEXT_DIM = 8, 64
# Whole frames at two chunks of the causal cache, whole frames at three, and crops of all five.
VAE_BATCHES = ((8, 5, 48), (5, 9, 48), (8, 9, 32), (8, 5, 48), (6, 17, 24))
# The pipeline pads the text to max_sequence_length and does not mask the padding.
TEXT_LENGTHS, TEXT_LENGTH_SHARES = (64, 128, 512), (0.8, 0.15, 0.05)
ENCODED_LENGTHS, ENCODED_LENGTH_SHARES = (64,), (1.0,)  # masked, so any other is the same
PATH_POINTS = "logit_normal"
# Noise levels 0.1, 0.3, 0.5, 0.7, 0.9 after the shift of 3.
HELD_OUT_POINTS = tuple(sigma / (3 - 2 * sigma) for sigma in (0.1, 0.3, 0.5, 0.7, 0.9))


def new_vae() -> AutoencoderKLWan:
    """An untrained AutoencoderKLWan: 4x in time and space, 8 latent channels, 0.82 M parameters."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """AutoencoderKLWan.decode clamps its output, which would stop the gradient of pixels beyond the range."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


def store_statistics(vae: AutoencoderKLWan, latents: Tensor, variance: Tensor, contrast: Tensor) -> None:
    """Mean and deviation of each latent channel.

    The deviation is that of posterior samples: the latents' own variance plus ``variance``, the posterior's.
    For a channel in use the second is nothing beside the first. A channel that the VAE leaves empty is almost
    constant, and its own deviation would blow up what no decoder looks at to the size of the picture.
    """
    mean = latents.double().mean(dim=(0, 2, 3, 4))
    std = (latents.double().var(dim=(0, 2, 3, 4)) + variance).sqrt()
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in std.tolist()],
    )
    log.info("vae: latents' mean %s", vae.config.latents_mean)
    log.info("vae: latents' deviation %s", vae.config.latents_std)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """(latents − mean) / deviation by channel."""
    return (latents - per_channel(vae.config.latents_mean)) / per_channel(vae.config.latents_std)


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse of ``normalise``."""
    return latents * per_channel(vae.config.latents_std) + per_channel(vae.config.latents_mean)


def new_text_encoder() -> UMT5EncoderModel:
    """An untrained UMT5EncoderModel of 0.11 M parameters."""
    config = UMT5Config(
        vocab_size=384,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config)


def encode_prompts(tokenizer: ByT5Tokenizer, encoder: UMT5EncoderModel, prompts: list[str], length: int) -> Tensor:
    """Text as WanPipeline encodes it: float [B, length, D], zeros after each prompt's own tokens."""
    tokens = tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    return encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]


def new_transformer() -> WanTransformer3DModel:
    """An untrained WanTransformer3DModel of 1.09 M parameters for latents [8, 5, 12, 12]."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def new_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def to_network(latents: Tensor) -> Tensor:
    return latents
