"""The configurations of the full models: every number in them goes through the code that a run would take."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

from alignkit.apo.students import teacher_rows
from alignkit.config import ModelSection, load_config
from alignkit.config.batches import accumulation_steps
from alignkit.localdpo.masks import region_mask
from alignkit.models import family_module, load_model
from alignkit.models.cogvideox import CogVideoXModel
from alignkit.models.wan import WanModel
from alignkit.stages import stage_configs
from alignkit.training.lora import add_lora
from alignkit.training.settings import deepspeed_config

CONFIGS = Path(__file__).parent.parent / "configs"
# parameters as diffusers builds them; tokens of one video, which with the text are what attention sees
SIZES = {
    "wan2.1-1.3b": (1_418_996_800, 21 * 30 * 52),
    "wan2.1-14b": (14_288_491_584, 21 * 30 * 52),
    "wan2.2-a14b": (14_288_491_584, 21 * 30 * 52),  # one of its two experts
    "cogvideox-2b": (1_693_783_872, 13 * 30 * 45),
    "cogvideox-5b": (5_570_283_072, 13 * 30 * 45),
}
CHAINS = [name for name in SIZES if name != "wan2.2-a14b"]
"""Those that may sample while they train."""
COGVIDEOX_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}
PARTS = {"wan": (WanModel, AutoencoderKLWan, {}), "cogvideox": (CogVideoXModel, AutoencoderKLCogVideoX, COGVIDEOX_VAE)}


def parts(name: str, *overrides: str, recipe: str = "localdpo"):
    config = load_config(CONFIGS / f"{name}-{recipe}.yaml", ["data.videos=clips", *overrides])
    adapter, vae, options = PARTS[config.model.family]
    architecture = json.loads((CONFIGS / "architectures" / f"{name}.json").read_text())
    with init_empty_weights(include_buffers=False):
        network = family_module(config.model.family).build_transformer(architecture)
        pipeline = SimpleNamespace(vae=vae(**options))
    length = config.model.max_sequence_length
    return config, adapter("nowhere", length, None, pipeline.vae.config, network, pipeline), network


@pytest.mark.parametrize(
    ("name", "recipe"), [(n, r) for r in ("localdpo", "apo") for n in (SIZES if r != "apo" else CHAINS)]
)
def test_the_real_architecture_fits_its_configuration(name, recipe):
    config, model, network = parts(name, recipe=recipe)
    count, tokens = SIZES[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    data = config.data
    frames, rows, columns = model.latent_grid(data.num_frames, data.height, data.width)
    assert frames * rows * columns // 4 == tokens
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    mask = region_mask((frames, rows, columns), (data.height, data.width), config.pairs.mask, seed=0, pair_id=0)
    assert torch.empty(shape, device="meta").shape == torch.broadcast_shapes(model.region_layout(mask).shape, shape)
    for processes in (1, 8, 64):
        process = SimpleNamespace(device=torch.device("cpu"), world_size=processes)
        for _, stage in stage_configs(config) or [("", config)]:
            settings = deepspeed_config(stage, process)
            assert settings["zero_optimization"]["stage"] == 3
            assert settings["train_batch_size"] == 128 == processes * accumulation_steps(stage, processes)


@pytest.mark.parametrize("name", CHAINS)
def test_the_students_steps_are_among_its_teachers(name):
    """On the schedules of the published models: Wan's shift for 480p and 720p, CogVideoX's of the 2B and the 5B."""
    config, model, _ = parts(name, recipe="apo")
    wan = config.model.family == "wan"
    key, values = ("flow_shift", (3.0, 5.0)) if wan else ("snr_shift_scale", (3.0, 1.0))
    for value in values:
        section = ModelSection(family=config.model.family, max_sequence_length=64)
        tiny = load_model(section, with_transformer=False, with_encoders=False)
        model.scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config, **{key: value})
        assert teacher_rows(config, model) == tuple(
            range(0, config.student.teacher_steps, config.student.teacher_steps // 4)
        )


@pytest.mark.parametrize("name", SIZES)
def test_one_training_forward_has_the_shapes_it_should(name):
    """On the meta device: shapes alone, no numbers."""
    config, model, network = parts(name)
    data = config.data
    state = torch.empty(2, *model.latent_shape(data.num_frames, data.height, data.width), device="meta")
    text = torch.empty(2, config.model.max_sequence_length, 4096, device="meta")
    network.to("meta")
    output = family_module(config.model.family).predict(network, state, torch.empty(2, device="meta"), text)
    assert output.shape == state.shape


@pytest.mark.parametrize("name", SIZES)
def test_the_published_recipe_puts_adapters_on_every_attention(name):
    config, _, network = parts(name, "train.lora={}", "train.learning_rate=5e-6")
    with torch.device("meta"):
        add_lora(network, config.train.lora, seed=0)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    attentions = len({key.split(".to_")[0] for key in trained})
    blocks = json.loads((CONFIGS / "architectures" / f"{name}.json").read_text())["num_layers"]
    assert attentions == blocks * (2 if config.model.family == "wan" else 1)  # Wan's text has an attention of its own
    assert len(trained) == attentions * 4 * 2 and all("lora_" in key for key in trained)
    assert (config.train.lora.rank, config.train.lora.alpha) == (64, 128)
