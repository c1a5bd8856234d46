"""Two experts that take turns along the path: as WanPipeline has them, and what each of them may be trained at."""

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline

from alignkit.config import ModelSection, load_config
from alignkit.errors import ConfigError, ModelError
from alignkit.localdpo.build import build_pairs, guided_network, guided_text
from alignkit.models import load_model, wan
from alignkit.objectives.laws import start_law
from alignkit.planning.constants import gpu_named
from alignkit.planning.plan import plan
from alignkit.planning.report import report
from alignkit.stages import stage_configs
from alignkit.stores.pairs import PairStore
from alignkit.training.heldout import rows_of

CPU = torch.device("cpu")
PROMPTS = ["a red circle moves left on a plain background", "a blue square moves up on a striped background"]
MANY = 20_000


def load(folder, expert, **more):
    return load_model(ModelSection(path=str(folder), expert=expert, max_sequence_length=64, **more))


@pytest.fixture(scope="module")
def pipeline(two_experts):
    pipe = WanPipeline.from_pretrained(two_experts)
    for part in (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder):
        part.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def settings(two_experts, config_file, overrides, tmp_path):
    """`settings("model.expert=low")`: a configuration of a few seconds with both experts."""
    return lambda *more: load_config(config_file, overrides(tmp_path / "run", f"model.path={two_experts}", *more))


@pytest.mark.parametrize(("guidance", "second"), [(1.0, None), (4.0, None), (4.0, 2.0), (4.0, 1.0), (1.0, 3.0)])
def test_samples_equal_the_pipelines_bit_for_bit(two_experts, pipeline, guidance, second):
    model = load(two_experts, "high", guidance_scale_2=second)
    noise = torch.randn(2, *model.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(0))
    called = []
    for part in ("transformer", "transformer_2"):
        getattr(model.transformer, part).register_forward_hook(lambda *_, part=part: called.append(part))
    theirs = pipeline(
        PROMPTS, height=32, width=32, num_frames=9, num_inference_steps=5, guidance_scale=guidance,
        guidance_scale_2=second, latents=noise, max_sequence_length=64, output_type="latent",
    ).frames  # fmt: skip
    text, negative = (model.pad_text(model.encode_text(prompts)) for prompts in (PROMPTS, ["", ""]))
    ours = model.sample(noise, text, negative, num_steps=5, guidance=guidance)
    assert torch.equal(ours, theirs)
    branches = 1 if guidance == 1 else 2
    high, low = 3 * branches * ["transformer"], 2 * branches * ["transformer_2"]
    assert called == high + low, "at 999, 922, 818; at 666, 428"
    other = load(two_experts, "low", guidance_scale_2=second)
    assert torch.equal(other.sample(noise, text, negative, num_steps=5, guidance=guidance), ours), "as one, by either"


def test_a_timestep_at_the_boundary_is_the_high_experts(two_experts, pipeline):
    model = load(two_experts, "high")
    state, text = torch.randn(1, *model.latent_shape(9, 32, 32)), model.pad_text(model.encode_text(PROMPTS[:1]))
    for t, network in ((800, pipeline.transformer), (799.9, pipeline.transformer_2)):
        inputs = state, torch.tensor([t]), text
        with torch.no_grad():
            assert torch.equal(wan.predict(model.transformer, *inputs), wan.predict(network, *inputs))
    with pytest.raises(AssertionError, match="both sides"):
        wan.predict(
            model.transformer, state.expand(2, -1, -1, -1, -1), torch.tensor([800, 799]), text.expand(2, -1, -1)
        )


