"""Throughput of the fused ops against eager code and torch.compile: `make bench`, or

    pytest benchmarks                 rows go to out/benchmarks/kernels.csv (--csv for another file)
    python benchmarks/plot.py         draws them

Each test is one op, shape, batch and dtype. All providers are verified against fp64, numbers and gradients, then
timed in turn, round by round, forward and backward, on inputs that rotate. On a GPU the clock is CUDA events with a
cold L2 cache. On a CPU the reference path runs, and every row says so: those numbers are about the harness, not about
the kernels. pytest-benchmark's own table is the time of a whole round; the rows are the result.
"""

from statistics import median, quantiles

import pytest
import torch
from timing import GPU, Clock, copy_bandwidth, extra_megabytes, launches
from work import backward_of, exact, make_inputs, providers, traffic

DEVICE = "cuda" if GPU else "cpu"
ROUNDS = 50 if GPU else 5
REAL = "Wan 480p 81 frames", "Wan 720p 81 frames", "CogVideoX 480p 49 frames"
CASES = (
    [(name, batch) for batch in (1, 4, 16) for name in REAL] if GPU else [("small", 4), ("CogVideoX 480p 49 frames", 1)]
)
DIRECTIONS = "forward", "backward"

# Sums are measured in units of the sum of their terms' magnitudes, gradients of the largest gradient.
FP32 = 1e-5  # 84 roundings of fp32: the adds in a row of any summation in blocks, and a term's own
# Noise stored in bf16 is another noise than the fp32 normals of the key, by half an ulp of at most 5.7: 2**-7, beside
# residuals of up to about 1.5.
STORED = 2e-2
# Rounding gradients to bf16, once; the interpreter and some compilers truncate.
BF16 = 2.0**-8
# Timed as what people run, not as something right: a residual of up to 1.5 comes from bf16 numbers of up to 6, each off
# by 2**-7, and is squared.
EAGER_BF16 = 0.1


def tolerance(name: str, regenerated: bool, dtype: torch.dtype) -> float:
    if name == "eager bf16":
        return EAGER_BF16
    if dtype == torch.float32:
        return FP32
    return BF16 + FP32 + (STORED if regenerated and name != "alignkit" else 0)


def deviation(numbers, gradients, true) -> float:
    """The largest error of any number and of any gradient."""
    true_numbers, magnitudes, true_gradients = true
    found = [(a - b).abs() / c for a, b, c in zip(numbers, true_numbers, magnitudes, strict=True)]
    found += [(a - b).abs() / b.abs().max() for a, b in zip(gradients, true_gradients, strict=True)]
    return max(float(x.detach().max()) for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("shape", "batch"), CASES)
@pytest.mark.parametrize("regenerated", [False, True], ids=["given", "regenerated"])
@pytest.mark.parametrize("op", ["region_errors", "pair_region_errors"])
def test_throughput(benchmark, add_rows, op, regenerated, shape, batch, dtype):
    sets = [make_inputs(shape, batch, dtype, DEVICE, seed) for seed in range(2)]
    named = providers(op, regenerated)
    deviations = dict.fromkeys(named, 0.0)
    calls = {}
    for i, x in enumerate(sets):
        true = exact(x, op, regenerated)
        for name, provider in named.items():
            numbers = provider(x)
            backward = backward_of(numbers, x, op)
            deviations[name] = max(deviations[name], deviation(numbers, backward(), true))
            assert deviations[name] <= tolerance(name, regenerated, dtype), f"{name} is wrong: not timed"
            calls["forward", name, i] = lambda provider=provider, x=x: provider(x)
            calls["backward", name, i] = backward
        del true

    clock, turn = Clock(), iter(range(10**9))

    def one_round():
        i = next(turn) % len(sets)
        for direction in DIRECTIONS:
            for name in named:
                clock.run((direction, name), calls[direction, name, i])

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    rows = []
    for direction in DIRECTIONS:
        for name in named:
            seconds, call = clock.seconds((direction, name))[1:], calls[direction, name, 0]
            low, *_, high = quantiles(seconds, n=10, method="inclusive")
            rate = traffic(sets[0], op, regenerated) / median(seconds)
            rows.append({
                "op": op, "noise": "regenerated" if regenerated else "given", "shape": shape, "pairs": batch,
                "dtype": str(dtype).removeprefix("torch."), "direction": direction, "provider": name,
                "median_us": round(1e6 * median(seconds), 2), "low_us": round(1e6 * low, 2),
                "high_us": round(1e6 * high, 2),
                "gb_per_s": round(rate / 1e9, 4), "share_of_copy": round(rate / copy_bandwidth(), 5),
                "launches": launches(call), "extra_mb": extra_megabytes(call), "deviation": f"{deviations[name]:.1e}",
            })  # fmt: skip
    benchmark.extra_info["median_us"] = {f"{row['provider']}, {row['direction']}": row["median_us"] for row in rows}
    add_rows(rows)
