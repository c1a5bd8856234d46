"""The Wan adapter against its oracle, WanPipeline, and against models that are not what they should be."""

import json
import os
import shutil

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from alignkit.config import ModelSection
from alignkit.errors import ConfigError, ModelError
from alignkit.models import load_model, shipped_model, weights
from alignkit.models.wan import guided
from alignkit.training.distributed import start_process
from alignkit.training.loop import train

PROMPTS = ["a red circle moves left on a plain background", "a blue square moves up on a striped background"]


@pytest.fixture(scope="module")
def pipeline():
    pipe = WanPipeline.from_pretrained(shipped_model("wan"))
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_is_what_the_pipeline_feeds_the_network(wan, pipeline):
    ours = wan.pad_text(wan.encode_text([*PROMPTS, ""]))
    for prompt, embedding in zip([*PROMPTS, ""], ours, strict=True):
        with torch.no_grad():  # as the pipeline's own call does
            theirs, _ = pipeline.encode_prompt(prompt, max_sequence_length=64)
        assert torch.equal(embedding, theirs[0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_equal_the_pipelines_bit_for_bit(wan, pipeline, guidance):
    noise = torch.randn(2, *wan.latent_shape(17, 48, 48), generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        PROMPTS, height=48, width=48, num_frames=17, num_inference_steps=5, guidance_scale=guidance,
        latents=noise, max_sequence_length=64, output_type="latent",
    ).frames  # fmt: skip
    text, negative = wan.pad_text(wan.encode_text(PROMPTS)), wan.pad_text(wan.encode_text(["", ""]))
    ours = wan.sample(noise, text, negative, num_steps=5, guidance=guidance)
    assert torch.equal(ours, theirs)


def test_decoded_frames_equal_the_pipelines(wan, pipeline):
    latents = wan.encode_video(torch.randint(0, 256, (1, 17, 48, 48, 3), dtype=torch.uint8))
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = pipeline.vae.decode(latents * std + mean).sample
    theirs = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    ours = wan.decode_video(latents)[0].numpy() / 255
    assert abs(ours - theirs).max() <= 0.5 / 255 + 1e-6  # uint8 rounding


def test_guidance_is_a_line_through_both_branches(wan):
    state = torch.randn(1, *wan.latent_shape(17, 48, 48))
    text, negative = wan.pad_text(wan.encode_text(PROMPTS[:1])), wan.pad_text(wan.encode_text([""]))
    t = torch.tensor([500.0])
    one, none = (guided(wan.transformer, state, t, x, negative, 1.0) for x in (text, negative))
    got = guided(wan.transformer, state, t, text, negative, 3.0)
    torch.testing.assert_close(got, none + 3.0 * (one - none), rtol=0, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused(wan):
    assert wan.latent_shape(17, 48, 64) == (8, 5, 12, 16)
    for frames, height, width, name in ((16, 48, 48, "num_frames"), (17, 50, 48, "height"), (17, 48, 52, "width")):
        with pytest.raises(ConfigError, match=f"data.{name}"):
            wan.latent_shape(frames, height, width)


def load(path):
    return load_model(ModelSection(path=str(path)))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "nothing")


def test_other_pipeline_is_refused(tmp_path):
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    index = json.loads((tmp_path / "m/model_index.json").read_text())
    (tmp_path / "m/model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoXPipeline"}))
    with pytest.raises(ModelError, match="a CogVideoXPipeline, not a WanPipeline"):
        load(tmp_path / "m")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_and_truncated_weights_are_refused(tmp_path, part):
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    (weights,) = (tmp_path / "m" / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path / "m")


def test_fingerprint_follows_the_weights(tmp_path, wan):
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    assert load(tmp_path / "m").fingerprint() == wan.fingerprint()
    (weights,) = (tmp_path / "m/transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert load(tmp_path / "m").fingerprint() != wan.fingerprint()


def resharded(folder, shards: int, variant: str | None = None) -> None:
    """The same transformer in `shards` files, or in one of another name."""
    (single,) = folder.glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    if shards == 1:
        save_file(tensors, folder / f"diffusion_pytorch_model.{variant}.safetensors")
        return
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_a_fingerprint_is_of_the_tensors_not_of_their_files(tmp_path, wan):
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    resharded(tmp_path / "m/transformer", 3)
    model = load(tmp_path / "m")
    assert model.fingerprint() == wan.fingerprint()
    config = tmp_path / "m/transformer/config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_name_or_path": "elsewhere"}))
    assert model.fingerprint() == wan.fingerprint()
    config.write_text(json.dumps(settings | {"eps": 1e-3}))
    assert model.fingerprint() != wan.fingerprint()


def test_a_fingerprint_is_computed_once_on_a_machine_and_never_taken_for_other_weights(tmp_path, wan, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    computed, compute = [], weights._compute
    monkeypatch.setattr(weights, "_compute", lambda *given: computed.append(given) or compute(*given))
    model = load(tmp_path / "m")
    assert model.fingerprint() == model.fingerprint() == wan.fingerprint() and len(computed) == 2  # ours, and wan's
    (file,) = (tmp_path / "m/transformer").glob("*.safetensors")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=times)  # as a copy that keeps times
    assert model.fingerprint() != wan.fingerprint() and len(computed) == 3


