#!/usr/bin/env bash
# All that a GPU can tell of linvision, in 11 minutes at most, on a machine without a network:
#
#     bash scripts/benchmarks/gpu_report.sh OUTPUT [CIFAR10.npz]
#
# OUTPUT receives figures.jsonl (each figure as it comes, the most important first), figures.md, log.txt and the trained
# models. The second file is made by scripts.tools.pack_images; without it nothing is trained. linvision runs from this
# checkout. What may be set:
#     PYTHON=python3     with torch, torchvision, timm, pytest and TensorBoard
#     WHEELS=FOLDER      packages that it lacks, as wheels
#     LIMIT_S=660        seconds for everything
#     DEVICE=cuda        with 'cpu', TINY=1 rehearses all of it
#     PATIENCE=1         how many times its seconds each part may take
# Each part is a process with a bound of its own, so that none can take the time, or the figures, of the others.
set -uo pipefail
output=${1:?usage: bash scripts/benchmarks/gpu_report.sh OUTPUT [CIFAR10.npz]}
mkdir -p "$output"
output=$(cd "$output" && pwd)
packed=${2:+$(realpath "$2")}
wheels=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} limit=${LIMIT_S:-660} patience=${PATIENCE:-1}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1

say() { echo "$@" | tee -a "$output/log.txt"; }

# run SECONDS COMMAND …: it, for so long and no longer than there is time
run() {
    local most=$1 left=$((limit - SECONDS - 8))
    shift
    if [ "$left" -lt 10 ]; then say "left out, $SECONDS s are over: $*" && return; fi
    if [ "$most" -gt "$left" ]; then most=$left; fi
    say "== $SECONDS s: $* (at most $most s)"
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee -a "$output/log.txt"
    say "== $SECONDS s: ended with ${PIPESTATUS[0]}"
}

# part SECONDS NAME …: of gpu_report.py, which starts nothing in the last tenth of its time
part() {
    local most=$1 name=$2 left=$((limit - SECONDS - 8))
    shift 2
    if [ "$most" -gt "$left" ]; then most=$left; fi
    run "$most" "$python" -m scripts.benchmarks.gpu_report "$name" --output "$output" --device "${DEVICE:-cuda}" \
        --seconds $((most * 9 / 10)) ${TINY:+--tiny} "$@"
}

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl 2>&1 | tee -a "$output/log.txt"
    export PYTHONPATH="$PYTHONPATH:$site" # after what is there
fi
if command -v nvidia-smi > /dev/null; then nvidia-smi 2>&1 | tee -a "$output/log.txt"; fi

# 1. tests that need a GPU; a warning of another version is no failure here
run $((patience * 120)) "$python" -m pytest -v -p no:cacheprovider -m gpu -W default --maxfail=5 tests/test_gpu.py
# 2 and 3. speed, memory, energy, kernels; attention alone
part $((patience * 190)) speed
part $((patience * 90)) compiled
part $((patience * 60)) tables
# 4. what is learnt in three minutes
if [ -n "$packed" ]; then
    part $((patience * 430)) learn --packed "$packed" --minutes 3
    part $((patience * 60)) tables
fi
say "== $SECONDS s in all"
