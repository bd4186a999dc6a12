#!/usr/bin/env bash
# LLaMA2-Accessory's Q-Former model, stage 2: norms, biases and LoRA of the LLM are trained, and the connector's biases. Its recipe for 8 GPUs.
#
#   DATA_PATH=alpaca_llava.yaml MODEL=checkpoints/accessory-caption OUTPUT=checkpoints/accessory-peft bash scripts/v1_5/accessory_finetune_peft.sh [flags]
#
# Variables as in accessory_finetune.sh. Keep devices x batch x accumulation at 128.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OUTPUT=${OUTPUT:-./checkpoints/accessory-13b-peft} ZERO=${ZERO:-2} exec bash "$here/accessory_finetune.sh" \
    --tuning bias_norm --bias_linears all --bias_connector True --lora_enable True --lora_r 16 --lora_alpha 16 --lora_dropout 0 \
    --per_device_train_batch_size 16 \
    --learning_rate 5e-5 --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
    "$@"
