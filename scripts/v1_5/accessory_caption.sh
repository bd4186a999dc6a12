#!/usr/bin/env bash
# LLaMA2-Accessory's Q-Former model, stage 1: LLM and connector are trained on captions; the encoder is frozen.
#
#   DATA_PATH='coyo/{00000..00331}.tar' MODEL=meta-llama/Llama-2-13b-hf OUTPUT=checkpoints/accessory-caption bash scripts/v1_5/accessory_caption.sh [flags]
#
# Variables as in adapter_pretrain.sh. The original published no recipe of this stage: these are the numbers of its second.
# Shards need --max_steps. Keep devices x batch x accumulation at 32.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-meta-llama/Llama-2-13b-hf} OUTPUT=${OUTPUT:-./checkpoints/accessory-13b-caption} \
    DATA_PATH=${DATA_PATH:-${DATA_ROOT:-./playground/data}/captions.yaml} \
    exec bash "$here/accessory_finetune.sh" \
    --vision_tower "${VISION_TOWER:-Salesforce/blip2-opt-2.7b}" \
    --mm_projector_type linear_norm --mm_boundary_vectors True --mm_image_position front \
    --version caption \
    "$@"
