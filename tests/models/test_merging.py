"""Adapters that are merged into a base: every tensor of their file is applied, or the file is refused."""

import pytest
import torch
from safetensors.torch import save_file

from alignkit.errors import ModelError
from alignkit.models.folder import LORA_FILE, ModelFolder

LAYER, OTHER = "blocks.0.attn1.to_q", "blocks.0.attn2.to_k"


def pair(layer, a="lora_A.weight", b="lora_B.weight"):
    generator = torch.Generator().manual_seed(0)
    return {f"{layer}.{a}": torch.randn(2, 24, generator=generator), f"{layer}.{b}": torch.ones(24, 2)}


GOOD = pair(f"transformer.{LAYER}")
A, B = GOOD.values()


@pytest.fixture
def merged(one_layer, tmp_path):
    """`merged(tensors)`: the layer LAYER as it was and as it is with the adapters of a file of `tensors`."""

    def merge(tensors):
        save_file(tensors, tmp_path / LORA_FILE)
        model = ModelFolder("", 6, None, transformer=one_layer[0])
        before = {name: value.clone() for name, value in model.network.get_submodule(LAYER).state_dict().items()}
        model.merge_lora(tmp_path)
        return before, model.network.get_submodule(LAYER).state_dict()

    return merge


only_wan = pytest.mark.parametrize("one_layer", ["wan"], indirect=True)


@only_wan
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        (pair(LAYER), f"2 of its 2 tensors, {LAYER}.lora_A.weight first, fit no layer"),
        (pair(f"base_model.model.{LAYER}"), "base_model.*fit no layer"),
        (pair("diffusion_model.blocks.0.self_attn.q"), "diffusion_model.*fit no layer"),
        (pair("lora_unet_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"), "lora_unet.*fit no layer"),
        (GOOD | pair("transformer.blocks.77.attn1.to_q"), r"2 of its 4 .*blocks\.77.*fit no layer"),
        (GOOD | pair("transformer.blocks.0.attn1.to_qq"), "to_qq.*fit no layer"),
        (GOOD | pair(f"transformer_2.{LAYER}"), "transformer_2.*fit no layer"),
        (GOOD | {f"transformer.{LAYER}.alpha": torch.ones(())}, "1 of its 3 .*alpha first, fit no layer"),
        (GOOD | {f"transformer.{LAYER}.diff_b": torch.ones(24)}, "diff_b first, fit no layer"),
        (GOOD | {f"transformer.{LAYER}.dora_scale": torch.ones(24)}, "dora_scale first, fit no layer"),
        ({f"transformer.{LAYER}.lora_B.weight": B}, f"holds no transformer.{LAYER}.lora_A.weight, half of a pair"),
        ({f"transformer.{LAYER}.lora_A.weight": A}, "cannot load"),
        (GOOD | {f"transformer.{LAYER}.lora_A.weight": A * torch.nan}, "lora_A.weight holds NaN"),
    ],
)
def test_adapters_that_would_be_merged_in_part_or_not_at_all_are_refused(merged, tensors, words):
    with pytest.raises(ModelError, match=rf"model\.lora: .*{words}.*\(wanted: diffusers' transformer\.LAYER"):
        merged(tensors)


@only_wan
def test_what_diffusers_applies_is_merged(merged):
    more = {f"transformer.{LAYER}.lora_B.bias": torch.ones(24)} | pair(f"transformer.{OTHER}")  # of one of two layers
    before, after = merged(GOOD | more)
    torch.testing.assert_close(after["weight"], before["weight"] + B @ A)
    torch.testing.assert_close(after["bias"], before["bias"] + 1)


@only_wan
def test_older_names_are_merged(merged):
    before, after = merged(pair(f"transformer.{LAYER}", "lora.down.weight", "lora.up.weight"))
    torch.testing.assert_close(after["weight"], before["weight"] + B @ A)


@only_wan
@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_magnitudes_are_merged(merged, name):
    magnitude = torch.arange(1.0, 25)
    before, after = merged(GOOD | {f"transformer.{LAYER}.{name}": magnitude})
    whole = before["weight"] + B @ A
    torch.testing.assert_close(after["weight"], magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True))
