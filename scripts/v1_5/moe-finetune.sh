#!/usr/bin/env bash
# Stage 3 (LLaVA-FT MoE): every other MLP becomes four experts; experts, router, MLPs and projector are trained. MoE-LLaVA's recipe for 8 GPUs.
#
#   DATA_ROOT=/data MODEL=checkpoints/llava OUTPUT=checkpoints/llava-moe bash scripts/v1_5/moe-finetune.sh [flags]
#
# Variables: MODEL (the dense output of stage 2, which knows its tower and projector), TRAIN_MODULES ("fc1 fc2 wg" for Phi),
# VERSION, OUTPUT below; the others as in pretrain.sh. Flags come last and win. Keep devices x batch x accumulation at 128.
# With --ep_size 2 two ranks divide the experts of a layer; ZeRO-2 or 3, same losses, same directory.
# Tokens over capacity are dropped, as MoE-LLaVA did, with --moe_drop_tokens True; else the capacity factor has no effect.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_data moe
read -ra train_modules <<<"${TRAIN_MODULES:-gate_proj up_proj down_proj wg}"

launch_train \
    --deepspeed "$(zero_config 2)" \
    --model_name_or_path "${MODEL:-./checkpoints/llava-v1.5-7b}" \
    --moe_enable True --moe_mode sparse --num_experts 4 --top_k_experts 2 --capacity_factor 1.5 \
    --train_modules "${train_modules[@]}" \
    --version "${VERSION:-v1}" \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --learning_rate 2e-5 \
    --max_grad_norm 0 \
    --gradient_checkpointing auto \
    --dataloader_num_workers 4 \
    --save_steps 1000 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-7b-moe}" \
    "$@"
