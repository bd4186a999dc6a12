#!/usr/bin/env bash
# The whole story on one machine, a CPU will do: environment, a tiny world of handwritten digits, the three stages, a report.
#
#   bash scripts/quickstart.sh [--out DIR] [--ranks N] [--zero 2|3]
#
#   --out DIR    where everything goes (default ./quickstart): data, stage1, stage2, stage3, report.json, report.png
#   --ranks N    processes that train together (default: 2 on a CPU of two cores or more, else 1)
#   --zero N     ZeRO stage of all three stages (default: each recipe's own)
#
# Environment: LLAVA_LITE_VENV (folder, default ./.venv), PYTHON (interpreter to make it with), TORCH_INDEX_URL (an index with
# another build of torch: https://download.pytorch.org/whl/cpu is smaller where there is no GPU).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

GLOBAL_BATCH=48
OUT=quickstart RANKS="" ZERO=${ZERO:-}

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case $1 in
        --out | --ranks | --zero) [ $# -ge 2 ] || fail "$1 needs a value; see --help." ;;&
        --out) OUT=$2 && shift 2 ;;
        --ranks) RANKS=$2 && shift 2 ;;
        --zero) ZERO=$2 && shift 2 ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$1'; known: --out DIR, --ranks N, --zero 2|3, --help." ;;
    esac
done
[[ $ZERO =~ ^(|2|3)$ ]] || fail "--zero $ZERO: 2 or 3."
[[ $RANKS =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $RANKS: a number of processes."

default_ranks() {
    if has_gpu; then
        echo 1
    else
        echo $(($(nproc) < 2 ? 1 : 2))
    fi
}

# Empty the folder of an earlier run, so that no stage goes on from it; touch nothing that is not ours.
clear_out() {
    if [ -d "$OUT" ] && [ -n "$(ls -A "$OUT")" ] && [ ! -f "$OUT/.quickstart" ]; then
        fail "$OUT has files that this script did not make. Name another folder: --out DIR."
    fi
    mkdir -p "$OUT"
    OUT=$(cd "$OUT" && pwd)
    touch "$OUT/.quickstart"
    rm -rf "$OUT"/{data,stage1,stage2,stage3,report.json,report.png,seconds.tsv}
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Run a part of the story and note its seconds for the report.
part() { # name, command...
    local name=$1 start
    shift
    say "" "== $name"
    start=$(date +%s.%N)
    "$@" || fail "$name failed (status $?); its messages are above. Run the same command again when the cause is gone."
    printf '%s\t%s\n' "$name" "$(awk -v start="$start" -v end="$(date +%s.%N)" 'BEGIN { printf "%.1f", end - start }')" >>"$OUT/seconds.tsv"
}

# A stage is the recipe itself, started through the DeepSpeed launcher; only what the small world asks for is overridden.
stage() { # recipe, flags...
    local recipe=$1
    shift
    LAUNCHER=deepspeed LAUNCHER_ARGS=--quiet NUM_GPUS=$RANKS ZERO=$ZERO MASTER_PORT=$(free_port) OMP_NUM_THREADS=$THREADS \
        bash "$ROOT/scripts/v1_5/$recipe.sh" \
        --per_device_train_batch_size $((GLOBAL_BATCH / RANKS)) \
        --gradient_accumulation_steps 1 \
        --gradient_checkpointing False \
        --dataloader_num_workers 0 \
        --model_max_length 512 \
        --bf16 False \
        --save_strategy no \
        "$@"
}

ask() { # stage folder
    python -m playground.tiny.ask --model "$OUT/$1" --questions "$OUT/data/held_out" --out "$OUT/$1/answers.json"
}

ensure_environment "$ROOT/constraints.txt"
RANKS=${RANKS:-$(default_ranks)}
[ $((GLOBAL_BATCH % RANKS)) -eq 0 ] || fail "--ranks $RANKS does not divide the batch of $GLOBAL_BATCH; use 1, 2, 3, 4, 6 or 8."
if ! has_gpu; then
    export DS_ACCELERATOR=cpu
    build_ops
fi
clear_out
THREADS=$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))
TINY=$ROOT/playground/tiny
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# glibc gives freed blocks back to the kernel at once; kept, a step on the CPU is a good part faster.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
say "" "Training with $RANKS process(es) of $THREADS thread(s); everything goes to $OUT"

part world python -m playground.tiny.make_world --out "$OUT/data"
export DATA_ROOT=$OUT/data VISION_TOWER=$TINY/tower

MODEL=$TINY/llm OUTPUT=$OUT/stage1 part stage1 stage pretrain --learning_rate 3e-3
part "ask stage1" ask stage1
MODEL=$TINY/llm PROJECTOR=$OUT/stage1/mm_projector.bin OUTPUT=$OUT/stage2 part stage2 stage finetune --learning_rate 1.5e-3
part "ask stage2" ask stage2
DATA_ROOT=$OUT/data/MoE-LLaVA MODEL=$OUT/stage2 OUTPUT=$OUT/stage3 part stage3 stage moe-finetune --learning_rate 7e-4
part "ask stage3" ask stage3

say ""
python -m playground.tiny.report --out "$OUT" --ranks "$RANKS"
