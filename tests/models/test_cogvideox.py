"""The CogVideoX adapter against its oracle, CogVideoXPipeline, with sin-cos and with rotary positions."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

from alignkit.config import ModelSection
from alignkit.errors import ConfigError, ModelError
from alignkit.localdpo.corruption import regenerate
from alignkit.models import load_model
from alignkit.models.cogvideox import dynamic_guidance, guided, predict
from alignkit_kernels import NoiseKey, Stream

PROMPTS = ["a red circle moves left", "a blue square"]
LENGTH = 24
FRAMES = 17  # 5 latent frames; the small models' configs say 9, so the tables of positions are made anew


def load(path, **more):
    section = ModelSection(family="cogvideox", path=str(path), max_sequence_length=more.pop("length", LENGTH))
    return load_model(section, **more)


@pytest.fixture(scope="module", params=["2b", "5b"])
def both(request, cogvideox_folders):
    """Our model and diffusers' pipeline on the same folder."""
    folder = cogvideox_folders[request.param]
    pipe = CogVideoXPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return load(folder), pipe


def inputs(model):
    return model.pad_text(model.encode_text(PROMPTS)), model.pad_text(model.encode_text(["", ""]))


def start(model, frames, height=16, width=16):
    shape = model.latent_shape(frames, height, width)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def test_text_is_what_the_pipeline_feeds_the_network(both):
    model, pipe = both
    with torch.no_grad():
        theirs, negative = pipe.encode_prompt(PROMPTS[0], max_sequence_length=LENGTH)
    assert torch.equal(model.pad_text(model.encode_text(PROMPTS[:1])), theirs)
    assert torch.equal(model.pad_text(model.encode_text([""])), negative)
    assert negative[0, 1:].abs().min(dim=1).values.max() > 0  # the padding's embeddings are no zeros


@pytest.mark.parametrize(("guidance", "dynamic"), [(1.0, False), (6.0, False), (6.0, True), (0.0, False)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])  # as trained, and wider
def test_samples_equal_the_pipelines_bit_for_bit(both, guidance, dynamic, height, width):
    model, pipe = both
    noise = start(model, FRAMES, height, width)
    theirs = pipe(
        PROMPTS, height=height, width=width, num_frames=FRAMES, num_inference_steps=6, guidance_scale=guidance,
        use_dynamic_cfg=dynamic, latents=noise, max_sequence_length=LENGTH, output_type="latent",
    ).frames  # fmt: skip
    ours = model.sample(noise, *inputs(model), num_steps=6, guidance=guidance, dynamic=dynamic)
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32


def test_dynamic_guidance_is_the_pipelines_scale(cogvideox_folders):
    pipe = CogVideoXPipeline.from_pretrained(cogvideox_folders["5b"])
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe(
        "x", height=16, width=16, num_frames=9, num_inference_steps=50, guidance_scale=6, use_dynamic_cfg=True,
        max_sequence_length=LENGTH, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, given: seen.append((pipe.guidance_scale, t.item())) or {},
    )  # fmt: skip
    assert [scale for scale, _ in seen] == [dynamic_guidance(6, t, 50) for _, t in seen]
    assert all(1 <= scale <= 7 for scale, _ in seen)


