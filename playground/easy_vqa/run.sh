#!/usr/bin/env bash
# easy-VQA on one machine, a CPU will do: its training questions become LLaVA's records, the tiny world's tower
# and language model train on them, its test questions are scored.
#
#   bash playground/easy_vqa/run.sh [--out DIR] [--ranks N] [--data DIR] [--steps N]
#
#   --out DIR     where everything goes (default ./easy_vqa): data, tower, llm, stage1, stage1b, stage2, eval, seconds.tsv
#   --ranks N     processes that train together (default: 2 on a CPU of two cores or more, else 1)
#   --data DIR    directory of easy-VQA's train/ and test/ (default: that of the package easy-vqa, which is installed for it)
#   --steps N     optimizer steps of the tower and of each stage, to try the path (default: 900 of the tower, one pass over the records of a stage)
#
# Environment: as of scripts/quickstart.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/env.sh"
source "$ROOT/scripts/lib/stages.sh"

PACKAGE=easy-vqa==1.0
# shellcheck disable=SC2034  # stages.sh reads it.
GLOBAL_BATCH=16
OUT=easy_vqa RANKS="" DATA="" STEPS="" ZERO=${ZERO:-2}

while [ $# -gt 0 ]; do
    case $1 in
        --out | --ranks | --data | --steps) [ $# -ge 2 ] || fail "$1 needs a value; see --help." ;;&
        --out) OUT=$2 && shift 2 ;;
        --ranks) RANKS=$2 && shift 2 ;;
        --data) DATA=$2 && shift 2 ;;
        --steps) STEPS=$2 && shift 2 ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$1'; known: --out DIR, --ranks N, --data DIR, --steps N, --help." ;;
    esac
done
[[ $RANKS =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $RANKS: a number of processes."
[[ $STEPS =~ ^([1-9][0-9]*)?$ ]] || fail "--steps $STEPS: a number of optimizer steps."

# Print the data directory of the package, installed first if it is not there.
packaged_data() {
    python -c 'import easy_vqa' 2>/dev/null ||
        quietly "Installing $PACKAGE" "$VENV/easy_vqa.log" python -m pip install --no-deps "$PACKAGE"
    python -c 'import easy_vqa; print(easy_vqa.__path__[0] + "/data")'
}

# Every stage trains the language model, whose words of shapes mean nothing yet. Both parts of stage 1 keep the rate: what
# the next part builds on was still growing, and a rate that has fallen and jumps up again took some of it away.
train() { # stage, recipe, files of records, flags...
    local files
    read -ra files <<<"$3"
    files=("${files[@]/#/$OUT/data/}")
    IMAGE_FOLDER=$OUT/data/images VISION_TOWER=$OUT/tower OUTPUT=$OUT/$1 part "$1" stage "$2" \
        --data_path "${files[@]/%/.json}" \
        --learning_rate 2e-3 \
        --adam_beta2 0.98 \
        --warmup_steps 30 \
        --max_grad_norm 1 \
        --mm_vision_select_layer -1 \
        --mm_vision_select_feature pooled \
        --group_by_modality_length False \
        ${STEPS:+--max_steps "$STEPS"} \
        "${@:4}"
}

pretrain() { # stage, files of records
    GLOBAL_BATCH=32 train "$1" pretrain "$2" --tune_mm_mlp_adapter False --lr_scheduler_type constant_with_warmup
}

ensure_environment "$ROOT/constraints.txt"
[ -n "$DATA" ] || DATA=$(packaged_data)
[ -f "$DATA/train/questions.json" ] || fail "--data $DATA: no train/questions.json there; see --help."
DATA=$(cd "$DATA" && pwd)
prepare_stages .easy_vqa data tower llm stage1 stage1b stage2 eval
cd "$ROOT"

part data python -m playground.easy_vqa.make_data --out "$OUT/data" --data "$DATA"
# A second thread gives a batch of this size 1.2 times the speed on quiet cores, and a tenth of it on shared ones.
OMP_NUM_THREADS=1 part tower python -m playground.easy_vqa.tower --data "$OUT/data" --out "$OUT/tower" ${STEPS:+--steps "$STEPS"}
part llm python -m playground.easy_vqa.llm --data "$OUT/data" --out "$OUT/llm"
MODEL=$OUT/llm pretrain stage1 "captions names"
MODEL=$OUT/stage1 pretrain stage1b "names questions"
MODEL=$OUT/stage1b PROJECTOR=none train stage2 finetune conversations
part eval llava-lite eval easy_vqa --model "$OUT/stage2" --data "$DATA" --out "$OUT/eval" --batch-size 100

say "" "Seconds of each part:"
cat "$OUT/seconds.tsv"
