"""The plan's memory model beside the growth of a process's memory: networks of more than 200 million random weights
are started, and take a step of two micro-batches, on the CPU. And of the full models' VAEs, with random weights, while
they encode and decode a small video.

    python benchmarks/check_plan.py             # ten runs of both families: presets, dtypes, references, checkpointing
    python benchmarks/check_plan.py --only 0 3  # two of them
    python benchmarks/check_plan.py --videos    # the VAEs
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
from typing import NamedTuple

WIDE = {
    "wan": {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "num_layers": 13},
    "cogvideox": {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 12, "time_embed_dim": 512},
}
SIZES = ("data.height=96", "data.width=96", "data.num_frames=17")
BUCKET = "deepspeed.config.zero_optimization.reduce_bucket_size=10000000"  # of memory that is touched: 20 MB in bf16


class Run(NamedTuple):
    family: str
    preset: str
    dtype: str
    reference: str
    """copy, cached; adapter: adapters alone are trained."""
    checkpointing: str
    branches: str


VIDEOS = [("wan2.1-14b", 9, 256, 256), ("cogvideox-2b", 9, 192, 192)]
"""Configuration, frames, height and width."""
RUNS = [
    Run("wan", "zero3", "bf16", "copy", "full", "together"),
    Run("wan", "zero2", "fp32", "copy", "none", "together"),
    Run("wan", "zero3", "fp32", "cached", "selective", "apart"),
    Run("wan", "zero2", "bf16", "adapter", "selective", "together"),
    Run("wan", "zero2", "bf16", "cached", "none", "apart"),
    Run("cogvideox", "zero3", "bf16", "cached", "none", "together"),
    Run("cogvideox", "zero2", "fp32", "copy", "full", "apart"),
    Run("cogvideox", "zero3", "fp32", "adapter", "none", "apart"),
    Run("cogvideox", "zero2", "bf16", "copy", "selective", "together"),
    Run("cogvideox", "zero3", "fp32", "copy", "selective", "together"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", type=int, nargs="+", help="rows of the table, from 0 on", choices=range(len(RUNS)))
    parser.add_argument("--videos", action="store_true", help="the VAEs instead")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--video", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.video is not None:
        print(json.dumps(measure_video(*VIDEOS[arguments.video])))
        return
    if arguments.run:
        number, folder = arguments.run
        print(json.dumps(measure(RUNS[int(number)], folder)))
        return
    freeing = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    if arguments.videos:
        print("| VAE of | frames, height, width | calculated | measured |\n| --- | --- | --- | --- |")
        for number, (name, *sizes) in enumerate(VIDEOS):
            command = [sys.executable, __file__, "--video", str(number)]
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=freeing).stdout
            found = json.loads(text.splitlines()[-1])
            print(f"| {name} | {', '.join(map(str, sizes))} | {_beside(*found)} |", flush=True)
        return
    print("| run | parameters | imported | kept: calculated | measured | most in a step: calculated | measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for family, wider in WIDE.items():
            write_model(family, wider, Path(folder) / family)
        for number in arguments.only or range(len(RUNS)):
            command = [sys.executable, __file__, "--run", str(number), folder]
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=freeing).stdout
            print(row(RUNS[number], json.loads(text.splitlines()[-1])), flush=True)


def row(run: Run, found: dict[str, float]) -> str:
    kept, most = (_beside(found[f"calculated{when}"], found[f"measured{when}"]) for when in ("", "_step"))
    millions, imported = found["parameters"] / 1e6, found["imported"] / 1e6
    return f"| {', '.join(run)} | {millions:.1f} M | {imported:.0f} MB | {kept} | {most} |"


def _beside(calculated: float, measured: float) -> str:
    return f"{calculated / 1e6:.0f} MB | {measured / 1e6:.0f} MB ({calculated / measured - 1:+.0%})"


def write_model(family: str, wider: dict, folder: Path) -> None:
    """A family's small model with a larger transformer of random weights."""
    from alignkit.models import family_module, shipped_model

    shipped = shipped_model(family)
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("transformer"))
    architecture = json.loads((shipped / "transformer" / "config.json").read_text()) | wider
    family_module(family).build_transformer(architecture).save_pretrained(folder / "transformer")


