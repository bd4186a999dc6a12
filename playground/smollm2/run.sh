#!/usr/bin/env bash
# A language model that people use learns to see on one machine, an hour of a CPU will do: SmolLM2-135M-Instruct with its
# own chat template, LLaVA's stages 1 and 2 on easy-VQA, whose test questions are scored.
#
#   bash playground/smollm2/run.sh [--out DIR] [--ranks N] [--data DIR] [--gguf DIR] [--steps N] [--questions N]
#
#   --out DIR        where everything goes (default ./smollm2): data, tower, llm, stage1, stage2, eval, seconds.tsv
#   --ranks N        processes that train together (default: 2 on a CPU of two cores or more, else 1)
#   --data DIR       directory of easy-VQA's train/ and test/ (default: that of the package easy-vqa, which is installed for it)
#   --gguf DIR       directory that keeps the file of the language model, 98 MB, fetched if it is not there (default: gguf beside llm)
#   --steps N        optimizer steps of the tower and of each stage, to try the path (default: 900, 300 and 260)
#   --questions N    test questions to score (default 1000, all: 9673)
#
# Environment: as of scripts/quickstart.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/env.sh"
source "$ROOT/scripts/lib/stages.sh"

PACKAGE=easy-vqa==1.0
GLOBAL_BATCH=8
OUT=smollm2 RANKS="" DATA="" GGUF="" STEPS="" QUESTIONS=1000 ZERO=${ZERO:-2}

while [ $# -gt 0 ]; do
    case $1 in
        --out | --ranks | --data | --gguf | --steps | --questions) [ $# -ge 2 ] || fail "$1 needs a value; see --help." ;;&
        --out) OUT=$2 && shift 2 ;;
        --ranks) RANKS=$2 && shift 2 ;;
        --data) DATA=$2 && shift 2 ;;
        --gguf) GGUF=$2 && shift 2 ;;
        --steps) STEPS=$2 && shift 2 ;;
        --questions) QUESTIONS=$2 && shift 2 ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$1'; known: --out DIR, --ranks N, --data DIR, --gguf DIR, --steps N, --questions N, --help." ;;
    esac
done
[[ $RANKS =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $RANKS: a number of processes."
[[ $STEPS =~ ^([1-9][0-9]*)?$ ]] || fail "--steps $STEPS: a number of optimizer steps."
[[ $QUESTIONS =~ ^[1-9][0-9]*$ ]] || fail "--questions $QUESTIONS: a number of questions."

train() { # stage, recipe, records, steps, flags...
    DATA_PATH=$OUT/data/$3.json IMAGE_FOLDER=$OUT/data/images VISION_TOWER=$OUT/tower OUTPUT=$OUT/$1 part "$1" stage "$2" \
        --max_grad_norm 1 \
        --group_by_modality_length False \
        --max_steps "${STEPS:-$4}" \
        "${@:5}"
}

ensure_environment "$ROOT/constraints.txt"
if [ -z "$DATA" ]; then
    python -c 'import easy_vqa' 2>/dev/null || quietly "Installing $PACKAGE" "$VENV/easy_vqa.log" python -m pip install --no-deps "$PACKAGE"
    DATA=$(python -c 'import easy_vqa; print(easy_vqa.__path__[0] + "/data")')
fi
[ -f "$DATA/train/questions.json" ] || fail "--data $DATA: no train/questions.json there; see --help."
DATA=$(cd "$DATA" && pwd)
[ -z "$GGUF" ] || GGUF=$(mkdir -p "$GGUF" && cd "$GGUF" && pwd)
prepare_stages .smollm2 data tower llm stage1 stage2 eval
cd "$ROOT"

part data python -m playground.easy_vqa.make_data --out "$OUT/data" --data "$DATA"
part tower python -m playground.easy_vqa.tower --data "$OUT/data" --out "$OUT/tower" ${STEPS:+--steps "$STEPS"}
part llm python -m playground.smollm2.llm --out "$OUT/llm" ${GGUF:+--cache "$GGUF"}
MODEL=$OUT/llm GLOBAL_BATCH=16 train stage1 pretrain captions 300 --learning_rate 5e-4
MODEL=$OUT/llm PROJECTOR=$OUT/stage1/mm_projector.bin VERSION=chat train stage2 finetune_lora conversations 260 \
    --lora_r 32 --lora_alpha 64 --learning_rate 1e-3 --mm_projector_lr 1e-3
part eval llava-lite eval easy_vqa --model "$OUT/stage2" --data "$DATA" --out "$OUT/eval" --batch-size 32 --limit "$QUESTIONS"

say "" "Seconds of each part:"
cat "$OUT/seconds.tsv"