def test_decoded_frames_equal_the_pipelines_and_encoding_is_the_inverse_scale(both):
    model, pipe = both
    pixels = torch.randint(0, 256, (1, FRAMES, 16, 16, 3), dtype=torch.uint8)
    latents = model.encode_video(pixels)
    assert latents.shape == (1, *model.latent_shape(FRAMES, 16, 16))
    with torch.no_grad():
        raw = pipe.vae.encode(pixels.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
        video = pipe.decode_latents(latents)
    assert torch.equal(latents.transpose(1, 2), raw * 0.7)
    theirs = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    ours = model.decode_video(latents)[0].numpy() / 255
    assert ours.shape == (FRAMES, 16, 16, 3)
    assert abs(ours - theirs).max() <= 0.5 / 255 + 1e-6  # uint8 rounding


def test_guidance_is_a_line_through_both_branches(both):
    model, _ = both
    state, t = start(model, FRAMES), torch.tensor([500.0, 20.0])
    text, negative = inputs(model)
    one, none = (guided(model.transformer, state, t, x, negative, 1.0) for x in (text, negative))
    got = guided(model.transformer, state, t, text, negative, 3.0)
    torch.testing.assert_close(got, none + 3.0 * (one - none), rtol=0, atol=1e-5)


def test_a_wrapped_network_finds_its_positions(both):
    """An engine has a `config` of its own; the network's is its module's."""
    model, _ = both

    class Engine(SimpleNamespace):
        def __call__(self, **given):
            return self.module(**given)

    state, t, text = start(model, FRAMES), torch.tensor([10.0, 900.0]), inputs(model)[0]
    with torch.no_grad():
        wrapped = predict(Engine(module=model.transformer, config={}), state, t, text)
        assert torch.equal(wrapped, predict(model.transformer, state, t, text))


def test_rotary_positions_depend_on_place_and_sincos_ones_too(both):
    """A video whose frames are all alike comes back with frames that differ: positions reach the network."""
    model, _ = both
    state = start(model, FRAMES)[:1, :1].expand(1, model.latent_grid(FRAMES, 16, 16)[0], -1, -1, -1).contiguous()
    with torch.no_grad():
        out = predict(model.transformer, state, torch.tensor([500.0]), inputs(model)[0][:1])
    assert (out[:, 0] - out[:, -1]).abs().max() > 1e-4


def test_masks_and_latents_lie_in_the_same_layout(both):
    model, _ = both
    grid = model.latent_grid(FRAMES, 16, 24)
    mask = torch.randint(0, 2, grid, dtype=torch.uint8)
    region = model.region_layout(mask)
    shape = model.latent_shape(FRAMES, 16, 24)
    assert torch.broadcast_shapes(region.shape, shape) == shape and region.shape[1] == 1
    assert torch.equal(model.frames_of_mask(region), mask)


def test_a_loser_equals_its_winner_outside_the_mask_bit_for_bit(both):
    model, _ = both
    clean = start(model, FRAMES)
    mask = torch.zeros(2, *model.latent_grid(FRAMES, 16, 16), dtype=torch.uint8)
    mask[:, :, 1:3, 1:3] = 1
    region = torch.stack([model.region_layout(one) for one in mask])
    text, negative = inputs(model)
    loser = regenerate(
        clean,
        region,
        lambda state, t: guided(model.transformer, state, t, text, negative, 6.0),
        model.schedule(5),
        NoiseKey(0, torch.tensor([3, 8]), 0, Stream.CORRUPTION),
        4,
    )
    inside = region.bool().expand_as(clean)
    assert torch.equal(loser[~inside], clean[~inside])
    assert (loser[inside] != clean[inside]).all()


def test_sizes_that_do_not_fit_are_refused(cogvideox_folders):
    model = load(cogvideox_folders["2b"])
    assert model.latent_shape(9, 16, 24) == (3, 4, 4, 6) and model.latent_grid(9, 16, 24) == (3, 4, 6)
    for frames, height, width, name in ((13, 16, 16, "num_frames"), (9, 20, 16, "height"), (9, 16, 12, "width")):
        with pytest.raises(ConfigError, match=f"data.{name}"):
            model.latent_shape(frames, height, width)


def test_an_even_number_of_latent_frames_would_come_back_longer(cogvideox_folders):
    """Why 4·n + 1 frames are not enough: 13 become 4 latent frames, and these 16."""
    vae = load(cogvideox_folders["5b"], with_transformer=False).vae
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 13, 16, 16)).latent_dist.mode()
        assert latents.shape[2] == 4 and vae.decode(latents).sample.shape[2] == 16


