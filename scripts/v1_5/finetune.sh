#!/usr/bin/env bash
# Stage 2 (Hybrid-FT): projector and LLM are trained; the tower is frozen. LLaVA-1.5's recipe for 8 GPUs.
#
#   DATA_ROOT=/data PROJECTOR=checkpoints/pretrain/mm_projector.bin OUTPUT=checkpoints/llava bash scripts/v1_5/finetune.sh [flags]
#
# Variables: MODEL, VISION_TOWER, PROJECTOR (of stage 1, or none where MODEL has its own), VERSION (template), OUTPUT below; the others as in pretrain.sh.
# Flags come last and win. Keep devices x batch x accumulation at 128.
#
# The records of a micro-batch are packed into one sequence (--packing samples): a step is the published 128 records,
# with the same loss; --packing none pads them. By tokens instead, which fills devices evenly and lets the number of
# records of a step vary: --packing tokens --packing_tokens 12600 --per_device_train_batch_size 1, where a device has
# about 16 records of mix665k (786 tokens each in the mean).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_data finetune
projector=(--pretrain_mm_mlp_adapter "${PROJECTOR:-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}")
[ "${PROJECTOR:-}" != none ] || projector=()

launch_train \
    --deepspeed "$(zero_config 3)" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    "${projector[@]}" \
    --version "${VERSION:-v1}" \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --per_device_train_batch_size 16 \
    --learning_rate 2e-5 \
    --max_grad_norm 0 \
    --gradient_checkpointing auto \
    --dataloader_num_workers 4 \
    --save_steps 1000 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-7b}" \
    "$@"
