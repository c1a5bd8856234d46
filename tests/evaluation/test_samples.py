"""A sample is a function of (prompt, seed, id): made again from its key it has the same bits, and the pipeline's."""

import pytest
import torch

from alignkit.config import load_config, shipped_config
from alignkit.evaluation.samples import sample_latents
from alignkit.models import load_model
from alignkit_kernels import NoiseKey, Stream, keyed_randn

PROMPTS = ["a red circle moves left on a plain background", "a blue square moves up on a striped background"]
SEED, IDS = 5, [3, 8]


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def made(request):
    """(config, model, latents of PROMPTS from the keys of IDS) of a shipped model."""
    settings = ["sample.num_inference_steps=4", "sample.guidance_scale=3"]
    config = load_config(shipped_config(f"{request.param}-tiny-localdpo.yaml"), settings)
    model = load_model(config.model, device=torch.device("cpu"))
    shape = model.latent_shape(17, 48, 48)
    return config, model, shape, sample_latents(config, model, PROMPTS, IDS, SEED, shape)


def test_a_rollout_is_made_again_from_its_key(made):
    config, model, shape, first = made
    assert torch.equal(sample_latents(config, model, PROMPTS, IDS, SEED, shape), first)
    swapped = sample_latents(config, model, PROMPTS[::-1], IDS[::-1], SEED, shape).flip(0)
    assert torch.equal(swapped, first)
    other = sample_latents(config, model, PROMPTS, IDS, SEED + 1, shape)
    assert (other - first).abs().max() > 0.1


def test_the_pipeline_makes_the_same_of_the_keyed_noise(made):
    config, model, shape, first = made
    noise = keyed_randn((2, *shape), NoiseKey(SEED, torch.tensor(IDS), 0, Stream.ROLLOUT), device="cpu")
    pipeline = type(model.pipeline)(**{**model.pipeline.components, "transformer": model.transformer})
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        height=48,
        width=48,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise,
        max_sequence_length=config.model.max_sequence_length,
        output_type="latent",
    ).frames
    assert torch.equal(theirs, first)
