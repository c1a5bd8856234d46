"""Every stage's core for each family, full and LoRA: pairs, training, export, and what plain diffusers makes of it."""

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import load_config
from alignkit.models import load_model
from alignkit.training.distributed import start_process
from alignkit.training.export import aligned_section, export_folder
from alignkit.training.loop import train

# In a process that has never imported alignkit: sys.argv = base, export, "lora" or "full", noise and result files
PLAIN_DIFFUSERS = """
import sys, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
base, export, kind, noise, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base if kind == "lora" else export)
if kind == "lora":
    pipe.load_lora_weights(export)
pipe.set_progress_bar_config(disable=True)
saved = torch.load(noise, weights_only=True)
frames = pipe("a red circle moves left", latents=saved["noise"], num_inference_steps=2, guidance_scale=3.0,
              output_type="latent", **saved["sizes"]).frames
assert not [name for name in sys.modules if name.startswith("alignkit")]
torch.save(frames, result)
"""


@pytest.fixture(params=["wan", "2b", "5b"])
def family_pairs(request, pairs_of):
    """(settings, folder) of a run that holds pairs of the family."""
    settings, folder = pairs_of(request.param)
    return [*settings, "train.steps=2", "train.learning_rate=1e-3"], folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_of_each_family_ends_in_something_plain_diffusers_samples_from(
    family_pairs, config_file, plain_diffusers, kind, tmp_path
):
    settings, folder = family_pairs
    out = tmp_path / "run"
    out.mkdir()
    (out / "pairs").symlink_to(folder / "pairs")
    lora = ["train.lora={rank: 4, alpha: 8}"] if kind == "lora" else []
    config = load_config(config_file, [*settings, f"output.dir={out}", *lora])
    train(config, start_process())
    weights = load_file(next(export_folder(config).rglob("*.safetensors"))) if kind == "lora" else None
    if weights:
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(value.any() for name, value in weights.items() if "lora_B" in name and ".attn1." in name)

    torch.set_num_threads(1)  # as in the other process; training took as many as there are cores
    base, aligned = load_model(config.model), load_model(aligned_section(config))
    data = config.data
    shape = aligned.latent_shape(data.num_frames, data.height, data.width)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    text, negative = (aligned.pad_text(aligned.encode_text([prompt])) for prompt in ("a red circle moves left", ""))
    ours = aligned.sample(noise, text, negative, num_steps=2, guidance=3.0)
    before = base.sample(noise, text, negative, num_steps=2, guidance=3.0)
    assert not torch.equal(ours, before), "the export is the base"

    sizes = {"height": data.height, "width": data.width, "num_frames": data.num_frames}
    sizes |= {"max_sequence_length": config.model.max_sequence_length}
    torch.save({"noise": noise, "sizes": sizes}, tmp_path / "noise.pt")
    arguments = [str(base.local_folder()), str(export_folder(config)), kind]
    plain_diffusers(PLAIN_DIFFUSERS, *arguments, tmp_path / "noise.pt", tmp_path / "frames.pt")
    theirs = torch.load(tmp_path / "frames.pt", weights_only=True)
    if kind == "full":
        assert torch.equal(theirs, ours)
    else:  # merged against unmerged: rounding alone, where a lost alpha would be half the change
        assert (theirs - ours).norm() < 1e-2 * (ours - before).norm()
