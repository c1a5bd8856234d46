"""How fast a step was and where its time went: no two runs agree on it, so it stays out of the metrics."""

import resource
import time
from typing import Any

import torch


class Clock:
    """Seconds by part: `at` ends one and begins the next. On a GPU what it has worked, not what was asked of it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def at(self, part: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def stop(self) -> dict[str, float]:
        """What each part has taken since the first `at`; it begins anew. Waits for the GPU."""
        self.at("")
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            took = start.elapsed_time(end) / 1000 if self._cuda else end - start
            seconds[part] = seconds.get(part, 0.0) + took
        self._marks.clear()
        return seconds


def timings(
    seconds: float, parts: dict[str, float], pairs: int, tokens: int, at_peak: float | None
) -> dict[str, float]:
    """Of a step that learns from so many pairs, of so many tokens, on all processes.

    parts: seconds of it by what was done, on this process. at_peak: seconds of the step's arithmetic, nothing of it
    done twice, at the devices' peak; None where no peak is known.
    """
    utilization = {} if at_peak is None else {"mfu": at_peak / seconds}
    return {
        "seconds": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
        **utilization,
        **{f"seconds/{part}": took for part, took in parts.items()},
        **_peak_memory(),
    }


def in_short(metrics: dict[str, Any], timings: dict[str, float]) -> str:
    """What a terminal shows of a step beside its errors."""
    accuracy = metrics.get("region/accuracy", metrics.get("rewards/accuracies"))
    memory = timings.get("gpu_peak_memory_gb", timings.get("process_peak_memory_gb", 0.0))
    said = "" if accuracy is None else f"accuracy {100 * accuracy:.0f} %  "
    return f"{said}{timings['pairs_per_second']:.3g} pairs/s  {memory:.3g} GB at most"


def _peak_memory() -> dict[str, float]:
    """The most so far: of tensors on this process's GPU; without one, of the process's whole resident memory."""
    if torch.cuda.is_available():
        return {"gpu_peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"process_peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