def test_weights_of_a_variant_are_loaded_by_its_name_and_missed_by_name(tmp_path, half_base, half_wan, run_with_pairs):
    shutil.copytree(half_base, tmp_path / "m")
    resharded(tmp_path / "m/transformer", 1, "fp16")
    with pytest.raises(ModelError, match=r"no such file; set model\.variant=fp16.*model\.fp16\.safetensors"):
        load_model(ModelSection(path=str(tmp_path / "m")), with_encoders=False)
    section = ModelSection(path=str(tmp_path / "m"), variant="fp16")
    model = load_model(section)
    assert all(map(torch.equal, model.transformer.state_dict().values(), half_wan.transformer.state_dict().values()))
    assert model.fingerprint() == half_wan.fingerprint()
    config, _ = run_with_pairs("run", f"model.path={tmp_path / 'm'}", "model.variant=fp16", "train.steps=1")
    assert train(config, start_process())


@pytest.fixture(scope="module")
def schedulers(tmp_path_factory):
    """`schedulers(flow_shift=0)`: loads a model, without its weights, whose scheduler has that option."""
    folder = tmp_path_factory.mktemp("schedulers") / "m"
    shutil.copytree(shipped_model("wan"), folder)
    file = folder / "scheduler/scheduler_config.json"
    shipped = json.loads(file.read_text())

    def load(**options):
        file.write_text(json.dumps(shipped | options))
        return load_model(ModelSection(path=str(folder)), with_transformer=False, with_encoders=False)

    return load


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("use_dynamic_shifting", True, "is True; on Wan's path it is False"),
        ("use_flow_sigmas", False, "is False; on Wan's path it is True"),
        ("use_exponential_sigmas", True, "is True"),
        ("use_beta_sigmas", True, "is True"),
        ("use_karras_sigmas", True, "is True"),
        ("final_sigmas_type", "sigma_min", "is 'sigma_min'"),
        ("prediction_type", "epsilon", "is 'epsilon'"),
        ("thresholding", True, "is True"),
        ("predict_x0", False, "is False"),
        ("shift_terminal", 0.1, r"is 0\.1"),
        ("flow_shift", None, "is None, not a number above 0"),
        ("flow_shift", "3", "is '3', not a number above 0"),
        ("flow_shift", 0, "is 0, not a number above 0"),
    ],
)
def test_schedulers_of_another_path_are_refused(schedulers, option, value, words):
    with pytest.raises(ModelError, match=rf"model\.path: .*scheduler/scheduler_config\.json: {option} {words}"):
        schedulers(**{option: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timestep_spacing": "bogus"}, "cannot be walked: bogus is not supported"),
        ({"flow_shift": 1e9}, "its noise does not fall within"),
    ],
)
def test_paths_that_do_not_lead_to_clean_latents_are_refused(schedulers, options, words):
    with pytest.raises(ModelError, match=rf"model\.path: .*scheduler/scheduler_config\.json: {words}"):
        schedulers(**options)


def test_options_that_change_no_state_are_taken(schedulers, wan):
    model = schedulers(use_dynamic_shifting=None, steps_offset=5, timestep_spacing="trailing", solver_order=3)
    assert model.schedule(20).fingerprint == wan.schedule(20).fingerprint


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("asked again"))
    with pytest.raises(ModelError, match=r"the hub cannot be reached .*hf download some/model --local-dir FOLDER"):
        load("some/model")


def test_a_prompt_that_is_cut_is_said(wan, capfd):
    wan.encode_text(["a cat " * 60])
    assert "tokens is cut to 64 (model.max_sequence_length): a cat a cat" in capfd.readouterr().err
    wan.encode_text(["a short cat"])
    assert "cut" not in capfd.readouterr().err


def test_a_transformer_that_lacks_a_weight_is_refused(tmp_path):
    """diffusers draws it anew and says so in a warning."""
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    (file,) = (tmp_path / "m/transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"m/transformer: holds no blocks\.1\.attn1\.to_q\.weight"):
        load(tmp_path / "m")


def test_warnings_of_libraries_about_a_users_model_are_seen(command, tmp_path):
    shutil.copytree(shipped_model("wan"), tmp_path / "m")
    (file,) = (tmp_path / "m/transformer").glob("*.safetensors")
    save_file(load_file(file) | {"blocks.0.what_is_this": torch.zeros(2)}, file)
    code = (
        "import sys\nfrom alignkit.preparing import quiet_libraries\nquiet_libraries()\n"
        "from alignkit.config import ModelSection\nfrom alignkit.models import load_model\n"
        "load_model(ModelSection(path=sys.argv[1]), with_encoders=False)\n"
    )
    result = command(tmp_path / "m", python=("-c", code), fresh=True)
    assert result.returncode == 0 and "what_is_this" in result.stderr, result.stderr
    assert "experimental feature" not in result.stderr