def measure(run: Run, folder: str) -> dict[str, float]:
    """Start a run, take a step, and say what each added to this process's memory, beside the plan."""
    import deepspeed  # noqa: F401
    import diffusers  # noqa: F401
    import torch

    from alignkit.config import load_config, shipped_config
    from alignkit.models import load_model
    from alignkit.objectives.states import States, predictions
    from alignkit.planning.memory import memory, parameters
    from alignkit.planning.outline import outline
    from alignkit.planning.regime import regime
    from alignkit.training.branches import backward_apart, predict_sides
    from alignkit.training.distributed import start_process
    from alignkit.training.engine import load_network, start_policy
    from alignkit.training.references import start_reference
    from alignkit.training.weights import open_start

    keys = [
        f"model.path={folder}/{run.family}",
        f"model.dtype={run.dtype}",
        f"deepspeed.preset={run.preset}",
        f"reference.strategy={run.reference}",
        f"train.checkpointing={run.checkpointing}",
        f"train.branches={run.branches}",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
        f"output.dir={folder}/run",
        *SIZES,
        BUCKET,
        *(["train.lora={}"] if run.reference == "adapter" else []),
    ]
    config = load_config(shipped_config(f"{run.family}-tiny-localdpo.yaml"), keys)
    process = start_process()
    # libraries that the first matrix product and backward load count as imported
    (torch.ones(64, 64, requires_grad=True) @ torch.ones(64, 64)).sum().backward()
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    imported = resident()
    start = open_start(config, model)
    network, _ = load_network(config, process, model, start)
    policy = start_policy(config, process, network, start)
    second = start_reference(config, process, policy, model, start).network if run.reference == "copy" else None

    data, kind = config.data, torch.bfloat16 if run.dtype == "bf16" else torch.float32
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    length = config.model.max_sequence_length
    states = States(
        inputs=torch.ones(2, *shape, dtype=kind),
        timesteps=torch.ones(2),
        text=torch.ones(2, length, 64, dtype=kind),
        coefficients=torch.ones(1, 4, dtype=torch.float64),
        noise_w=torch.ones(1, *shape),
    )

    def forward_backward() -> None:
        if second is not None:
            with torch.no_grad():
                predictions(model, second, states)
        if run.branches == "apart":
            sides = predict_sides(model, policy, states)
            loss = sum(side.float().square().mean() for side in sides)
            backward_apart(model, policy, states, sides, loss)
        else:
            policy.backward(predictions(model, policy, states).float().square().mean())

    for last in (False, True, False):  # a step, before which Adam's moments are not in memory, and half of one: some
        policy.set_gradient_accumulation_boundary(last)  # stages free the gradients at its end
        forward_backward()
        policy.step()
    kept = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    forward_backward()  # on a CPU the optimizer's step takes more; on a GPU it is fused
    peak = status("VmHWM")
    found = outline(config)
    resolved = regime(config, 1)
    count = parameters(found, config, resolved.dtype)
    planned = memory(found, config, resolved, count).gpu
    passing = ("activations", "latents, predictions, loss", "CUDA, NCCL")
    return {
        "parameters": count.all,
        "imported": imported,
        "calculated": sum(size for part, size in planned.items() if part not in passing),
        "measured": kept - imported,
        "calculated_step": sum(size for part, size in planned.items() if part != "CUDA, NCCL"),
        "measured_step": peak - imported,
    }


def measure_video(name: str, frames: int, height: int, width: int) -> tuple[float, float]:
    """Most bytes beside the VAE's weights, by the plan and by this process's memory."""
    import torch

    from alignkit.config import load_config, shipped_config
    from alignkit.planning.counting import video_bytes
    from alignkit.planning.outline import outline

    sizes = f"data.num_frames={frames}", f"data.height={height}", f"data.width={width}"
    config = load_config(shipped_config(f"{name}-localdpo.yaml"), ["data.videos=videos", "output.dir=out", *sizes])
    found = outline(config)
    vae = type(found.autoencoder).from_config(found.autoencoder.config).eval()
    with torch.no_grad():
        vae.encode(torch.rand(1, 3, 9, 32, 32)).latent_dist.mode()  # libraries that the first convolution loads
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")
        vae.decode(vae.encode(torch.rand(1, 3, frames, height, width)).latent_dist.mode())
    return video_bytes(found, config), status("VmHWM") - before


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
