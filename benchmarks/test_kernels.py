"""Throughput of the fused ops against eager code and torch.compile: `make bench`, or

    pytest benchmarks                 rows go to out/benchmarks/kernels.csv (--csv for another file)
    python benchmarks/plot.py         draws them

Each test is one piece of work, shape, batch and dtype. Every provider is verified against fp64, numbers and gradients;
one that is out of tolerance gets a row that says so and no time. The others are timed in turn, round by round, forward,
backward and both, on inputs that rotate; on a GPU by CUDA events with the L2 cache cold, our own with a warm one too.
On a CPU the reference path runs, and every row says so. pytest-benchmark's own table is the time of a whole round; the
rows are the result. `ours_to_best` is our time to that of the best of eager and torch.compile: below 1 is faster.
"""

from statistics import median, quantiles

import pytest
import torch
from timing import GPU, Clock, clocks, copy_bandwidth, extra_megabytes, started
from work import WORK, make_inputs

DEVICE = "cuda" if GPU else "cpu"
ROUNDS = 30 if GPU else 5
REAL = "Wan 480p 81 frames", "Wan 720p 81 frames", "CogVideoX 480p 49 frames"
CASES = (
    [(name, batch) for batch in (1, 4, 16) for name in REAL] if GPU else [("small", 4), ("CogVideoX 480p 49 frames", 1)]
)

# Sums are measured in units of the sum of their terms' magnitudes, gradients of the largest gradient.
FP32 = 1e-5  # 84 roundings of fp32: the adds in a row of any summation in blocks, and a term's own
# Noise stored in bf16 is another noise than the fp32 normals of the key, by half an ulp of at most 5.7: 2**-7, beside
# residuals of up to about 1.5.
STORED = 2e-2
# Gradients are rounded to bf16, here and in what they are measured against, and may fall to different sides: one ulp of
# the largest.
BF16 = 2.0**-7
# Timed as what people run, not as something right: a residual of up to 1.5 comes from bf16 numbers of up to 6, each off
# by 2**-7, and is squared; in a loss the differences of such squares are multiplied by beta.
EAGER_BF16 = {"given": 0.1, "path": 1.0}  # on the path its rounding is divided by s, down to 0.1
# A loss of differences taken after squaring: some eps of an error of 0.1, times beta / 2 = 25, beside a loss near 1.
LOSS = 1e-4


def tolerance(provider: str, work: str, dtype: torch.dtype) -> float:
    op, _, source = work.partition(", ")
    if provider == "eager bf16":
        return 1.0 if op == "local_dpo_loss" else EAGER_BF16.get(source, 0.1)
    if provider == "torch.randn":
        return float("inf")  # other numbers: what one calls instead
    allowed = FP32 + (LOSS if op == "local_dpo_loss" else 0) + (BF16 if dtype != torch.float32 else 0)
    return allowed + (STORED if dtype != torch.float32 and "key" in source and provider != "alignkit" else 0)


def deviation(numbers, gradients, true) -> float:
    """The largest error of any number and of any gradient."""
    true_numbers, magnitudes, true_gradients = true
    found = [(a.detach() - b).abs() / c for a, b, c in zip(numbers, true_numbers, magnitudes, strict=True)]
    found += [(a - b).abs() / b.abs().max() for a, b in zip(gradients, true_gradients, strict=True)]
    return max(float(x.max()) for x in found)


def gradients_of(numbers, wanted):
    return torch.autograd.grad(numbers, wanted, [torch.ones_like(x) for x in numbers], retain_graph=True)


def calls_of(provider, x) -> dict:
    """What is timed: forward; and where something is differentiated, backward of one forward, and both."""
    numbers, wanted = provider(x)
    if not wanted:
        return {"forward": lambda: provider(x)}
    ones = [torch.ones_like(x) for x in numbers]

    def both():
        numbers, wanted = provider(x)
        return torch.autograd.grad(numbers, wanted, ones)

    return {
        "forward": lambda: provider(x),
        "backward": lambda: torch.autograd.grad(numbers, wanted, ones, retain_graph=True),
        "both": both,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("shape", "batch"), CASES)
