"""What a watcher sees is what the diffusers pipeline's own transformer is given, bit for bit."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline, WanPipeline

from alignkit.config import ModelSection
from alignkit.models import load_model, shipped_model
from alignkit.schedules import one_step

PROMPT = "a red circle moves left on a plain background"
STEPS = 6
SCHEDULERS = [
    ("wan", {}),
    ("wan", {"flow_shift": 5.0}),
    ("wan", {"solver_order": 1}),
    ("wan", {"solver_order": 3}),
    ("wan", {"disable_corrector": [0, 1, 2]}),
    ("wan", {"solver_type": "bh1", "lower_order_final": False}),
    ("cogvideox", {}),
    ("cogvideox", {"snr_shift_scale": 1.0}),
]


@pytest.fixture(params=SCHEDULERS, ids=lambda given: " ".join([given[0], *map(str, given[1].items())]))
def folder(request, tmp_path):
    """A folder of the small model of a family with another accepted scheduler."""
    family, changes = request.param
    target = tmp_path / "model"
    shutil.copytree(shipped_model(family), target)
    file = target / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return family, target


def load(family, path):
    return load_model(ModelSection(family=family, path=str(path), max_sequence_length=64 if family == "wan" else 24))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_states_are_the_inputs_of_the_pipelines_transformer(folder, guidance, dtype):
    family, path = folder
    model = load(family, path)
    pipe = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}[family].from_pretrained(path)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.float()
    pipe.transformer.to(dtype), model.transformer.to(dtype)
    model.dtype = dtype
    pipe.set_progress_bar_config(disable=True)
    theirs = []

    def note(module, args, given):
        theirs.append((given["hidden_states"][-1:].clone(), given["timestep"].flatten()[0].item()))

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    noise = torch.randn(1, *model.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(0))
    text, negative = (model.pad_text(model.encode_text([prompt])) for prompt in (PROMPT, "blurred"))
    pipe(
        prompt_embeds=text.to(dtype), negative_prompt_embeds=negative.to(dtype), height=32, width=32, num_frames=9,
        num_inference_steps=STEPS, guidance_scale=guidance, latents=noise.clone().to(dtype if family == "cogvideox" else
        torch.float32), output_type="latent",
    )  # fmt: skip
    calls = 2 if family == "wan" and guidance > 1 else 1  # Wan's branches are two forwards
    seen = []
    model.sample(
        noise, text.to(dtype), negative.to(dtype), num_steps=STEPS, guidance=guidance,
        watch=lambda row, state: seen.append((row, state)),
    )  # fmt: skip
    assert [row for row, _ in seen] == list(range(STEPS + 1))
    timesteps = model.schedule(STEPS).timesteps.tolist()
    for row in (0, STEPS // 2, STEPS - 1):
        state, timestep = theirs[row * calls]
        assert state.dtype == dtype and torch.equal(seen[row][1], state), f"step {row}"
        assert timestep == timesteps[row]


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_first_order_solver_walks_the_schedule_row_by_row(family):
    model = load(family, "tiny")
    noise = torch.randn(1, *model.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(0))
    text = model.pad_text(model.encode_text([PROMPT]))
    seen = {}
    result = model.sample(
        noise, text, text, num_steps=STEPS, guidance=1.0, solver="first_order", watch=seen.__setitem__
    )
    assert torch.equal(seen[STEPS], result) and torch.equal(seen[0], noise)
    schedule = model.schedule(STEPS)
    module = __import__(f"alignkit.models.{family}", fromlist=["predict"])
    for row in (0, STEPS - 1):
        with torch.no_grad():
            predicted = module.predict(model.transformer, seen[row], schedule.timesteps[row : row + 1].float(), text)
        following = one_step(seen[row], predicted.float(), *schedule.coefficients[row : row + 2])
        assert torch.equal(seen[row + 1], following)


def test_cogvideox_own_solver_is_the_first_order_one_where_its_steps_divide_the_training_steps():
    model = load("cogvideox", "tiny")
    noise = torch.randn(1, *model.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(0))
    text = model.pad_text(model.encode_text([PROMPT]))
    own, rows = (model.sample(noise, text, text, num_steps=5, guidance=1.0, solver=s) for s in ("model", "first_order"))
    torch.testing.assert_close(own, rows, rtol=0, atol=2e-5)
    assert model.first_order(5) is None and "7 steps" in model.first_order(7)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_points_between_rows_begin_at_the_row_itself(family):
    model = load_model(ModelSection(family=family, max_sequence_length=64), with_transformer=False, with_encoders=False)
    schedule, rows = model.schedule(20), torch.arange(20)
    coefficients, timesteps = model.between(rows, torch.zeros(20, dtype=torch.float64), 20)
    assert torch.equal(coefficients, schedule.coefficients[:-1]) and torch.equal(timesteps, schedule.timesteps)
    coefficients, timesteps = model.between(rows, torch.full((20,), 0.999, dtype=torch.float64), 20)
    noisiness = coefficients[:, 1]
    assert (noisiness <= schedule.coefficients[:-1, 1]).all() and (noisiness >= schedule.coefficients[1:, 1]).all()
    assert (noisiness > 0).all() and (timesteps >= 0).all()
