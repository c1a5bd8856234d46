#!/usr/bin/env bash
# What needs a GPU, in one go: the kernels' tests on CUDA tensors, then the benchmark and its plot, into $OUT.
# Needs torch, triton, pytest and pytest-benchmark; the plot needs matplotlib, and can be drawn elsewhere.
#
#   OUT=results COMMIT=$(git rev-parse --short HEAD) benchmarks/on_gpu.sh                the bf16 rows of 1 and 16 pairs
#   benchmarks/on_gpu.sh --all                                                          every row
#   benchmarks/on_gpu.sh -k "region_errors and given"                                   rows by pytest's own options
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
rows=("$@")
[[ $# -eq 0 ]] && rows=(-k "bf16 and not 4-bf16")
[[ ${1:-} == --all ]] && rows=()

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"' || exit 2
failed=0
# left out: what runs without a GPU, and is run there
"$python" -m pytest tests/kernels -q -p no:cacheprovider \
    --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_compiled.py \
    --ignore tests/kernels/test_recipes.py --ignore tests/kernels/test_clash.py 2>&1 | tee "$out/tests.log" || failed=1
"$python" -m pytest benchmarks -q -p no:cacheprovider --csv "$out/kernels.csv" ${rows[@]+"${rows[@]}"} 2>&1 |
    tee "$out/benchmark.log" || failed=1
"$python" benchmarks/plot.py "$out/kernels.csv" "$out/kernels.png" ||
    echo "no plot; draw it with: python benchmarks/plot.py $out/kernels.csv"
exit $failed