def test_regions_are_redone_by_both_as_the_pipeline_takes_them(settings, pipeline):
    config = settings("model.expert=low", "model.guidance_scale_2=2.0", "pairs.guidance_scale=4.0")
    model = load_model(config.model, device=CPU)
    texts = guided_text(config, model, PROMPTS[:1], CPU)
    predict, state = guided_network(config, model, texts), torch.randn(1, *model.latent_shape(9, 32, 32))
    for t, network, scale in ((900.0, pipeline.transformer, 4.0), (750.0, pipeline.transformer_2, 2.0)):
        at = torch.tensor([t])
        with torch.no_grad():
            wanted = wan.guided(network, state, at, *texts, scale)
            assert torch.equal(predict(state, at), wanted)


def test_pairs_are_those_of_both_whichever_is_trained(settings, tmp_path):
    first = settings("model.expert=high")
    build_pairs(first, CPU)
    store = PairStore(first.output.dir / "pairs/train")
    again = settings("model.expert=low")
    build_pairs(again, CPU)  # found, not made again
    assert PairStore(again.output.dir / "pairs/train").fingerprint == store.fingerprint
    assert store.info.model == load_model(again.model, with_transformer=False, with_encoders=False).fingerprint()


def test_what_samples_is_told_from_others(two_experts, tmp_path):
    """The pairs of two experts depend on both, and on where they change."""
    prints = {
        load_model(
            ModelSection(path=str(two_experts), expert="low"), with_transformer=False, with_encoders=False
        ).fingerprint()
    }
    for part in ("transformer", "transformer_2", None):
        folder = tmp_path / str(part)
        shutil.copytree(two_experts, folder)
        if part:
            shutil.copy(two_experts / "transformer" / "config.json", folder / part / "config.json")
            (file,) = (folder / part).glob("*.safetensors")
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        else:
            index = json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.9}))
        section = ModelSection(path=str(folder), expert="low")
        prints.add(load_model(section, with_transformer=False, with_encoders=False).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize("law", ["logit_normal", "uniform", "schedule", "adaptive"])
@pytest.mark.parametrize("more", [(), ("noise.interval=[0.5,0.9]",)])
def test_every_law_stays_with_its_expert_and_keeps_its_shape_there(settings, two_experts, config_file, law, more):
    keys = f"noise.timesteps={law}", "rollout.num_inference_steps=20", *more
    ids, epochs = torch.arange(MANY), torch.zeros(MANY, dtype=torch.int64)
    whole = start_law(settings(*keys), load_model(ModelSection(), with_transformer=False, with_encoders=False))
    free = whole.draw(ids, epochs).timesteps
    for expert, inside in (("high", free >= 800), ("low", free < 800)):
        config = settings(f"model.expert={expert}", *keys)
        made = start_law(config, load_model(config.model, with_transformer=False, with_encoders=False))
        drawn = made.draw(ids, epochs).timesteps
        assert (drawn >= 800).all() if expert == "high" else (drawn < 800).all()
        if more:
            assert drawn.min() >= 500 and drawn.max() <= 900
        error = 4 * (drawn.var() / len(drawn) + free[inside].var() / inside.sum()).sqrt()
        assert abs(drawn.mean() - free[inside].mean()) < error
        rows = (made.masses > 0).nonzero()[:, 0]
        assert torch.equal(rows, made.allowed) and made.masses.sum() == pytest.approx(1)
        assert (made.schedule.timesteps[rows] >= 800).all() == (expert == "high")


def test_held_out_pairs_are_looked_at_in_the_experts_range(settings):
    model = {}
    for expert, rows in (("high", [0, 1]), ("low", [2, 3])):
        config = settings(f"model.expert={expert}", "evaluation.positions=[0.0, 0.25, 0.5, 0.75]")
        model[expert] = load_model(config.model, with_transformer=False, with_encoders=False)
        assert rows_of(config, model[expert]) == rows
    for expert, position, word in (("high", 0.5, "lower"), ("low", 0.25, "higher")):
        config = settings(f"model.expert={expert}", f"evaluation.positions=[{position}]")
        with pytest.raises(ConfigError, match=f"evaluation.positions: none .* model.expert {expert}; add {word} ones"):
            rows_of(config, model[expert])


def test_an_expert_that_is_none_is_refused_before_weights_load(two_experts, cogvideox_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit.models.wan.load_transformer", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("alignkit.models.cogvideox.load_transformer", lambda *_: pytest.fail("weights were loaded"))
    one = ModelSection(family="cogvideox", path=str(cogvideox_folders["5b"]), expert="low", max_sequence_length=24)
    for section in (one, ModelSection(expert="low")):
        with pytest.raises(ConfigError, match=r"model.expert: .* has one network, not two experts; leave it out"):
            load_model(section)
    with pytest.raises(ConfigError, match=r"model.expert: .* has two experts.*: high, at noise from 0\.8 .*or low"):
        load_model(ModelSection(path=str(two_experts)))
    changes = {"transformer_2": [None, None]}, {"boundary_ratio": None, "expand_timesteps": True}
    words = "has a boundary_ratio and no transformer_2", "expand_timesteps is on: Wan2.2's 5B is not supported"
    index = json.loads((two_experts / "model_index.json").read_text())
    for number, (change, word) in enumerate(zip(changes, words, strict=True)):
        folder = tmp_path / str(number)
        shutil.copytree(two_experts, folder)
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ModelError, match=word):
            load_model(ModelSection(path=str(folder), expert=None if number else "low"))


def test_a_second_network_that_the_pipeline_does_not_use_is_not_an_expert(two_experts, tmp_path):
    shutil.copytree(two_experts, tmp_path / "m")
    index = json.loads((two_experts / "model_index.json").read_text())
    (tmp_path / "m/model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    model = load(tmp_path / "m", None)
    assert model.boundary is None and type(model.transformer).__name__ == "WanTransformer3DModel"
    assert "transformer_2" not in {name for name, part in model.pipeline.components.items() if part is not None}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["train.validate_every=2"], "train.validate_samples: a run holds one of two experts"),
        (["noise.source=inversion", "noise.path_between=true"], "noise.path_between: not with model.expert"),
        (["noise.source=initial", "noise.guided=true", "model.guidance_scale_2=2"], "noise.guided: has one scale"),
        (["model.expert=null", "model.guidance_scale_2=2"], "guidance_scale_2: is the low expert's"),
        (["stages=[online]", "data.prompts=p.txt"], r"entry 1 \(online\): model.expert: this stage samples through"),
        (["stages=[distill]", "data.prompts=p.txt"], r"entry 1 \(distill\): model.expert: this stage samples through"),
    ],
)
def test_what_needs_both_at_once_is_refused_by_name(settings, keys, words):
    with pytest.raises(ConfigError, match=words):
        stage_configs(settings("model.expert=low", *keys))


def test_the_plan_counts_one_for_training_and_both_for_sampling(settings):
    """The same as of either network alone but for what samples and what is exported."""
    gpu = gpu_named("H200")
    names = ("wan2.2-a14b-localdpo", "wan2.1-14b-localdpo")
    two, one = (plan(load_config(name, ["data.videos=clips"]), gpu, 8) for name in names)
    assert two.largest.memory.gpu == one.largest.memory.gpu and two.largest.count == one.largest.count
    text = report(two)
    weights = 2 * 2 * two.largest.count.all / 1e9
    assert f"both experts {weights:.3g} GB" in text and "all trained, of the low of two experts" in text
    exports = [float(report(each).split("disk: export")[1].split()[0]) for each in (two, one)]
    assert exports[0] - exports[1] == pytest.approx(4 * one.largest.count.all / 1e9, abs=0.6)  # three digits
    with pytest.raises(ConfigError, match=r"model.expert: .* has two experts"):
        plan(load_config(names[0], ["data.videos=clips", "model.expert=null", "model.guidance_scale_2=null"]), gpu, 8)
    found = plan(settings("model.expert=high", "data.num_frames=17"), gpu, 1)
    assert found.outline.networks == 2, "of a folder"
