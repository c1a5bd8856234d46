"""Compiles every kernel for GPUs that are not here and measures what the compiler made of it.

    python tests/kernels/compiled.py            prints the measurements
    python tests/kernels/compiled.py --update   writes them to budget.json

Needs triton and its own assembler, no GPU, and TRITON_INTERPRET unset.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest.mock import patch

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.compiler import ASTSource

from alignkit_kernels.errors.kernel import region_errors_backward_kernel, region_errors_kernel
from alignkit_kernels.launch import LAUNCHES, stages_for
from alignkit_kernels.layout import NUM_WARPS, ODD_TILE, SUM_BLOCK, SUM_WARPS, TILE
from alignkit_kernels.noise.kernel import add_noise_kernel, keyed_kernel, keyed_part_kernel
from alignkit_kernels.pairs.kernel import pair_region_errors_backward_kernel, pair_region_errors_kernel
from alignkit_kernels.preference.checks import HEADS
from alignkit_kernels.preference.kernel import POINTERS as HEAD_POINTERS
from alignkit_kernels.preference.kernel import SETTINGS, preference_head_kernel
from alignkit_kernels.preference.launch import BLOCK
from alignkit_kernels.tiles import POINTERS, sum_tiles_kernel

BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = tuple(LAUNCHES)
POINTER_TYPES = {"coefficients_ptr": "*fp32", "labels_ptr": "*u8", "partial_ptr": "*fp32", "sums_ptr": "*fp64",
                 "grad_ptr": "*fp64", "keys_ptr": "*i64", "weights_ptr": "*fp32", "preference_ptr": "*i64"}  # fmt: skip


# one by one: all of them are together, below; in a cache of its own, which holds nothing that could run
NOT_ASSEMBLED = patch.object(CUDABackend, "make_cubin", lambda *_: b"")
SHARED = ".extern .shared .align 16 .b8 global_smem[];\n"
NEVER = "spills", "stack", "local_accesses", "short_offsets"
SPARE_INSTRUCTIONS = 1.1
SPARE_REGISTERS = 1.5  # triton 3.6 allocates up to half as many again as 3.7, whose measurements the budget holds


def variants(arch: int) -> dict[str, tuple]:
    """Name -> kernel, constants, warps, element type of latents."""
    choice = LAUNCHES[arch]
    found = {}
    for source, labels, aligned, dtype in (
        ("given", "dense", True, "bf16"),
        ("keyed", "dense", True, "bf16"),
        ("keyed", "none", True, "fp32"),
        ("path", "dense", True, "bf16"),
        ("path", "strided", False, "bf16"),
        ("keyed", "dense", False, "bf16"),
    ):
        walk = {"LABELS": labels, "ALIGNED": aligned, "DTYPE": tl.float32, "TILE": TILE if aligned else ODD_TILE}
        name = f"{source} {labels} {'aligned' if aligned else 'odd'} {dtype}"
        walk["STAGES"] = stages_for(choice.stages, aligned)
        single, apart = {"SOURCE": source, **walk}, source == "path"
        pair = {"SOURCE_W": source, "SOURCE_L": source, "SHARED": not apart, **walk}
        none = dict.fromkeys(() if apart else ("noise_l_ptr",))
        warps = choice.backward_warps
        found[f"errors {name}"] = region_errors_kernel, {**single, "HAS_REFERENCE": True}, NUM_WARPS, dtype
        found[f"errors backward {name}"] = region_errors_backward_kernel, single, warps, dtype
        found[f"pairs {name}"] = pair_region_errors_kernel, {**pair, **none, "HAS_REFERENCE": True}, NUM_WARPS, dtype
        for grads in (True, False):
            unused = ("by_pair_ptr", "by_loss_ptr", "importance_ptr")[: 3 if grads else 1]
            constants = {**pair, **none, **dict.fromkeys(unused), "GRADS": grads}
            kind = "pairs" if grads else "loss"
            found[f"{kind} backward {name}"] = pair_region_errors_backward_kernel, constants, warps, dtype
    for head in HEADS:
        constants = {"HEAD": head, "SAFEGUARD": True, "BLOCK": BLOCK, **dict.fromkeys(("beta_ptr", "guard_ptr"))}
        found[f"head {head}"] = preference_head_kernel, constants, 1, "fp64"
    found["normal part"] = keyed_part_kernel, {"TILE": choice.noise_tile}, choice.noise_warps, "bf16"
    found["sum tiles"] = sum_tiles_kernel, {"BLOCK": SUM_BLOCK}, SUM_WARPS, "fp32"
    for aligned in (True, False):
        noise = {"ALIGNED": aligned, "TILE": choice.noise_tile}
        name = "aligned" if aligned else "odd"
        for uniform in (False, True):
            kind = "uniform" if uniform else "normal"
            found[f"{kind} {name}"] = keyed_kernel, {"UNIFORM": uniform, **noise}, choice.noise_warps, "bf16"
        added = {"SOURCE": "keyed", "DTYPE": tl.float32, **noise}
        found[f"add noise {name}"] = add_noise_kernel, added, choice.noise_warps, "bf16"
    return found


def compiled(kernel, constants: dict, warps: int, dtype: str, arch: int):
    """The kernel as the launcher would have it compiled: nothing specialised on a size or an address. Pointers that are
    None are not passed."""
    constants = dict(constants)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("noise") and name.endswith("_ptr"):
            source = constants.get("SOURCE") or constants["SOURCE_W"]
            signature[name] = {"keyed": "*i64", "path": "*fp32"}.get(source, f"*{dtype}")
        elif (name == "weights_ptr" and constants.get("GRADS")) or name in ("by_loss_ptr", "importance_ptr"):
            signature[name] = "*fp64"
        elif name in POINTERS or name in HEAD_POINTERS:
            signature[name] = POINTER_TYPES.get(name, f"*{dtype}")
        else:
            signature[name] = "i64" if name in SETTINGS else "i32"
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def together(modules: list[str]) -> str:
    """One module of several that hold a kernel each, named k0, k1, …: tools take longer to start than to work."""
    header, bodies = "", []
    for number, ptx in enumerate(modules):
        entry = re.search(r"^\.visible \.entry (\w+)\(", ptx, re.M)
        header = header or ptx[: ptx.index(".address_size 64")] + ".address_size 64\n" + SHARED
        body = re.sub(r"^\t\.loc\t.*\n", "", ptx[entry.start() :].split("\n\t.file\t")[0], flags=re.M)  # of no source
        bodies.append(re.sub(rf"\b{entry.group(1)}(_param_\d+)?\b", rf"k{number}\1", body))
    return "\n".join([header, *bodies])


def assembled(ptx: str, arch: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """By kernel: what the assembler reports, and the instructions in program order, without padding."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernels.ptx"), Path(folder, "kernels.o")
        source.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx).group(1)
        tool = Path(get_ptxas(arch).path)
        command = [tool, "-v", "--fmad=false", f"--gpu-name={target}", source, "-o", binary]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [Path(get_ptxas(90).path).with_name("nvdisasm"), "-c", binary]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reports = dict(re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", report, re.S))
    sections = re.findall(r"^\.text\.(\w+):(.*?)(?=^\.text\.|\Z)", listing, re.S | re.M)
    return reports, {name: _instructions(section) for name, section in sections}


def _instructions(section: str) -> list[str]:
    lines = (re.sub(r"^.*?/\*\w+\*/\s+", "", line) for line in re.findall(r"^[ \t]+/\*\w{4,}\*/.*", section, re.M))
    return [line for line in lines if not line.startswith("NOP")]


def measured(binary, report: str, code: list[str]) -> dict[str, int]:
    ptx = binary.asm["ptx"]
    waits = [i for i, line in enumerate(code) if re.search(r"\bDEPBAR\.LE", line)] or [0]
    copies = [i for i, line in enumerate(code) if re.search(r"LDGSTS", line)]
    return {
        # asynchronous copies, of 64 or 128 bits, that have been started when the first of them is waited for
        "in_flight": sum(i < waits[0] for i in copies),
        "async_copies": len(copies),
        "instructions": len(code),
        "fp64_arithmetic": sum(bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MNMX)\b", line)) for line in code),
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "stack": int(re.search(r"(\d+) bytes stack frame", report).group(1)),
        "local_accesses": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "shared_memory": binary.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx)),
        # only latents are bf16; their programs' places must be 64-bit
        "short_offsets": len(re.findall(r"tt\.addptr [^:]+: !tt\.ptr<bf16>, i32", binary.asm["ttir"])),
        "narrow_loads": len(re.findall(r"ld\.global[.\w:]*\.(?:v\d\.)?b(?:8|16)\b", ptx)),
    }