def test_patches_of_several_latent_frames_are_refused(cogvideox_folders, tmp_path):
    shutil.copytree(cogvideox_folders["5b"], tmp_path / "m")
    file = tmp_path / "m/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size_t": 2}))
    with pytest.raises(ModelError, match=r"CogVideoX 1\.5 is not supported"):
        load(tmp_path / "m")


def test_text_lengths_that_the_positions_do_not_hold_are_refused(cogvideox_folders):
    with pytest.raises(ConfigError, match="table of positions holds 24 text tokens, got 23"):
        load(cogvideox_folders["2b"], length=23)
    assert load(cogvideox_folders["5b"], length=23).max_sequence_length == 23
    with pytest.raises(ConfigError, match="knows up to 24 text tokens, got 512"):
        load(cogvideox_folders["5b"], length=512)


def test_stored_text_of_another_length_is_refused(cogvideox_folders):
    model = load(cogvideox_folders["5b"], with_encoders=False)
    with pytest.raises(ConfigError, match="stored text has 23 tokens"):
        model.pad_text([torch.zeros(24, 16), torch.zeros(23, 16)])


def with_scheduler(folder, target, **changes):
    shutil.copytree(folder, target)
    file = target / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def test_a_dpm_folder_is_sampled_with_ddim_and_says_so(cogvideox_folders, tmp_path, capsys):
    folder = with_scheduler(cogvideox_folders["5b"], tmp_path / "m", _class_name="CogVideoXDPMScheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "CogVideoXDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert isinstance(CogVideoXPipeline.from_pretrained(folder).scheduler, CogVideoXDPMScheduler)
    model, plain = load(folder), load(cogvideox_folders["5b"])
    said = capsys.readouterr()
    assert "starting noise by 0; sampling with DDIM" in said.out + said.err
    noise = start(plain, 9)
    samples = [m.sample(noise, *inputs(plain), num_steps=4, guidance=6.0) for m in (model, plain)]
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one"),
        ({"timestep_spacing": "bogus"}, "cannot be walked: bogus is not supported"),
        ({"timestep_spacing": "leading", "steps_offset": 50}, "cannot be walked: index 1000"),
        ({"trained_betas": [0.1] * 10}, "trained_betas has 10 numbers, but num_train_timesteps is 1000"),
        ({"trained_betas": [-0.1] * 1000}, "its noise does not fall within"),
        ({"trained_betas": [0.0] * 1000, "rescale_betas_zero_snr": False}, "its steps do not each lead to less noise"),
        ({"snr_shift_scale": 0}, "snr_shift_scale is 0, not a number above 0"),
    ],
)
def test_schedulers_that_are_not_cogvideox_are_refused(cogvideox_folders, tmp_path, changes, named):
    folder = with_scheduler(cogvideox_folders["5b"], tmp_path / "m", **changes)
    with pytest.raises(ModelError, match=rf"model\.path: .*scheduler/scheduler_config\.json: {named}"):
        load(folder, with_transformer=False, with_encoders=False)


def test_more_steps_than_timesteps_are_refused(cogvideox_folders):
    model = load(cogvideox_folders["2b"], with_transformer=False, with_encoders=False)
    assert len(model.schedule(1000)) == 1000
    sample = partial(model.sample, torch.zeros(1), torch.zeros(1), torch.zeros(1), guidance=1.0)
    for walk in (model.schedule, model.first_order, lambda steps: sample(num_steps=steps)):
        with pytest.raises(ConfigError, match=r"num_inference_steps: 1001, but .*1000 timesteps .*no more steps"):
            walk(1001)


def test_a_folder_of_the_other_family_is_refused(cogvideox_folders):
    with pytest.raises(ModelError, match="a CogVideoXPipeline, not a WanPipeline"):
        load_model(ModelSection(family="wan", path=str(cogvideox_folders["2b"])))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_and_truncated_weights_are_refused(cogvideox_folders, tmp_path, part):
    shutil.copytree(cogvideox_folders["2b"], tmp_path / "m")
    (weights,) = (tmp_path / "m" / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path / "m")
