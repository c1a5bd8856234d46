"""Small CogVideoX folders with random weights: one with each kind of positions."""

import pytest
import torch

KINDS = {
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {"use_rotary_positional_embeddings": True},
}
"""Sin-cos positions and rotary ones."""
TEXT_LENGTH = 24


@pytest.fixture(scope="session")
def build_cogvideox():
    """`build_cogvideox(folder, kind)` writes a CogVideoXPipeline of some thousand random weights."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    def build(folder, kind, **scheduler):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
            max_text_seq_length=TEXT_LENGTH, **KINDS[kind],
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            sample_height=16, sample_width=16, scaling_factor=0.7,
        )  # fmt: skip
        text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        settings = {
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
            "snr_shift_scale": 3.0 if kind == "2b" else 1.0,
        } | scheduler  # fmt: skip
        CogVideoXPipeline(
            tokenizer=ByT5Tokenizer(), text_encoder=T5EncoderModel(text), vae=vae, transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(**settings),
        ).save_pretrained(folder)  # fmt: skip
        return folder

    return build


@pytest.fixture(scope="session")
def cogvideox_folders(build_cogvideox, tmp_path_factory):
    """Folder by kind."""
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: build_cogvideox(root / kind, kind) for kind in KINDS}
