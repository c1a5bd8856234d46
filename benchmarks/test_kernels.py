"""Throughput of the fused ops against eager code and torch.compile.

    pytest benchmarks                 rows go to out/benchmarks/kernels.csv (--csv for another file)
    python benchmarks/plot.py         draws them

Each test is one op, shape, batch, dtype and direction: all providers are verified against fp64, then timed in turn,
round by round, on inputs that rotate. On a GPU the clock is CUDA events with a cold L2 cache. On a CPU the reference
path runs on small shapes, and every row says so: those numbers are about the harness, not about the kernels.
"""

from statistics import median, quantiles

import pytest
import torch
from timing import GPU, Clock, copy_bandwidth, extra_megabytes, launches
from work import SHAPES, exact, make_inputs, providers, traffic

DEVICE = "cuda" if GPU else "cpu"
ROUNDS = 50 if GPU else 5
CASES = (
    [(name, batch) for name in SHAPES if name != "small" for batch in (1, 4, 16)]
    if GPU
    else [("small", 1), ("small", 4)]
)

# Relative to the largest number of a kind. eager bf16 is timed as what people run, not as something right: its gap
# may be off by all of its size.
TOLERANCE = {"eager bf16": 2.0}


def deviation(got: torch.Tensor, true: torch.Tensor) -> float:
    return float(((got.double() - true).abs() / true.abs().amax(1, keepdim=True)).max())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("shape", "batch"), CASES)
@pytest.mark.parametrize("regenerated", [False, True], ids=["given", "regenerated"])
@pytest.mark.parametrize("op", ["region_errors", "pair_region_errors"])
def test_throughput(benchmark, add_rows, op, regenerated, shape, batch, dtype, direction):
    sets = [make_inputs(shape, batch, dtype, DEVICE, seed) for seed in range(2)]
    named = providers(op, regenerated, GPU)
    checked = {}
    for name, provider in named.items():
        checked[name] = max(deviation(provider(x).detach(), exact(x, op, regenerated).detach()) for x in sets)
        # noise stored in bf16 is another noise than the fp32 normals of the key
        stored = regenerated and dtype == torch.bfloat16 and name != "alignkit"
        assert checked[name] <= TOLERANCE.get(name, 2e-2 if stored else 1e-4), f"{name} is wrong: not timed"

    sides = 2 if op == "pair_region_errors" else 1

    def call_of(name, x):
        if direction == "forward":
            return lambda: named[name](x)
        total = named[name](x).sum()
        return lambda: torch.autograd.grad(total, x.pred[:sides], retain_graph=True)

    calls = {name: [call_of(name, x) for x in sets] for name in named}
    for each in calls.values():
        each[0]()
    clock, turn = Clock(), iter(range(10**9))

    def one_round():
        i = next(turn) % len(sets)
        for name, each in calls.items():
            clock.run(name, each[i])

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    rows = []
    for name, each in calls.items():
        seconds = clock.seconds(name)
        low, *_, high = quantiles(seconds, n=10)
        rate = traffic(sets[0], op, regenerated, direction) / median(seconds)
        rows.append({
            "op": op, "noise": "regenerated" if regenerated else "given", "shape": shape, "pairs": batch,
            "dtype": str(dtype).removeprefix("torch."), "direction": direction, "provider": name,
            "median_us": round(1e6 * median(seconds), 2), "low_us": round(1e6 * low, 2),
            "high_us": round(1e6 * high, 2),
            "gb_per_s": round(rate / 1e9, 2), "share_of_copy": round(rate / copy_bandwidth(), 4),
            "launches": launches(each[0]), "extra_mb": extra_megabytes(each[0]), "deviation": f"{checked[name]:.1e}",
        })  # fmt: skip
    benchmark.extra_info["median_us"] = {row["provider"]: row["median_us"] for row in rows}
    add_rows(rows)
