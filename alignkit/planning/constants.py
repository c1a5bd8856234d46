"""Every number of the plan that is no property of the run, each with its source. Bytes and FLOP/s, decimal."""

from dataclasses import dataclass

from alignkit.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """peak: dense bf16, without sparsity. fp32: without TF32, which torch has to be asked for.
    host: to and from the main memory, one way. device: what its driver calls it; boards on PCIe have other peaks."""

    name: str
    device: str
    memory: float
    peak: float
    fp32: float
    host: float


GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 80 GB, 1,979 TFLOPS bf16 with sparsity (half without it), 67
    # TFLOPS fp32, PCIe Gen5 128 GB/s both ways
    "H100": Gpu("H100", "NVIDIA H100 80GB HBM3", 80e9, 989e12, 67e12, 64e9),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: 141 GB, the rest as the H100
    "H200": Gpu("H200", "NVIDIA H200", 141e9, 989e12, 67e12, 64e9),
    # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM: 312 TFLOPS bf16, 19.5 TFLOPS fp32, PCIe Gen4 64 GB/s both ways
    "A100-80G": Gpu("A100-80G", "NVIDIA A100-SXM4-80GB", 80e9, 312e12, 19.5e12, 32e9),
}
GPUS_A_NODE = 8  # DGX and HGX boards of all three

EFFICIENCY = 0.40
"""Share of the peak that all FLOPs of a step run at, those of recomputing included. From a paper: 38 to 43 % of bf16
model FLOPs in training Llama 3 on H100 (arXiv 2407.21783, table 4). Not measured with alignkit on a GPU yet."""

RESERVED = 1.5e9
"""Bytes a process takes of its GPU before any tensor: CUDA's context, NCCL's and cuBLAS's workspaces. Ours, a guess."""
FILLED = 0.92
"""Share of a GPU's memory that a plan may fill; the rest goes to what the allocator cannot join together. Ours."""

# DeepSpeed 0.19.8, runtime/zero/config.py: in elements; keys of zero_optimization, which deepspeed.config may set
DEEPSPEED = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}

PROCESS = 2e9
"""Bytes of main memory of a process before it loads anything. With torch, diffusers and DeepSpeed imported 0.7 GB are
measured on a CPU (torch 2.13.0, benchmarks/check_plan.py); the rest is for CUDA's libraries, ours, a guess."""
ADAM_TRAFFIC, HOST_MEMORY = 32, 200e9
"""With the optimizer offloaded: bytes that a step of Adam reads and writes for each parameter (gradient, master, two
moments, each 4 bytes, all but the gradient written back, and the bf16 weight), and bytes a second of a node's main
memory that it reaches. The first is calculated, the second ours: about half of what two sockets of DDR5 can."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward over its forward: it computes the scores again (FlashAttention-2, arXiv 2307.08691,
section 4.1). Of a matrix product it is 2."""


def gpu_named(name: str) -> Gpu:
    """Raises ConfigError for one that is not in the table."""
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"plan: --gpu: {name!r} is not in the table; one of {', '.join(GPUS)}")
    return found
