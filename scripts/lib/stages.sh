# shellcheck shell=bash
# Train a small world stage by stage on this machine and note the seconds. Sourced, after env.sh, by quickstart.sh and
# playground/easy_vqa/run.sh. They set GLOBAL_BATCH, OUT, RANKS and ZERO.

# The comment at the head of the script that sources this.
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; }

default_ranks() {
    if has_gpu; then
        echo 1
    else
        echo $(($(nproc) < 2 ? 1 : 2))
    fi
}

# Empty the directory of an earlier run, so that no stage resumes from it; touch nothing that is not ours.
clear_out() { # file that marks it as ours, names of what is in it
    local mark=$1
    shift
    if [ -d "$OUT" ] && [ -n "$(ls -A "$OUT")" ] && [ ! -f "$OUT/$mark" ]; then
        fail "$OUT has files that this script did not make. Name another directory: --out DIR."
    fi
    mkdir -p "$OUT"
    OUT=$(cd "$OUT" && pwd)
    touch "$OUT/$mark"
    rm -rf "${@/#/$OUT/}" "$OUT/seconds.tsv"
}

# Settle RANKS and THREADS, build what ranks on a CPU need, and empty OUT.
prepare_stages() { # as clear_out
    RANKS=${RANKS:-$(default_ranks)}
    [ $((GLOBAL_BATCH % RANKS)) -eq 0 ] || fail "--ranks $RANKS does not divide the batch of $GLOBAL_BATCH; use a number that does, such as 1 or 2."
    if ! has_gpu; then
        export DS_ACCELERATOR=cpu
        build_ops
    fi
    clear_out "$@"
    THREADS=$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))
    export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    # glibc gives freed blocks back to the kernel at once; kept, a step on the CPU is a good part faster.
    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
    say "" "Training with $RANKS process(es) of $THREADS thread(s); everything goes to $OUT"
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