@pytest.mark.parametrize("work", WORK)
def test_throughput(benchmark, skip_if_measured, add_rows, work, shape, batch, dtype):
    op, source = (part or "" for part in (work + ", ").split(", ")[:2])
    shared = {"op": op, "noise": source, "shape": shape, "pairs": batch, "dtype": str(dtype).removeprefix("torch.")}
    skip_if_measured(shared)
    providers, exact, traffic = (made := WORK[work]()).providers, made.exact, made.traffic
    sets = [make_inputs(shape, batch, dtype, DEVICE, seed) for seed in range(2)]
    deviations, calls, failed = dict.fromkeys(providers, 0.0), {}, {}
    for i, x in enumerate(sets):
        true_numbers, magnitudes, wanted = exact(x)
        true = [n.detach() for n in true_numbers], magnitudes, gradients_of(true_numbers, wanted) if wanted else ()
        for name, provider in providers.items():
            try:
                numbers, wanted = provider(x)
                got = deviation(numbers, gradients_of(numbers, wanted) if wanted else (), true)
                deviations[name] = max(deviations[name], got)
                if not deviations[name] <= tolerance(name, work, dtype):
                    failed[name] = "out of tolerance"
                calls |= {(direction, name, i): call for direction, call in calls_of(provider, x).items()}
            except Exception as error:  # another provider's rows live
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        del true, true_numbers, magnitudes

    clock, turn = Clock(), iter(range(10**9))
    timed = [name for name in providers if name not in failed]
    directions = list(dict.fromkeys(direction for direction, *_ in calls))

    def one_round():
        i = next(turn) % len(sets)
        for direction in directions:
            for name in timed:
                clock.run((direction, name), calls[direction, name, i])
            if GPU and "alignkit" in timed:
                clock.run((direction, "alignkit, warm L2"), calls[direction, "alignkit", i], cold=False)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=3 if GPU else 1)
    rows = []
    for direction in directions:
        own = {name: clock.seconds((direction, name))[0 if GPU else 1 :] for name in timed}
        best = min((median(own[name]) for name in timed if name != "alignkit"), default=None)
        moved = traffic(sets[0])
        moved = {"forward": moved[0], "backward": moved[1], "both": sum(moved)}[direction]
        names = [*timed, *(["alignkit, warm L2"] if GPU and "alignkit" in timed else [])]
        for name in names:
            seconds = own[name] if name in own else clock.seconds((direction, name))
            quarters = quantiles(seconds, n=4, method="inclusive")
            rate, host = moved / median(seconds), clock.enqueued.get((direction, name))
            launched, copied = started(calls[direction, name.partition(",")[0], 0])
            rows.append(shared | {
                "direction": direction, "provider": name, "median_us": round(1e6 * median(seconds), 2),
                "low_us": round(1e6 * quarters[0], 2), "high_us": round(1e6 * quarters[2], 2),
                "samples": len(seconds), "host_us": round(1e6 * median(host), 1) if host else "",
                "gb_per_s": round(rate / 1e9, 4), "share_of_copy": round(rate / copy_bandwidth(), 5),
                "share_of_same_size_copy": round(rate / copy_bandwidth(max(moved // 2, 1)), 5),
                "ours_to_best": round(median(own["alignkit"]) / best, 4) if name == "alignkit" and best else "",
                "launches": launched, "copies": copied,
                "extra_mb": extra_megabytes(calls[direction, name.partition(",")[0], 0]),
                "deviation": f"{deviations[name.partition(',')[0]]:.1e}", "clocks_mhz": clocks(), "failed": "",
            })  # fmt: skip
    empty = dict.fromkeys(rows[0], "") if rows else {}
    rows += [empty | shared | {"provider": name, "deviation": f"{deviations[name]:.1e}", "failed": why}
             for name, why in failed.items()]  # fmt: skip
    benchmark.extra_info["median_us"] = {f"{row['provider']}, {row['direction']}": row["median_us"] for row in rows}
    add_rows(rows)
    assert "alignkit" not in failed, failed
