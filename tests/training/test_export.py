"""The exported folder is plain diffusers: it loads and samples in a process that has never heard of alignkit."""

import json
import shutil

import pytest
import torch

from alignkit.config import ModelSection
from alignkit.models import load_model, shipped_model
from alignkit.training.export import export

PLAIN = """
import json, sys
import torch
from diffusers import WanPipeline
torch.set_num_threads(1)
pipe = WanPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
shape = (1, 8, 5, 12, 12)
noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
video = pipe("a red circle moves left on a plain background", height=48, width=48, num_frames=17,
             num_inference_steps=3, latents=noise, max_sequence_length=64, output_type="latent").frames
assert not [name for name in sys.modules if name.startswith("alignkit")]
print(json.dumps({"sum": video.double().sum().item(), "shape": list(video.shape)}))
"""


@pytest.fixture
def moved(wan):
    """The base's weights, all of them moved a little."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value.float() + 1e-3 * torch.randn(value.shape, generator=generator)
        for name, value in wan.transformer.state_dict().items()
    }


def test_plain_diffusers_loads_and_samples_what_was_exported(wan, moved, plain_diffusers, tmp_path):
    export(wan, moved, tmp_path / "export")
    theirs = json.loads(plain_diffusers(PLAIN, tmp_path / "export"))
    model = load_model(ModelSection(path=str(tmp_path / "export"), max_sequence_length=64))
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, moved[name])
    noise = torch.randn(1, 8, 5, 12, 12, generator=torch.Generator().manual_seed(1))
    text = model.pad_text(model.encode_text(["a red circle moves left on a plain background"]))
    empty = model.pad_text(model.encode_text([""]))
    ours = model.sample(noise, text, empty, num_steps=3, guidance=5.0)
    assert theirs["shape"] == [1, 8, 5, 12, 12]
    assert theirs["sum"] == ours.double().sum().item()


def test_what_else_lies_in_the_models_folder_is_not_exported(moved, tmp_path):
    """A run in there was copied into itself, and a broken link ended in an exception when all was trained."""
    base = shutil.copytree(shipped_model("wan"), tmp_path / "base")
    (base / "LICENSE.txt").write_text("as you like")
    (base / "vae" / "notes.md").symlink_to(tmp_path / "nowhere")
    (base / "NOTICE").symlink_to(tmp_path / "nowhere")
    (base / ".git").mkdir()
    target = base / "runs" / "mine" / "export"
    target.parent.mkdir(parents=True)
    (base / "runs" / "transformer").mkdir()
    export(load_model(ModelSection(path=str(base), max_sequence_length=64)), moved, target)
    assert {path.name for path in target.iterdir()} == {
        "LICENSE.txt", "README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"
    }  # fmt: skip
    assert load_model(ModelSection(path=str(target), max_sequence_length=64), with_encoders=True).transformer


def test_an_export_that_fails_leaves_the_old_one(wan, moved, tmp_path):
    target = tmp_path / "export"
    export(wan, moved, target)
    before = {p.name: p.read_bytes() for p in target.glob("transformer/*")}
    incomplete = dict(list(moved.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        export(wan, incomplete, target)
    assert {p.name: p.read_bytes() for p in target.glob("transformer/*")} == before
