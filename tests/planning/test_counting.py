"""What is counted on the meta device is what is known of the networks, and neither weights nor a network are used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import ModelError
from alignkit.planning import counting
from alignkit.planning.counting import MODES, activation_bytes, forward_of
from alignkit.planning.memory import parameters
from alignkit.planning.outline import outline

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = "wan-tiny-localdpo.yaml"
SIZES = {  # parameters as diffusers builds them; tokens of a video, with the text where attention sees both
    "wan2.1-1.3b": (1_418_996_800, 21 * 30 * 52, 5.68e9),
    "wan2.1-14b": (14_288_491_584, 21 * 30 * 52, 5.68e9),
    "wan2.2-a14b": (14_288_491_584, 21 * 30 * 52, 5.68e9),  # one of its two experts
    "cogvideox-2b": (1_693_783_872, 13 * 30 * 45 + 226, 4.76e9),
    "cogvideox-5b": (5_570_283_072, 13 * 30 * 45 + 226, 4.76e9),
}
BF16 = torch.bfloat16


def of(name: str, *keys: str):
    config = load_config(CONFIGS / (name if name.endswith(".yaml") else f"{name}-localdpo.yaml"), keys)
    return config, outline(config)


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_are_counted(name):
    config, found = of(name)
    count = parameters(found, config, BF16)
    assert count.all == count.trained == SIZES[name][0]
    assert found.text == pytest.approx(SIZES[name][2], rel=1e-3)  # as many digits as stand there


@pytest.mark.parametrize("name", SIZES)
def test_flops_are_those_of_the_textbook(name):
    """Products: two a parameter and token, but for those of text alone and of modulation; attention: 4·L²·width."""
    config, found = of(name)
    count, tokens, _ = SIZES[name]
    forward = forward_of(found, config, BF16)
    width = found.architecture["num_attention_heads"] * found.architecture["attention_head_dim"]
    assert 0.75 < forward.products / (2 * count * tokens) <= 1.0
    assert forward.attention == pytest.approx(4 * tokens**2 * width * found.layers, rel=0.02)


def test_a_network_of_any_depth_is_what_three_blocks_foretell():
    config, found = of("cogvideox-2b")
    five = replace(found, architecture=found.architecture | {"num_layers": 5}, counted={})
    for mode in ("none", "full"):
        foretold = activation_bytes(five, config, BF16, mode, 2, 3)
        assert foretold == counting._peak(five, config, BF16, mode == "full", 2, 3, 5)  # whole bytes


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "cogvideox-5b"])
def test_checkpointing_keeps_less_the_more_it_recomputes(name):
    config, found = of(name)
    none, selective, full = (activation_bytes(found, config, BF16, mode, 2, 3) for mode in MODES)
    width = found.architecture["num_attention_heads"] * found.architecture["attention_head_dim"]
    inputs = 2 * SIZES[name][1] * width * 2 * found.layers  # two videos in bf16, the input of each block
    assert inputs < full < selective < none
    assert selective - full >= inputs * 0.98, "an output of attention is as large as the input"
    assert activation_bytes(found, config, BF16, "full", 4, 3) == pytest.approx(2 * full, rel=0.01)


def test_attention_is_counted_as_fused():
    """With a score for every pair of tokens twice the frames would take four times the memory."""
    config, found = of("wan2.1-1.3b")
    longer, _ = of("wan2.1-1.3b", "data.num_frames=161")
    once, twice = (activation_bytes(found, each, BF16, "none", 1, 3) for each in (config, longer))
    assert twice == pytest.approx(once * 41 / 21, rel=0.01)


def test_adapters_are_counted_as_trained_and_keep_less():
    config, found = of("wan2.1-1.3b", "train.lora={rank: 8, alpha: 8}")
    count = parameters(found, config, BF16)
    assert count.trained == 30 * 2 * 4 * 2 * 8 * 1536  # blocks, attentions, layers, both factors
    assert count.all == SIZES["wan2.1-1.3b"][0] + count.trained
    whole, _ = of("wan2.1-1.3b")
    three, two = (activation_bytes(found, config, BF16, "none", 2, stage) for stage in (3, 2))
    assert two < three < activation_bytes(found, whole, BF16, "none", 2, 3), "ZeRO-3 keeps inputs of frozen layers too"


def test_sizes_of_a_folder_are_read_from_its_files(cogvideox_folders):
    folder = cogvideox_folders["5b"]
    keys = [f"model.path={folder}", "model.max_sequence_length=24", "data.num_frames=9"]
    config, found = of("cogvideox-tiny-localdpo.yaml", *keys)
    network = json.loads((folder / "transformer" / "config.json").read_text())
    assert found.layers == network["num_layers"] and parameters(found, config, BF16).all < 1e5
    with pytest.raises(ModelError, match=r"not a WanTransformer3DModel \(model.family\)"):
        of(TINY, f"model.path={folder}")


def test_a_model_that_is_not_known_is_refused_without_asking_the_hub(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("weights were opened"))
    of("wan2.1-14b"), of(TINY)
    with pytest.raises(ModelError, match="hf download nobody/nothing --include"):
        of("wan2.1-14b", "model.path=nobody/nothing")