def measure_all(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, dict[str, dict[str, int]]]:
    found = {}
    for arch in architectures:
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder), NOT_ASSEMBLED:
            binaries = {name: compiled(*variant, arch) for name, variant in variants(arch).items()}
        reports, code = assembled(together([binary.asm["ptx"] for binary in binaries.values()]), arch)
        found[f"sm_{arch}"] = {
            name: measured(binary, reports[f"k{number}"], code[f"k{number}"])
            for number, (name, binary) in enumerate(binaries.items())
        }
    return found


def violations(measured: dict[str, dict[str, int]], budget: dict[str, dict[str, int]]) -> list[str]:
    """What one architecture's kernels use beyond their budget, in words."""
    if measured.keys() != budget.keys():
        return [f"the budget is for other kernels: {sorted(measured.keys() ^ budget.keys())}; run --update"]
    found = []
    for name, got in measured.items():
        allowed = budget[name]
        ceilings = {**dict.fromkeys(NEVER, 0), "shared_memory": allowed["shared_memory"]}
        ceilings |= {"instructions": int(allowed["instructions"] * SPARE_INSTRUCTIONS)}
        if "backward" in name:
            ceilings["fp64_arithmetic"] = 0
        ceilings |= {"registers": int(allowed["registers"] * SPARE_REGISTERS), "narrow_loads": allowed["narrow_loads"]}
        found += [f"{name}: {got[what]} {what}, allowed {top}" for what, top in ceilings.items() if got[what] > top]
        for what in ("wide_loads", "in_flight", "async_copies"):
            if got[what] < allowed[what]:
                found.append(f"{name}: {got[what]} {what}, expected {allowed[what]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the measurements to budget.json")
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES, help="measure this one")
    parser.add_argument("--check", action="store_true", help="print what exceeds budget.json instead")
    options = parser.parse_args()
    measurements = measure_all(tuple(options.architecture or ARCHITECTURES))
    if options.update:
        known = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        BUDGET.write_text(json.dumps(known | measurements, indent=1) + "\n")
        return
    if options.check:
        budget = json.loads(BUDGET.read_text())
        measurements = {name: violations(got, budget[name]) for name, got in measurements.items()}
    print(json.dumps(measurements, indent=1))


if __name__ == "__main__":
    main()
