"""What utilization is taken from: work that the model needs, on devices whose peak is known."""

from pathlib import Path

import pytest
import torch

from alignkit.config import load_config
from alignkit.planning.constants import GPUS, gpu_named
from alignkit.planning.counting import forward_of
from alignkit.planning.outline import outline
from alignkit.planning.rate import seconds_at_peak, seconds_on
from alignkit.training.distributed import Process

FILE = Path(__file__).parents[2] / "configs" / "wan-tiny-localdpo.yaml"
PAIRS, GPUS_USED = 8, 2


@pytest.fixture(scope="module")
def forward():
    config = load_config(FILE)
    return forward_of(outline(config), config, torch.float32)


@pytest.mark.parametrize(
    ("keys", "videos", "peak"),
    [
        (("model.dtype=bf16",), 4, "peak"),  # of two videos by the policy, and by its reference
        (("model.dtype=bf16", "train.checkpointing=full", "train.branches=apart"), 4, "peak"),
        (("model.dtype=fp32", "objective={name: sft}"), 1, "fp32"),
    ],
    ids=["copy", "computed again", "sft, fp32"],
)
def test_only_the_models_own_work_counts(forward, keys, videos, peak):
    gpu = gpu_named("H100")
    sizes = f"train.global_batch_size={PAIRS}", "train.micro_batch_size=2"
    config = load_config(FILE, [*sizes, "deepspeed.preset=zero2", *keys])
    policy = 1 if videos == 1 else 2
    # a backward pass is two forwards of every product and 2.5 of attention
    own = videos * forward.flops + policy * (2 * forward.products + 2.5 * forward.attention)
    assert seconds_on(gpu, config, GPUS_USED, False) == pytest.approx(PAIRS * own / (GPUS_USED * getattr(gpu, peak)))


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L4"])
def test_a_device_that_is_not_in_the_table_has_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert seconds_at_peak(load_config(FILE), Process(0, 1, 0, torch.device("cuda", 0)), False) is None


def test_one_that_is_in_the_table_is_found_by_its_drivers_name(monkeypatch):
    process = Process(0, 1, 0, torch.device("cuda", 0))
    for gpu in GPUS.values():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=gpu.device: name)
        found = seconds_at_peak(load_config(FILE), process, False)
        assert found == seconds_on(gpu, load_config(FILE), 1, False) > 0
    assert seconds_at_peak(load_config(FILE), Process(0, 1, 0, torch.device("cpu")), False) is None
