"""What is installed, what of it a run will take, and what will be slow or broken for want of the rest."""

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from alignkit import __version__
from alignkit.config import shipped_config
from alignkit.doctor import Finding
from alignkit.doctor.places import file_system, first_existing, lock_problem, memory_limit
from alignkit.errors import AlignkitError

TRAIN = "pip install 'alignkit[train]'"
NEEDED = ("torch", "diffusers", "transformers", "deepspeed", "accelerate", "peft", "datasets", "av")
OPTIONAL = {
    "triton": "noise and losses take the torch reference on a GPU, slower and with more memory: pip install triton",
    "flash-attn": "pip install 'alignkit[flash]'",
    "xformers": "pip install 'alignkit[xformers]'",
}
FILES_WANTED = 4096  # a data loader's mapped blocks, sockets of NCCL and a checkpoint's shards, with room
SHM_WANTED = 1 << 30  # NCCL asks for tens of MB a pair of GPUs; containers start with 64 MB
HEAD_DIM = "architectures/wan2.1-1.3b.json"  # of 128, which the fast attentions are made for


def findings(output: Path | None = None) -> Iterator[Finding]:
    """Everything about this machine, and about the place of a run's files; imports torch and diffusers."""
    yield Finding("alignkit", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from _versions()
    torch = _imported("torch")
    if isinstance(torch, Finding):
        yield torch
    else:
        yield from _device(torch)
        yield _kernels(torch)
        yield _attention(torch)
        yield _communication(torch)
        yield _compiler(torch)
    yield from _limits()
    yield from _place(output or Path.cwd(), "output.dir" if output else "this folder", test_locks=output is not None)
    yield _hub()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    for name in NEEDED:
        found = _version(name)
        yield Finding(name, found or "not installed", None if found else f"nothing runs without it: {TRAIN}")
    for name, advice in OPTIONAL.items():
        found = _version(name)
        yield Finding(name, found or f"not installed; {advice}")


def _imported(name: str) -> ModuleType | Finding:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken library raises whatever it meets
        problem = " ".join(str(error).split())[:200]
        return Finding(name, f"cannot be imported: {problem}", f"nothing trains without it: {TRAIN}")


def _device(torch: ModuleType) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        advice = None
        if Path("/dev/nvidia0").exists():
            built = torch.version.cuda
            why = f"built for CUDA {built}, newer than the driver?" if built else "a build for CPUs alone"
            advice = (
                f"there is an NVIDIA GPU here, and this torch ({why}) does not see it: https://pytorch.org has others"
            )
        text = "none: everything runs on the CPU, which is enough for the small models that come with alignkit"
        yield Finding("GPU", text, advice)
        yield Finding("numbers", "fp32 (model.dtype: auto); bf16 on a CPU is for tests")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, whole = torch.cuda.mem_get_info(index)
        used = whole - free > whole / 20
        text = f"{about.name}, {whole / 1e9:.0f} GB, {free / 1e9:.0f} GB free, compute {about.major}.{about.minor}"
        yield Finding(f"GPU {index}", text, "another process holds memory of it" if used else None)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("numbers", "bf16, with fp32 masters (model.dtype: auto)")
    else:
        advice = "twice the memory and a fraction of the speed; bf16 needs an A100, H100 or newer"
        yield Finding("numbers", "fp32: this GPU has no bf16", advice)


def _kernels(torch: ModuleType) -> Finding:
    dispatch = _imported("alignkit_kernels.dispatch")
    if isinstance(dispatch, Finding):
        return dispatch
    if dispatch.INTERPRETED:
        advice = "unset TRITON_INTERPRET unless you are testing kernels"
        return Finding("kernels", "Triton's interpreter: hundreds of times slower", advice)
    if torch.cuda.is_available() and dispatch.HAVE_TRITON:
        return Finding("kernels", "alignkit's Triton kernels, for noise and losses")
    why = "triton is missing" if torch.cuda.is_available() else "no GPU"
    return Finding("kernels", f"the torch reference, for noise and losses ({why}): the same numbers")


def _attention(torch: ModuleType) -> Finding:
    try:
        from alignkit.models import family_module
        from alignkit.models.attention import BACKENDS, set_attention

        cuda = torch.cuda.is_available()
        device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
        with torch.device("meta"):
            architecture = json.loads(shipped_config(HEAD_DIM).read_text())
            network = family_module("wan").build_transformer(architecture | {"num_layers": 1})
        taken = set_attention(network, "auto", device, dtype)
        if not cuda:
            return Finding("attention", f"{taken}: the only one on a CPU")
        passed = []
        for name in list(BACKENDS)[: list(BACKENDS).index(taken)]:
            try:
                set_attention(network, name, device, dtype)
            except AlignkitError as error:
                passed.append(str(error).removeprefix("model.attention: "))
    except Exception as error:  # of libraries that do not fit each other
        return Finding("attention", f"cannot be tried: {' '.join(str(error).split())[:200]}", TRAIN)
    slow = taken in ("xformers", "native")
    advice = "attention is half of a step or more at 480p: " + "; ".join(passed) if slow else None
    return Finding(
        "attention", f"{taken} (model.attention: auto)" + (f"; not {passed}" if passed and not slow else ""), advice
    )


def _communication(torch: ModuleType) -> Finding:
    if not torch.distributed.is_available():
        return Finding("processes", "torch without torch.distributed", f"training needs it: {TRAIN}")
    if not torch.cuda.is_available():
        return Finding("processes", "gloo, and DeepSpeed's shared memory within a machine")
    if torch.distributed.is_nccl_available():
        return Finding("processes", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return Finding("processes", "torch without NCCL", "one GPU alone can train; install a torch that has it")


def _compiler(torch: ModuleType) -> Finding:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    ninja = shutil.which("ninja") or _version("ninja")
    missing = [name for name, found in (("a C++ compiler", compiler), ("ninja", ninja)) if not found]
    if torch.cuda.is_available():
        cc = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
        advice = None if cc else "Triton builds its launcher with one: apt install gcc"
        return Finding("compiler", cc or "none", advice)
    if missing:
        advice = "DeepSpeed's CPU communication is built once: apt install g++, pip install ninja"
        return Finding("compiler", f"{' and '.join(missing)} missing: training on a CPU does not start", advice)
    return Finding("compiler", f"{compiler} and ninja, for DeepSpeed's CPU communication (built once)")


def _limits() -> Iterator[Finding]:
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    yield Finding("cores", f"{cores}" + (f" of {all_cores} are this process's" if cores < all_cores else ""))
    whole, free = memory_limit()
    advice = "loading a model takes its largest tensor in fp32 beside what is kept; see alignkit plan"
    yield Finding("memory", f"{whole / 1e9:.0f} GB, {free / 1e9:.0f} GB free", advice if free < 4e9 else None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"stores and processes need more: ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    shown = "unlimited" if soft == resource.RLIM_INFINITY else soft
    yield Finding("open files", f"{shown} at once", advice if 0 <= soft < FILES_WANTED else None)
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("/dev/shm", "not there", "several processes on a machine talk through it: mount a tmpfs there")
        return
    size = shutil.disk_usage(shared)
    advice = "NCCL and DeepSpeed's CPU communication may fail: docker run --shm-size=8g (or --ipc=host)"
    text = f"{size.total / 1e9:.3g} GB, {size.free / 1e9:.3g} GB free"
    yield Finding("/dev/shm", text, advice if size.free < SHM_WANTED else None)


def _place(folder: Path, topic: str, test_locks: bool) -> Iterator[Finding]:
    there = first_existing(folder)
    kind = file_system(there)
    free = shutil.disk_usage(there).free
    text = f"{folder}, on {kind.said}, {free / 1e9:.3g} GB free" + (
        "" if there == folder else f" ({folder} is not there yet)"
    )
    advice = (
        None if os.access(there, os.W_OK) else f"{there} cannot be written to by this user; choose another output.dir"
    )
    yield Finding(topic, text, advice)
    problem = lock_problem(there, kind) if test_locks and not advice else kind.no_locks
    if problem:
        yield Finding("locks", problem, "mount it with flock, or choose an output.dir on another file system")
    elif test_locks and not advice:
        yield Finding("locks", "work, as far as one machine can see" if kind.network else "work")
    if not kind.network and test_locks:
        yield Finding(
            "shared", f"no: {kind.said} is this machine's own; runs on several nodes need a shared output.dir"
        )


def _hub() -> Finding:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    free = shutil.disk_usage(first_existing(home)).free / 1e9
    offline = (
        "; HF_HUB_OFFLINE is set: only what is in it can be loaded" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    )
    advice = (
        "Wan2.1 14B is 80 GB there (20 G parameters in fp32, with its text encoder): set HF_HOME" if free < 80 else None
    )
    return Finding("models", f"downloads go to {home}, {free:.3g} GB free{offline}", advice)
