"""The parts of a model's folder: one that is missing, damaged or there under another name is named."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.config import ModelSection
from alignkit.errors import ModelError
from alignkit.models import load_model, shipped_model


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shipped_model("wan"), tmp_path / "m")


def load(path, family="wan", **more):
    return load_model(ModelSection(family=family, path=str(path), max_sequence_length=64, **more))


def weights_of(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file


def as_variant(folder, *parts):
    for part in parts:
        file = weights_of(folder, part)
        file.rename(file.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("part", ["scheduler", "vae", "transformer", "text_encoder", "tokenizer"])
def test_a_part_without_a_folder_is_named(tmp_path, family, part):
    shutil.copytree(shipped_model(family), tmp_path / "m", ignore=shutil.ignore_patterns(part, "*.safetensors"))
    with pytest.raises(ModelError, match=rf"model\.path: {tmp_path}/m/{part}: no such folder, so the model has no"):
        load(tmp_path / "m", family)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_settings_that_are_no_object_are_named(folder, file):
    (folder / file).write_text("[1]")
    with pytest.raises(ModelError, match=rf"model\.path: {folder / file}: .*no JSON object"):
        load(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_is_there_as_a_variant_alone_is_hinted_at_and_loaded_with_it(folder, wan, part):
    as_variant(folder, part)
    name = weights_of(folder, part).name
    with pytest.raises(ModelError, match=rf"{part}/.*: no such file; set model\.variant=fp16 \(there is {name}\)"):
        load(folder)
    model = load(folder, variant="fp16")  # its other parts have the usual names
    theirs = getattr(wan.pipeline, part).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in getattr(model.pipeline, part).state_dict().items())
    assert model.fingerprint(part) == wan.fingerprint(part) and model.fingerprint() == wan.fingerprint()


def test_a_variant_that_no_part_has_is_said(folder, wan, capfd):
    assert load(folder, variant="fp16").fingerprint() == wan.fingerprint()
    assert f"model.variant: fp16: no file of {folder} is of it; the usual ones are loaded" in capfd.readouterr().err
    assert load(folder, variant="").fingerprint("vae") == wan.fingerprint("vae")
    assert "model.variant" not in capfd.readouterr().err


def test_a_part_that_has_neither_the_variant_nor_the_usual_files_is_refused(folder):
    as_variant(folder, "vae")
    weights_of(folder, "text_encoder").rename(folder / "text_encoder/model.bf16-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"text_encoder/model\.fp16\.safetensors: .*set model\.variant=bf16 "):
        load(folder, variant="fp16")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_weights_of_whole_numbers_are_refused_by_name(folder, part):
    file = weights_of(folder, part)
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(ModelError, match=rf"model\.path: {file}: cannot load: {name} is I8, of whole numbers"):
        load(folder)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.bfloat16, torch.inf), (torch.float16, -torch.inf)]
)
def test_weights_that_are_no_numbers_are_refused_by_name(folder, dtype, value):
    file = weights_of(folder, "vae")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    model = load_model(ModelSection(path=str(folder)), with_transformer=False, with_encoders=False)
    save_file(tensors, file)
    assert model.fingerprint("vae")
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"model\.path: {file}: cannot load: {name} holds NaN or infinity"):
        model.fingerprint("vae")


def test_a_pointer_in_place_of_a_file_is_said(folder):
    weights_of(folder, "vae").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS, not the file itself: git lfs pull"):
        load(folder)


def test_a_text_encoder_is_told_by_its_vocabulary_too(folder, wan):
    model = load_model(ModelSection(path=str(folder)), with_transformer=False, with_encoders=False)
    prints = [model.fingerprint("text_encoder")]
    assert prints[0] == wan.fingerprint("text_encoder"), "the shipped one has no vocabulary"
    for name, content in (("spiece.model", "one"), ("spiece.model", "two"), ("tokenizer.json", "three")):
        (folder / "tokenizer" / name).write_text(content)
        prints.append(model.fingerprint("text_encoder"))
    (folder / "tokenizer/spiece.model").unlink()  # as of a folder that was saved anew
    assert len(set(prints)) == 4 and model.fingerprint("text_encoder") == prints[-1]
    assert model.fingerprint("vae") == wan.fingerprint("vae")
