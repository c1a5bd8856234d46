"""Clocks: CUDA events, with the L2 cache cold or warm, on a GPU; the wall clock on a CPU."""

import subprocess
import time
from collections.abc import Callable
from functools import lru_cache

import torch

GPU = torch.cuda.is_available()
FLUSH_BYTES = 512 * 2**20  # several times any L2 cache
HEAD_START = 2_000_000  # cycles, about a millisecond, that the GPU waits so that the host never makes it wait


@lru_cache
def flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


class Clock:
    """Times calls one by one. On a GPU nothing is read until `seconds`, and a call's launches are all queued before
    the first one starts, by a head start that grows where it is too short: the time is the GPU's alone. `enqueued` is
    the host's part: the seconds that it takes to queue a call."""

    def __init__(self):
        self.marks: dict[object, list] = {}
        self.enqueued: dict[object, list[float]] = {}
        self.head_start = HEAD_START

    def run(self, name: object, call: Callable[[], object], cold: bool = True) -> None:
        if not GPU:
            start = time.perf_counter()
            call()
            self.marks.setdefault(name, []).append(time.perf_counter() - start)
            return
        if cold:
            flush_buffer().max()  # read, so that nothing is left to be written back while the call runs
        else:
            call()
        torch.cuda._sleep(self.head_start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        late = start.query()  # the GPU had gone on before all was queued: what it waited for is in the time
        end.record()
        self.enqueued.setdefault(name, []).append(seconds)
        if late:
            self.head_start = min(2 * self.head_start, 64 * HEAD_START)
            self.marks.setdefault(name, [])
        else:
            self.marks.setdefault(name, []).append((start, end))

    def seconds(self, name: object) -> list[float]:
        if not GPU:
            return self.marks[name]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in self.marks[name]]


@lru_cache
def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second, read and written, at which this device copies `size` bytes."""
    size = size if GPU else min(size, 2**27)
    source = torch.ones(size, dtype=torch.uint8, device="cuda" if GPU else "cpu")
    target = torch.empty_like(source)
    clock = Clock()
    for _ in range(13):
        clock.run("copy", lambda: target.copy_(source))
    found = sorted(clock.seconds("copy")[3:])
    return 2 * size / found[len(found) // 2]


def started(call: Callable[[], object]) -> tuple[int | str, int | str]:
    """Kernels that one call starts on the GPU, of whatever origin, and copies and fills by the driver."""
    if not GPU:
        return "none: CPU", "none: CPU"
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        return ("not measured: the profiler saw nothing",) * 2
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_gpu)
    return len(on_gpu) - copies, copies


def clocks() -> str:
    """SM and memory clocks now, in MHz."""
    if not GPU:
        return ""
    try:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "--id=0"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().replace(", ", "/")
    except OSError:
        return ""


def extra_megabytes(call: Callable[[], object]) -> float | str:
    """Peak memory of one call over its inputs."""
    if not GPU:
        return "not measured"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 3)
