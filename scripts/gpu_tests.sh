#!/usr/bin/env bash
# Every test that needs a GPU, then the kernel benchmark, in one call on a machine with a GPU:
#
#   bash scripts/gpu_tests.sh [pytest arguments]
#
# Wheels in .whl/ are installed into a folder of their own first, for machines without a package index.
# With OUT set, the log, the JUnit report and the benchmark's table are written there.
# The exit status is that of the tests, or of the benchmark where the tests passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}
WITH_BENCH=${WITH_BENCH:-1}
report=()
log=/dev/null
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    log=$OUT/gpu_tests.log
    report=(--junitxml "$OUT/gpu_tests.xml")
fi

if compgen -G '.whl/*.whl' >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl || exit 2
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/patches:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

run() {
    "$PYTHON" - <<'PY' || return 3
import torch

if not torch.cuda.is_available():
    raise SystemExit("error: torch sees no GPU here")
import triton

print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
PY
    echo "== tests marked gpu"
    "$PYTHON" -m pytest -m gpu -ra --durations=10 -p no:cacheprovider "${report[@]}" "$@"
    local tests=$?
    local bench=0
    if [ "$WITH_BENCH" = 1 ] && [ -f benchmarks/kernels.py ]; then
        echo "== benchmarks/kernels.py"
        "$PYTHON" benchmarks/kernels.py
        bench=$?
    fi
    echo "== tests exited $tests, benchmark exited $bench"
    [ "$tests" -ne 0 ] && return "$tests"
    return "$bench"
}

run "$@" 2>&1 | tee "$log"
exit "${PIPESTATUS[0]}"
