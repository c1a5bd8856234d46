"""The shipped weights: small, loadable by diffusers alone, and as good and as bad as their cards say.

The clean models, `tests/tiny/clean`, are what could be reached: the bases that ship were them, before the mixed set.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.config import load_config, shipped_config
from alignkit.errors import ModelError
from alignkit.models import shipped_model
from alignkit.tiny.check import PROMPT_SEED, sample, shares_right
from alignkit.tiny.classifier import FILES, NAMED, classify, features
from alignkit.tiny.clips import caption_of, random_attributes, render_clip
from alignkit.tiny.detector import fault_scores
from alignkit.tiny.recipes import FAMILIES, recipe_of
from alignkit.tiny.vae import decode_latents, encode_clips, to_unit

LOAD_ALONE = """
import socket, sys
socket.socket.connect = lambda *a: sys.exit("a connection was tried")
import diffusers
pipe = getattr(diffusers, sys.argv[2]).from_pretrained(sys.argv[1])
frames = pipe("a red circle moves left on a plain background", height=48, width=48, num_frames=17,
              num_inference_steps=2, output_type="np").frames
assert frames.shape == (1, 17, 48, 48, 3), frames.shape
assert not any(name.split(".")[0] == "alignkit" for name in sys.modules)
print(sum(p.numel() for p in pipe.transformer.parameters()))
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    pipeline = recipe_of(family).PIPELINE.from_pretrained(shipped_model(family))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_all_shipped_files_of_a_family_are_at_most_ten_megabytes(family):
    files = [path for path in shipped_model(family).rglob("*") if path.is_file()]
    files.append(FILES["judge"])
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_diffusers_loads_the_folder_without_network_or_alignkit(family, plain_diffusers):
    printed = plain_diffusers(LOAD_ALONE, shipped_model(family), recipe_of(family).PIPELINE.__name__)
    assert 1e6 < int(printed.split()[-1]) < 1.3e6
    index = json.loads((shipped_model(family) / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "ByT5Tokenizer"]


def test_text_is_encoded_as_the_pipeline_encodes_it(family, pipeline):
    prompts = ["a red circle moves left on a plain background", ""]
    recipe = recipe_of(family)
    for length in recipe.TEXT_LENGTHS:
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
            ours = recipe.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts, length)
        assert torch.equal(ours, theirs)


def test_the_vae_rebuilds_unseen_clips_and_its_statistics_fit(family, pipeline):
    clips = np.stack([render_clip(71, index).frames for index in range(16)])
    latents = encode_clips(pipeline.vae, clips)
    assert latents.shape == (16, 8, 5, 12, 12)
    rebuilt = decode_latents(pipeline.vae, latents)
    error = ((rebuilt.astype(float) - clips) ** 2).mean(axis=(1, 2, 3, 4))
    assert (10 * np.log10(255**2 / error)).mean() > 27
    # The statistics are those of posterior samples. 16 clips are few: they may be off by some tenths.
    with torch.no_grad():
        posterior = pipeline.vae.encode(to_unit(clips)).latent_dist
    scaled = recipe_of(family).normalise(pipeline.vae, posterior.sample(torch.Generator().manual_seed(0)))
    if family == "wan":  # it scales by channel; CogVideoX has one number for all
        assert scaled.mean(dim=(0, 2, 3, 4)).abs().max() < 0.3
        assert scaled.std(dim=(0, 2, 3, 4)).log().abs().max() < np.log(1.3)
    assert abs(np.log(scaled.std().item())) < np.log(1.15)


def test_the_classifier_names_unseen_clips_also_after_the_vae(pipeline):
    rendered = [render_clip(72, index) for index in range(96)]
    clips = np.stack([clip.frames for clip in rendered])
    rebuilt = decode_latents(pipeline.vae, encode_clips(pipeline.vae, clips[:48]))
    for frames in (clips, rebuilt):
        named = classify(frames)
        for name in NAMED:
            wrong = sum(clip.attributes[name] != got for clip, got in zip(rendered, named[name], strict=False))
            assert wrong <= 1, name
    vectors = features(clips)
    assert vectors.shape == (96, 304) and vectors.dtype == np.float32


def test_the_classifier_refuses_other_shapes():
    with pytest.raises(ModelError, match="uint8 clips"):
        classify(np.zeros((2, 9, 48, 48, 3), np.uint8))


CLEAN = Path(__file__).parent / "clean"


def of_the_demo(family):
    settings = load_config(shipped_config(f"{family}-tiny-localdpo.yaml")).sample
    return {"steps": settings.num_inference_steps, "guidance": settings.guidance_scale}


def test_the_clean_model_draws_what_is_prompted_and_the_base_that_ships_does_it_worse(family, pipeline):
    """32 samples from the same noise at the demo's settings; the draws are fixed."""
    attributes = [random_attributes(PROMPT_SEED, index) for index in range(32)]
    prompts = [caption_of(entry) for entry in attributes]
    shipped = pipeline.transformer
    clean = type(shipped).from_pretrained(CLEAN / family / "transformer")
    faulty, right = {}, {}
    for name, network in (("shipped", shipped), ("clean", clean)):
        pipeline.transformer = network
        frames = sample(pipeline, prompts, seed=0, **of_the_demo(family))
        faulty[name], right[name] = (fault_scores(frames) > 0.5).sum(), shares_right(frames, attributes)["all"]
    pipeline.transformer = shipped
    # At true rates of 0.9 and 0.7, fewer than 25 and 17 of 32 have a chance of 1 % each.
    assert right["clean"] >= 25 / 32 and right["shipped"] >= 17 / 32
    # At a true rate of 0.4, fewer than 7 of 32 have a chance of 1 %.
    assert 7 <= faulty["shipped"] <= 25 and faulty["clean"] <= faulty["shipped"] / 2, (faulty, right)


def test_samples_are_repeatable_and_depend_on_their_own_generator_only(pipeline):
    prompts = ["a blue square moves up on a striped background", "a red circle moves down on a plain background"]
    both = sample(pipeline, prompts, seed=3, steps=3)
    assert np.array_equal(both, sample(pipeline, prompts, seed=3, steps=3))
    alone = sample(pipeline, prompts[:1], seed=3, steps=3)
    assert np.abs(both[:1].astype(int) - alone).max() <= 1  # other batch, other rounding
