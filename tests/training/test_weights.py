"""Loading under ZeRO-3: one copy a node, whatever the number of processes, and the bits of a plain load."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import ModelError
from alignkit.models import load_model, shipped_model
from alignkit.training import engine, weights
from alignkit.training.distributed import free_port, start_process
from alignkit.training.weights import open_start

PROCESSES = 2
MEASURE = """
import json, sys, threading, time
import torch
from alignkit.training.distributed import start_process
from alignkit.config import ModelSection
from alignkit.training.weights import base_weights, load_partitioned
from types import SimpleNamespace
from pathlib import Path

process = start_process()
model = SimpleNamespace(family="wan", part="transformer", local_folder=lambda: Path(sys.argv[1]))
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
import deepspeed, diffusers

def pss():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

torch.distributed.barrier()
before, peak, stop = pss(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, pss())
        time.sleep(0.02)
thread = threading.Thread(target=watch)
thread.start()
network = load_partitioned(model, base_weights(ModelSection(), model), settings, torch.float32, process.device)
stop.set(); thread.join()
whole = sum(p.ds_numel for p in network.parameters())
mine = sum(p.ds_tensor.numel() for p in network.parameters())
print(json.dumps({"grown": max(peak, pss()) - before, "whole": whole, "mine": mine}))
"""


def start_processes(code: str, *arguments: str) -> list[str]:
    """Run `code` as PROCESSES ranks; what each printed last."""
    shared = dict(os.environ, WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1")
    shared |= {"MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    answers = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), answers
    return [out.splitlines()[-1] for out, _ in answers]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Path:
    """A Wan transformer of more than 1 GB: three blocks of the 14B's width."""
    from alignkit.models.wan import build_transformer

    folder = tmp_path_factory.mktemp("large") / "model"
    (folder / "transformer").mkdir(parents=True)
    config = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960,
        "num_layers": 6, "text_dim": 256, "freq_dim": 256, "in_channels": 16, "out_channels": 16,
    }  # fmt: skip
    (folder / "transformer/config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_transformer(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file(tensors, file)
    assert file.stat().st_size > 1e9
    yield folder
    file.unlink()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no proportional set size on this system")
def test_a_node_holds_about_one_copy(large_folder):
    answers = [json.loads(line) for line in start_processes(MEASURE, str(large_folder))]
    copy = 4 * answers[0]["whole"]
    assert all(answer["mine"] * 4 < copy / PROCESSES * 1.01 for answer in answers)
    grown = sum(answer["grown"] for answer in answers)
    # On top of the parts: the tensor under way, as read and as copied, and what the first use of DeepSpeed takes
    # (120 MB a process). Two whole copies, which a plain load makes, would be over twice.
    assert copy <= grown <= 1.5 * copy, f"{grown / copy:.2f} copies"


def test_weights_are_those_of_a_plain_load(small_config):
    process = start_process()
    config = small_config("deepspeed.preset=zero3")
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    partitioned, _ = engine.load_network(config, process, model, open_start(config, model))
    plain = load_model(config.model, with_encoders=False).transformer
    for (name, ours), (expected, theirs) in zip(partitioned.named_parameters(), plain.named_parameters(), strict=True):
        ours.all_gather()
        assert name == expected and torch.equal(ours, theirs), name
    for (name, ours), (expected, theirs) in zip(partitioned.named_buffers(), plain.named_buffers(), strict=True):
        assert name == expected and torch.equal(ours, theirs), name


def test_buffers_go_where_the_network_runs(monkeypatch, small_config):
    """Once parameters are partitioned DeepSpeed moves nothing more, and Wan's rotary tables would stay on the CPU."""
    moved = []
    monkeypatch.setattr(weights, "_move_buffers", lambda network, device: moved.append((network, device)))
    config, process = small_config("deepspeed.preset=zero3"), start_process()
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    network, _ = engine.load_network(config, process, model, open_start(config, model))
    assert moved == [(network, process.device)]
    monkeypatch.undo()
    weights._move_buffers(network, torch.device("meta"))
    assert {buffer.device.type for buffer in network.buffers()} == {"meta"}


@pytest.mark.parametrize("fault", ["missing", "truncated", "no config", "wrong shape", "tensor missing"])
def test_damaged_weights_are_refused_by_the_files_name(small_config, tmp_path, fault):
    folder = tmp_path / "model"
    shutil.copytree(shipped_model("wan"), folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    named = weights
    if fault == "missing":
        weights.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "no config":
        named = folder / "transformer/config.json"
        named.unlink()
    else:
        tensors = load_file(weights)
        bias = tensors.pop("proj_out.bias")
        save_file(tensors | ({"proj_out.bias": bias[1:]} if fault == "wrong shape" else {}), weights)
        named = "proj_out.bias"
    config = small_config(f"model.path={folder}")
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    with pytest.raises(ModelError, match=re.escape(str(named))):
        engine.load_network(config, start_process(), model, open_start(config, model))
