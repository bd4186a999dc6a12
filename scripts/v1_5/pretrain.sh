#!/usr/bin/env bash
# Stage 1 (LLaVA-PT): the projector is trained on captions; tower and LLM are frozen. LLaVA-1.5's recipe for 8 GPUs.
#
#   DATA_ROOT=/data MODEL=lmsys/vicuna-7b-v1.5 OUTPUT=checkpoints/pretrain bash scripts/v1_5/pretrain.sh [flags]
#
# Variables: MODEL, VISION_TOWER, OUTPUT below; DATA_ROOT, DATA_PATH, IMAGE_FOLDER in ../lib/data.sh; LAUNCHER, NUM_GPUS,
# HOSTFILE, ZERO in ../lib/launch.sh. Flags come last and win. Keep devices x batch x accumulation at 256.
# The records of a micro-batch are packed into one sequence: a step is the published 256 records, with the same loss.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_data pretrain

# max_grad_norm 0: the published run was not clipped. save_steps: the original saved at its end only; a checkpoint is small.
launch_train \
    --deepspeed "$(zero_config 2)" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --version plain \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --per_device_train_batch_size 32 \
    --learning_rate 1e-3 \
    --max_grad_norm 0 \
    --gradient_checkpointing auto \
    --dataloader_num_workers 4 \
    --save_steps 500 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-7b-pretrain}" \
    "$@"
