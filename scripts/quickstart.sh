#!/usr/bin/env bash
# All stages on one machine, a CPU will do: environment, a tiny world of handwritten digits, the stages, a report.
#
#   bash scripts/quickstart.sh [--system NAME] [--out DIR] [--ranks N] [--zero 2|3]
#
#   --system NAME  llava (default): LLaVA and MoE-LLaVA, three stages; adapter, imagebind or accessory: both phases of LLaMA-Adapter V2,
#                  ImageBind-LLM or LLaMA2-Accessory
#   --out DIR      where everything goes (default ./quickstart): data, stage1, stage2, stage3, eval, report.json,
#                  report.png
#   --ranks N      processes that train together (default: 2 on a CPU of two cores or more, else 1)
#   --zero N       ZeRO stage of all stages (default: each recipe's own)
#
# Environment: LLAVA_LITE_VENV (directory, default ./.venv), PYTHON (interpreter to make it with), TORCH_INDEX_URL (an index with
# another build of torch: https://download.pytorch.org/whl/cpu is smaller where there is no GPU).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/lib/stages.sh"

# shellcheck disable=SC2034  # stages.sh reads it.
GLOBAL_BATCH=48
SYSTEM=llava OUT=quickstart RANKS="" ZERO=${ZERO:-}

while [ $# -gt 0 ]; do
    case $1 in
        --system | --out | --ranks | --zero) [ $# -ge 2 ] || fail "$1 needs a value; see --help." ;;&
        --system) SYSTEM=$2 && shift 2 ;;
        --out) OUT=$2 && shift 2 ;;
        --ranks) RANKS=$2 && shift 2 ;;
        --zero) ZERO=$2 && shift 2 ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$1'; known: --system NAME, --out DIR, --ranks N, --zero 2|3, --help." ;;
    esac
done
case $SYSTEM in
    llava | adapter | imagebind | accessory) ;;
    *) fail "--system $SYSTEM: llava, adapter, imagebind or accessory." ;;
esac
[[ $ZERO =~ ^(|2|3)$ ]] || fail "--zero $ZERO: 2 or 3."
[[ $RANKS =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $RANKS: a number of processes."

ask() { # stage directory
    python -m playground.tiny.ask --model "$OUT/$1" --questions "$OUT/data/held_out" --out "$OUT/$1/answers.json" --system "$SYSTEM"
}

# Three benchmarks of the held-out digits, in the files of POPE, MME and TextVQA.
score() { # stage directory
    local benchmark
    for benchmark in pope mme textvqa; do
        llava-lite eval "$benchmark" --model "$OUT/$1" --data "$OUT/data/eval" --out "$OUT/eval/$benchmark" --batch-size 80 --max-new-tokens 16
    done
}

# LLaVA and MoE-LLaVA: projector, projector and LLM, experts.
train_llava() {
    part world python -m playground.tiny.make_world --out "$OUT/data"
    export DATA_ROOT=$OUT/data VISION_TOWER=$TINY/tower

    MODEL=$TINY/llm OUTPUT=$OUT/stage1 part stage1 stage pretrain --learning_rate 3e-3
    part "ask stage1" ask stage1
    MODEL=$TINY/llm PROJECTOR=$OUT/stage1/mm_projector.bin OUTPUT=$OUT/stage2 part stage2 stage finetune --learning_rate 1.5e-3
    part "ask stage2" ask stage2
    DATA_ROOT=$OUT/data/MoE-LLaVA MODEL=$OUT/stage2 OUTPUT=$OUT/stage3 part stage3 stage moe-finetune --learning_rate 7e-4
    part "ask stage3" ask stage3
    part "score stage3" score stage3
}

# Captions, and records of one question each, in the files of the other systems.
make_other_world() { # flags of make_world
    part world python -m playground.tiny.make_world --system "$SYSTEM" --out "$OUT/data" "$@"
    part "single turns" llava-lite single-turn "$OUT/data/conversations.json" "$OUT/data/single_turn.json"
    export DATA_ROOT=$OUT/data IMAGE_FOLDER=$OUT/data
}

# Both phases, each a recipe and its flags for the small world. All of an image is seen, the same in every epoch.
two_stages() { # recipe, recipe; flags in STAGE1 and STAGE2
    MODEL=$TINY/alpaca_llm OUTPUT=$OUT/stage1 DATA_PATH=$OUT/data/captions.yaml part stage1 stage "$1" --image_aspect_ratio square "${STAGE1[@]}"
    part "ask stage1" ask stage1
    MODEL=$OUT/stage1 OUTPUT=$OUT/stage2 DATA_PATH=$OUT/data/instructions.yaml part stage2 stage "$2" --image_aspect_ratio square "${STAGE2[@]}"
    part "ask stage2" ask stage2
}

# LLaMA2-Accessory: connector and LLM, twice; the encoder is the tower of LLaVA's stages.
train_accessory() {
    make_other_world --scale 0.5
    export VISION_TOWER=$TINY/tower
    STAGE1=(--learning_rate 2e-3 --num_train_epochs 1)
    STAGE2=(--learning_rate 1.5e-3 --num_train_epochs 1)
    two_stages accessory_caption accessory_finetune
}

# LLaMA-Adapter V2: prompts, gates and connector; then norms, biases and LoRA.
train_adapter() {
    make_other_world --scale 0.5
    export VISION_TOWER=$TINY/tower
    STAGE1=(--mm_vision_projection False --mm_vision_select_layer -2 --mm_query_hidden 128 --mm_query_depth 2 --mm_query_heads 4 --mm_query_len 16
        --adaption_prompt_len 16 --adaption_prompt_layers 4 --learning_rate 2e-2 --mm_projector_lr 3e-3 --num_train_epochs 2 --weight_decay 0.01
        --max_grad_norm 1)
    STAGE2=(--lora_enable True --lora_r 64 --lora_alpha 64 --lora_dropout 0 --learning_rate 3e-3 --num_train_epochs 1 --warmup_steps 0.05
        --weight_decay 0.01 --max_grad_norm 1)
    two_stages adapter_pretrain adapter_finetune
}

# ImageBind-LLM: the same with one vector of an image. Its tiny encoder reads sounds too, which no phase trains on.
train_imagebind() {
    make_other_world --scale 0.3
    export VISION_TOWER=$TINY/imagebind
    STAGE1=(--adaption_prompt_layers 4 --learning_rate 3e-3 --num_train_epochs 1 --max_grad_norm 1)
    STAGE2=(--learning_rate 3e-3 --num_train_epochs 1 --warmup_steps 0.05 --max_grad_norm 1)
    two_stages imagebind_pretrain imagebind_finetune
}

ensure_environment "$ROOT/constraints.txt"
prepare_stages .quickstart data stage1 stage2 stage3 eval report.json report.png
TINY=$ROOT/playground/tiny

"train_$SYSTEM"

say ""
python -m playground.tiny.report --out "$OUT" --ranks "$RANKS" --system "$SYSTEM"
