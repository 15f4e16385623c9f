#!/usr/bin/env bash
# Everything the log reports of one GPU, in the order of worth; about 25 minutes on an H100. Writes into $OUT (default: runs/gpu).
# Each part may be cut short: studies resume with the same command, and their reports say how far they came.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

study() { # seconds, then what follows `shoal run`
    timeout -s INT "$1" "$PYTHON" -W ignore -m shoal run "${@:2}" || echo "cut short: shoal run ${*:2}"
}

study 300 arithmetic --preset full --out "$OUT/arithmetic"
"$PYTHON" -W ignore benchmarks/throughput.py --device cuda --runs 1 8 64 256 1024 --precision float32 --forms compiled --plain eager compiled \
    --evaluated 64 --seconds 0.6 --json "$OUT/float32.json"
timeout 200 "$PYTHON" -m pytest -q -m gpu tests/gpu
study 480 grokking --preset fig1 --out "$OUT/grokking-fig1"
study 240 grokking --preset paper --seeds 64 --out "$OUT/grokking-paper"
"$PYTHON" -W ignore benchmarks/throughput.py --device cuda --runs 1 8 64 256 1024 --precision bfloat16 --forms compiled eager --plain eager compiled \
    --evaluated 64 --seconds 0.6 --json "$OUT/bfloat16.json"
for directory in "$OUT"/*/; do "$PYTHON" -m shoal report "$directory"; done
