#!/usr/bin/env bash
# LLaMA2-Accessory's Q-Former model, stage 2 on a 4-bit LLM: norms, biases and LoRA are trained. Its recipe for 8 GPUs.
#
#   DATA_PATH=alpaca_llava.yaml MODEL=checkpoints/accessory-caption OUTPUT=checkpoints/accessory-qlora bash scripts/v1_5/accessory_finetune_qlora.sh [flags]
#
# Variables as in accessory_finetune_peft.sh, whose flags these are but for the bits of the frozen weights.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OUTPUT=${OUTPUT:-./checkpoints/accessory-13b-qlora} exec bash "$here/accessory_finetune_peft.sh" --bits 4 "$@"
