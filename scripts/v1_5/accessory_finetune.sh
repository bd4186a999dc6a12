#!/usr/bin/env bash
# LLaMA2-Accessory's Q-Former model, stage 2: LLM and connector are trained on instructions. Its recipe for 8 GPUs.
#
#   DATA_PATH=alpaca_llava.yaml MODEL=checkpoints/accessory-caption OUTPUT=checkpoints/accessory bash scripts/v1_5/accessory_finetune.sh [flags]
#
# Variables as in adapter_pretrain.sh; MODEL is the output of accessory_caption.sh. Keep devices x batch x accumulation at 32.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_named_data alpaca_llava.yaml

# The rate falls to 5e-6. As a fraction: ZeRO's optimizer does not know the first rate that min_lr would be divided by.
launch_train \
    --deepspeed "$(zero_config 3)" \
    --model_name_or_path "${MODEL:-./checkpoints/accessory-13b-caption}" \
    --tuning full \
    --version alpaca \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio random_crop \
    --model_max_length 512 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --learning_rate 3e-5 --warmup_steps 0.0667 --weight_decay 0.02 --adam_beta2 0.95 \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.16667}' \
    --max_grad_norm 2 \
    --gradient_checkpointing auto \
    --group_by_modality_length True \
    --dataloader_num_workers 4 \
    --save_steps 5000 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/accessory-13b}" \
    "$@"
