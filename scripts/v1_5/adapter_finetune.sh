#!/usr/bin/env bash
# LLaMA-Adapter V2, second phase: norms and biases of the LLM are trained on instructions. Its recipe for 8 GPUs.
#
#   DATA_PATH=instructions.yaml MODEL=checkpoints/adapter-pretrain OUTPUT=checkpoints/adapter bash scripts/v1_5/adapter_finetune.sh [flags]
#
# Variables as in adapter_pretrain.sh; MODEL is the output of that phase. V2.1 trained LoRA too:
# --lora_enable True --lora_r 16 --lora_alpha 16 --lora_dropout 0. Keep devices x batch x accumulation at 32.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_named_data instructions.yaml

launch_train \
    --deepspeed "$(zero_config 2)" \
    --model_name_or_path "${MODEL:-./checkpoints/adapter-7b-pretrain}" \
    --tuning bias_norm \
    --version alpaca \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio random_crop \
    --model_max_length 512 \
    --num_train_epochs 4 \
    --per_device_train_batch_size 4 \
    --learning_rate 1.25e-4 --warmup_steps 0.25 --weight_decay 0.02 --adam_beta2 0.95 \
    --max_grad_norm 0 \
    --gradient_checkpointing auto \
    --dataloader_num_workers 4 \
    --save_steps 5000 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/adapter-7b}" \
    "$@"
