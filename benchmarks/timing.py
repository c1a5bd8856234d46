"""Clocks: CUDA events with the L2 cache cold on a GPU, the wall clock on a CPU."""

import time
from collections.abc import Callable
from functools import lru_cache

import torch

GPU = torch.cuda.is_available()
FLUSH_BYTES = 512 * 2**20  # several times any L2 cache
HEAD_START = 2_000_000  # cycles, about a millisecond, that the GPU waits so that the host never makes it wait


@lru_cache
def flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


class Clock:
    """Times calls one by one. On a GPU nothing is read until `seconds`, and a call's launches are all queued before
    the first one starts: the time is the GPU's alone."""

    def __init__(self):
        self.marks: dict[object, list] = {}

    def run(self, name: object, call: Callable[[], object]) -> None:
        if GPU:
            flush_buffer().zero_()
            torch.cuda._sleep(HEAD_START)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            self.marks.setdefault(name, []).append((start, end))
        else:
            start = time.perf_counter()
            call()
            self.marks.setdefault(name, []).append(time.perf_counter() - start)

    def seconds(self, name: object) -> list[float]:
        if not GPU:
            return self.marks[name]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in self.marks[name]]


@lru_cache
def copy_bandwidth() -> float:
    """Bytes a second that this device copies at, read and written: what a share of bandwidth is a share of."""
    size = 2**30 if GPU else 2**27
    source = torch.ones(size, dtype=torch.uint8, device="cuda" if GPU else "cpu")
    target = torch.empty_like(source)
    clock = Clock()
    for _ in range(10):
        clock.run("copy", lambda: target.copy_(source))
    return 2 * size / sorted(clock.seconds("copy")[3:])[3]


def launches(call: Callable[[], object]) -> int | str:
    """Kernels that one call starts on the GPU, of whatever origin; copies and fills by the driver are none."""
    if not GPU:
        return "none: CPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        return "not measured: the profiler saw nothing"
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


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
