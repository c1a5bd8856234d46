"""The attention backend: named ones hold or are refused, both families obey, and all that run here agree."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from alignkit.config import ModelSection
from alignkit.errors import ConfigError
from alignkit.models import family_module, load_model
from alignkit.models.attention import BACKENDS, set_attention

CPU = torch.device("cpu")


@pytest.fixture(params=["wan", "2b", "5b"])
def model(request, cogvideox_folders):
    """A model of each kind of attention, with an output that depends on it."""
    wan = request.param == "wan"
    section = (
        ModelSection(max_sequence_length=64)
        if wan
        else ModelSection(family="cogvideox", path=str(cogvideox_folders[request.param]), max_sequence_length=24)
    )
    yield (loaded := load_model(section, device=CPU))
    set_attention(loaded.transformer, "native", CPU, torch.float32)


def output_and_gradients(model):
    shape = model.latent_shape(17, 48, 48)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2, *shape, generator=generator)
    text = model.pad_text(model.encode_text(["a red circle moves left", "a blue square"]))
    model.transformer.requires_grad_(True).zero_grad()
    output = family_module(model.family).predict(model.transformer, state, torch.tensor([700.0, 40.0]), text)
    output.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.transformer.parameters() if p.grad is not None])
    return output.detach(), gradients


def test_backends_that_run_here_agree_forward_and_backward(model):
    expected = output_and_gradients(model)
    ran = []
    for name in BACKENDS:
        try:
            assert set_attention(model.transformer, name, CPU, torch.float32) == name
        except ConfigError:
            continue
        ran.append(name)
        for ours, theirs in zip(output_and_gradients(model), expected, strict=True):
            # some 10³ fp32 roundings deep, relative to the whole
            assert (ours - theirs).norm() <= 1e3 * 2**-24 * theirs.norm(), name
    assert {"native", "native_flash"} <= set(ran)


def test_the_switch_reaches_every_layer(model):
    set_attention(model.transformer, "native_flash", CPU, torch.float32)
    taken = {m.processor._attention_backend for m in model.transformer.modules() if hasattr(m, "processor")}
    assert taken == {AttentionBackendName._NATIVE_FLASH}


@pytest.mark.parametrize("name", ["flash", "flash_3", "cudnn", "xformers"])
def test_a_named_backend_that_cannot_run_is_refused_with_what_to_do(name):
    if torch.cuda.is_available():
        pytest.skip("these may run on a GPU")
    with pytest.raises(
        ConfigError, match=f"model.attention: '{name}' cannot run on cpu in torch.float32: .*; "
    ) as error:
        load_model(ModelSection(attention=name), with_encoders=False, device=CPU)
    assert BACKENDS[name][1] in str(error.value)


def test_auto_is_native_on_a_cpu(wan):
    assert set_attention(wan.transformer, "auto", CPU, torch.float32) == "native"


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_our_processor_is_diffusers_own_bit_for_bit(cogvideox_folders, kind):
    section = ModelSection(family="cogvideox", path=str(cogvideox_folders[kind]), max_sequence_length=24)
    model = load_model(section, device=CPU)
    ours = output_and_gradients(model)
    model.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    theirs = output_and_gradients(model)
    assert torch.equal(ours[0], theirs[0])
    assert (ours[1] - theirs[1]).norm() <= 1e2 * 2**-24 * theirs[1].norm()  # sums over tokens in another order


def test_bf16_keeps_in_fp32_what_the_model_says_and_samples_close_by():
    sections = ModelSection(max_sequence_length=64), torch.bfloat16
    model, exact = load_model(sections[0], device=CPU, dtype=sections[1]), load_model(sections[0], device=CPU)
    dtypes = {p.dtype for p in model.transformer.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}, "modules of _keep_in_fp32_modules stay in fp32"
    noise = torch.randn(1, *model.latent_shape(17, 48, 48), generator=torch.Generator().manual_seed(0))
    latents = []
    for one in (model, exact):
        text, negative = (one.pad_text(one.encode_text([p])).to(one.dtype) for p in ("a red circle moves left", ""))
        latents.append(one.sample(noise, text, negative, num_steps=4, guidance=2.0).float())
    # bf16 rounds at 2⁻⁹; a few dozen such roundings pile up over blocks and steps
    assert (latents[0] - latents[1]).norm() < 40 * 2**-9 * latents[1].norm()
