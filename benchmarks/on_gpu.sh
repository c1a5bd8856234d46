#!/usr/bin/env bash
# What needs a GPU, on a bare machine, in two parts of a few minutes each; both take up where they were stopped.
# Needs torch, triton, numpy, pytest, pytest-benchmark and pytest-xdist; the plot needs matplotlib and can be drawn
# elsewhere. What they write goes to $OUT (out/gpu).
#
#   OUT=results COMMIT=$(git rev-parse --short HEAD) benchmarks/on_gpu.sh benchmark      the bf16 rows of 1 and 16 pairs
#   benchmarks/on_gpu.sh benchmark -k "local_dpo_loss and 480p"                          rows by pytest's own options
#   benchmarks/on_gpu.sh tests                                                           the kernels' tests on CUDA
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
part=${1:-}
shift || true
"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no GPU here" >&2; exit 2; }
case $part in
benchmark)
    rows=("$@")
    [[ $# -eq 0 ]] && rows=(-k "bf16 and not 4-bf16")
    "$python" -m pytest benchmarks -q -p no:cacheprovider --resume --csv "$out/kernels.csv" "${rows[@]}" 2>&1 |
        tee "$out/benchmark.log"
    failed=$?
    "$python" benchmarks/plot.py "$out/kernels.csv" "$out/kernels.png" ||
        echo "no plot; draw it with: python benchmarks/plot.py $out/kernels.csv"
    exit $failed
    ;;
tests)
    # left out: what runs without a GPU, and is run there
    "$python" -m pytest tests/kernels -q -n 8 -p no:cacheprovider "$@" \
        --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_compiled.py \
        --ignore tests/kernels/test_recipes.py --ignore tests/kernels/test_clash.py 2>&1 | tee "$out/tests.log"
    ;;
*)
    echo "usage: benchmarks/on_gpu.sh benchmark|tests [options of pytest]" >&2
    exit 2
    ;;
esac
