# shellcheck shell=bash
# Set DATA_PATHS (annotation files) and IMAGE_FOLDER of a stage from DATA_ROOT. Sourced by the recipes.
#   LLaVA-1.5:  LLaVA-Pretrain/images, LLaVA-Finetune/data/{coco,gqa,ocr_vqa,textvqa,vg}; or LLaVA's own playground/data
#   MoE-LLaVA:  llava_image, llava_image_tune, lvis_tune, lrv_tune, svit_tune, mimicit_tune/LA, and train_json beside them
# DATA_PATH (files, separated by spaces), IMAGE_FOLDER and JSON_DIRECTORY override the defaults.

DATA_ROOT=${DATA_ROOT:-./playground/data}

# The first of the paths that exists, else the last, so that the error to come names it.
first_existing() { # paths
    local path
    for path in "$@"; do
        [ ! -e "$path" ] || break
    done
    echo "$path"
}

moe_llava_data() { # stage
    local names=() candidates=("$DATA_ROOT/ft_json" "$DATA_ROOT/train_json")
    case $1 in
        pretrain) names=(llava_image_.json) candidates=("$DATA_ROOT/pt_json" "${candidates[@]}") ;;
        finetune) names=(la_tune_256k.json lrv_tune_331k.json lvis_tune_220k_.json svit_tune_157k.json nlp_tune.json) ;;
        moe) names=(llava_image_tune_.json nlp_tune.json) ;;
    esac
    local json_directory=${JSON_DIRECTORY:-$(first_existing "${candidates[@]}")}
    DATA_PATHS=("${names[@]/#/$json_directory/}")
    DIRECTORY=$DATA_ROOT
}

llava_data() { # stage
    if [ "$1" = pretrain ]; then
        DATA_PATHS=("$DATA_ROOT/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json")
        DIRECTORY=$DATA_ROOT/LLaVA-Pretrain/images
    elif [ -e "$DATA_ROOT/llava_v1_5_mix665k.json" ]; then
        DATA_PATHS=("$DATA_ROOT/llava_v1_5_mix665k.json")
        DIRECTORY=$DATA_ROOT
    else
        DATA_PATHS=("$DATA_ROOT/LLaVA-Finetune/llava_v1_5_mix665k.json")
        DIRECTORY=$DATA_ROOT/LLaVA-Finetune/data
    fi
}

choose_data() { # stage: pretrain | finetune | moe
    if [ -d "$DATA_ROOT/llava_image" ] || [ -d "$DATA_ROOT/llava_image_tune" ]; then
        moe_llava_data "$1"
    else
        llava_data "$1"
    fi
    # shellcheck disable=SC2034  # The recipes read both.
    [ -z "${DATA_PATH:-}" ] || read -ra DATA_PATHS <<<"$DATA_PATH"
    # shellcheck disable=SC2034
    IMAGE_FOLDER=${IMAGE_FOLDER:-$DIRECTORY}
}

# For recipes of other systems, whose data has no fixed layout: DATA_PATH and IMAGE_FOLDER, by default files below DATA_ROOT
# whose image paths are absolute.
choose_named_data() { # file
    # shellcheck disable=SC2034
    read -ra DATA_PATHS <<<"${DATA_PATH:-$DATA_ROOT/$1}"
    # shellcheck disable=SC2034
    IMAGE_FOLDER=${IMAGE_FOLDER:-/}
}
