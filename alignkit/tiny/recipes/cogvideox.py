"""The tiny CogVideoX, as the 5B: rotary positions, so that any text length and picture size goes through."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from alignkit.models.cogvideox import CogVideoXModel
from alignkit.tiny.clips import FRAMES, SIZE
from alignkit.tiny.stages import log

TITLE = "CogVideoX"
PIPELINE = CogVideoXPipeline
ADAPTER = CogVideoXModel
LATENT_CHANNELS, TEXT_DIM = 8, 64
# The VAE takes the first 9 frames at once and 8 more at a time. Five frames would come back as eight: it
# doubles every frame of an even number of latent frames.
VAE_BATCHES = ((4, 9, 48), (2, 17, 48), (8, 9, 32), (2, 17, 48), (4, 17, 32))
# The pipeline pads the text to max_sequence_length, 226 unless told; no part masks the padding.
TEXT_LENGTHS, TEXT_LENGTH_SHARES = (64, 226), (0.9, 0.1)
ENCODED_LENGTHS, ENCODED_LENGTH_SHARES = TEXT_LENGTHS, (0.8, 0.2)
PATH_POINTS = "root_uniform"  # uniform spends half its steps where the text has no say
HELD_OUT_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


def new_vae() -> AutoencoderKLCogVideoX:
    """An untrained AutoencoderKLCogVideoX: 4x in time and space, 8 latent channels, 0.88 M parameters."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 32, 40),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
        scaling_factor=1.0,
    )


def decode_unclamped(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """AutoencoderKLCogVideoX.decode leaves its output as it is."""
    return vae.decode(latents).sample


def store_statistics(vae: AutoencoderKLCogVideoX, latents: Tensor, variance: Tensor, contrast: Tensor) -> None:
    """One number for all channels, as CogVideoX has it: 1 / deviation, after the channels are mixed inside the VAE.

    One number cannot help what is faint beside the rest: it drowns in noise first, and the transformer learns it last.
    As trained, that was what tells a circle from a square. So the latents are centred, each direction is brought to
    one deviation, and then weighted by how much shapes differ along it.
    """
    flat = latents.double().movedim(1, 0).flatten(1)
    centre = flat.mean(dim=1)
    root = torch.linalg.cholesky(flat.cov(correction=0) + variance.double().diag())
    whiten = torch.linalg.inv(root)
    shares, directions = torch.linalg.eigh(whiten @ contrast.double() @ whiten.T)
    log.info("vae: share of the variance by which shapes differ, by direction: %s", shares.tolist())
    mix = shares.sqrt()[:, None] * directions.T @ whiten
    mix_channels(vae, mix, centre, variance)
    deviation = (mix @ flat).var(dim=1, correction=0).mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    log.info("vae: scaling factor %.5f", vae.config.scaling_factor)


@torch.no_grad()
def mix_channels(vae: AutoencoderKLCogVideoX, mix: Tensor, centre: Tensor, variance: Tensor) -> None:
    """Make latents z ``mix`` [C, C] @ (z - ``centre`` [C]) at the encoder's last layer, and undo it where they are
    read: the decoder's first layer and the spatial norms.

    Rebuilt videos stay the same up to rounding, except at the borders where there is a centre: the decoder's first
    layer pads with zeros. Of the posterior's variance, which no linear layer can mix, ``variance`` [C], its mean
    before the mixing, is kept.
    """
    channels = len(mix)
    last = vae.encoder.conv_out.conv  # means, then logarithms of variances
    means = last.weight[:channels].double().flatten(1)
    last.weight[:channels] = (mix @ means).view_as(last.weight[:channels]).to(last.weight)
    last.bias[:channels] = (mix @ (last.bias[:channels].double() - centre)).to(last.bias)
    last.weight[channels:] = 0
    last.bias[channels:] = (mix.square() @ variance.double()).log().to(last.bias)
    unmix = torch.linalg.inv(mix)
    readers = [vae.decoder.conv_in]
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            readers += [module.conv_y, module.conv_b]
    for reader in readers:
        weight = reader.conv.weight.double()
        reader.conv.bias += weight.sum(dim=(2, 3, 4)) @ centre
        reader.conv.weight.copy_(torch.einsum("oc...,cd->od...", weight, unmix))


def normalise(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """latents · scaling_factor."""
    return latents * vae.config.scaling_factor


def denormalise(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """The inverse of ``normalise``."""
    return latents / vae.config.scaling_factor


def new_text_encoder() -> T5EncoderModel:
    """An untrained T5EncoderModel of 0.11 M parameters, gated as T5 v1.1 is."""
    config = T5Config(
        vocab_size=384,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def encode_prompts(tokenizer: ByT5Tokenizer, encoder: T5EncoderModel, prompts: list[str], length: int) -> Tensor:
    """Text as CogVideoXPipeline encodes it: float [B, length, D]; the padding is encoded like the rest."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return encoder(tokens.input_ids)[0]


def new_transformer() -> CogVideoXTransformer3DModel:
    """An untrained CogVideoXTransformer3DModel of 1.24 M parameters for latents [5, 8, 12, 12]."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_DIM,
        num_layers=4,
        sample_width=SIZE // 4,
        sample_height=SIZE // 4,
        sample_frames=FRAMES,
        max_text_seq_length=max(TEXT_LENGTHS),
        use_rotary_positional_embeddings=True,
    )


def new_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-5B's: no shift of the signal-to-noise ratio, pure noise at the first step, no clipping."""
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def to_network(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2)
