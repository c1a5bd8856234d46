"""The plan's memory model beside the growth of a process's memory: networks of some tens of millions of random weights
are started, and take a step, on the CPU.

    python benchmarks/check_plan.py            # eight runs: two presets, two dtypes, a copied reference or adapters
    python benchmarks/check_plan.py --quick    # two of them
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDER = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 8}  # 33 M parameters
SIZES = ("data.height=96", "data.width=96", "data.num_frames=33")
RUNS = [
    (preset, dtype, kind) for preset in ("zero3", "zero2") for dtype in ("bf16", "fp32") for kind in ("copy", "lora")
]
QUICK = [("zero3", "bf16", "copy"), ("zero2", "fp32", "copy")]
BUCKET = "deepspeed.config.zero_optimization.reduce_bucket_size=10000000"  # of memory that is touched: 20 MB in bf16
PASSING = ("activations", "latents, predictions, loss", "CUDA, NCCL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two runs instead of eight")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(*arguments.run)))
        return
    print("| run | parameters | imported | kept: calculated | measured | most in a step: calculated | measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    freeing = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for run in QUICK if arguments.quick else RUNS:
            command = [sys.executable, __file__, "--run", *run, folder]
            text = subprocess.run(command, check=True, capture_output=True, text=True, env=freeing).stdout
            print(row(run, json.loads(text.splitlines()[-1])), flush=True)


def row(run: tuple[str, str, str], found: dict[str, float]) -> str:
    columns = ("imported", "calculated", "measured", "calculated_step", "measured_step")
    sizes = " | ".join(f"{found[name] / 1e6:.0f} MB" for name in columns)
    return f"| {' '.join(run)} | {found['parameters'] / 1e6:.1f} M | {sizes} |"


def write_model(folder: Path) -> None:
    """The small Wan2.1 with a larger transformer of random weights."""
    from alignkit.models import family_module, shipped_model

    shipped = shipped_model("wan")
    shutil.copytree(shipped, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
    architecture = json.loads((shipped / "transformer" / "config.json").read_text()) | WIDER
    family_module("wan").build_transformer(architecture).save_pretrained(folder / "transformer")


def measure(preset: str, dtype: str, kind: str, folder: str) -> dict[str, float]:
    """Start a run, take a step, and say what each added to this process's memory, beside the plan."""
    import deepspeed  # noqa: F401
    import diffusers  # noqa: F401
    import torch

    from alignkit.config import load_config, shipped_config
    from alignkit.models import family_module, load_model
    from alignkit.planning.memory import memory, parameters
    from alignkit.planning.outline import outline
    from alignkit.planning.regime import regime
    from alignkit.training.distributed import start_process
    from alignkit.training.engine import load_network, start_policy
    from alignkit.training.references import start_reference
    from alignkit.training.weights import open_start

    own = ["train.lora={}"] if kind == "lora" else []
    keys = [f"model.path={folder}", f"model.dtype={dtype}", f"deepspeed.preset={preset}", f"output.dir={folder}/run"]
    batch = ["train.global_batch_size=1", "train.micro_batch_size=1", "train.checkpointing=full"]
    config = load_config(shipped_config("wan-tiny-localdpo.yaml"), [*keys, *SIZES, *batch, BUCKET, *own])
    process = start_process()
    # libraries that the first matrix product and backward load count as imported
    (torch.ones(64, 64, requires_grad=True) @ torch.ones(64, 64)).sum().backward()
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    imported = resident()
    start = open_start(config, model)
    network, _ = load_network(config, process, model, start)
    policy = start_policy(config, process, network, start)
    reference = start_reference(config, process, policy, model, start)

    data, kinds = config.data, torch.bfloat16 if dtype == "bf16" else torch.float32
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    state, text = torch.ones(2, *shape, dtype=kinds), torch.ones(2, 64, 64, dtype=kinds)
    predict = family_module(config.model.family).predict

    def forward_backward() -> None:
        if kind == "copy":
            with torch.no_grad():
                predict(reference.network, state, torch.ones(2), text)
        policy.backward(predict(policy, state, torch.ones(2), text).float().square().mean())

    forward_backward()
    policy.step()  # Adam's moments are not in memory before they are written
    kept = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    forward_backward()  # on a CPU the optimizer's step takes more; on a GPU it is fused
    peak = status("VmHWM")
    found = outline(config)
    run = regime(config, 1)
    count = parameters(found, config, run.dtype)
    planned = memory(found, config, run, count).gpu
    return {
        "parameters": count.all,
        "imported": imported,
        "calculated": sum(size for part, size in planned.items() if part not in PASSING),
        "measured": kept - imported,
        "calculated_step": sum(size for part, size in planned.items() if part != "CUDA, NCCL"),
        "measured_step": peak - imported,
    }


def resident() -> float:
    """Bytes of this process's memory, what is freed given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
    )  # some virtual machines list AMX and do not grant it
    main()
