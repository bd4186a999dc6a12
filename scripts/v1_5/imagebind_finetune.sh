#!/usr/bin/env bash
# ImageBind-LLM, second phase: norms, biases and LoRA of the LLM are trained on instructions. Its recipe for 8 GPUs.
#
#   DATA_PATH=instructions.yaml MODEL=checkpoints/imagebind-pretrain OUTPUT=checkpoints/imagebind bash scripts/v1_5/imagebind_finetune.sh [flags]
#
# Variables as in adapter_finetune.sh; MODEL is the output of imagebind_pretrain.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-./checkpoints/imagebind-7b-pretrain} OUTPUT=${OUTPUT:-./checkpoints/imagebind-7b} \
    exec bash "$here/adapter_finetune.sh" \
    --lora_enable True --lora_r 16 --lora_alpha 16 --lora_dropout 0 \
    "$@"
