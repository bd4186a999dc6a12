#!/usr/bin/env bash
# Stage 2 with LoRA: projector and adapters on the LLM are trained; tower and LLM are frozen. LLaVA-1.5's recipe for 8 GPUs.
#
#   DATA_ROOT=/data PROJECTOR=checkpoints/pretrain/mm_projector.bin OUTPUT=checkpoints/llava-lora bash scripts/v1_5/finetune_lora.sh [flags]
#
# Variables as in finetune.sh, whose flags these are but for LoRA and its rate. A 4-bit base: ZERO=2 and --bits 4.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OUTPUT=${OUTPUT:-./checkpoints/llava-v1.5-7b-lora} exec bash "$here/finetune.sh" \
    --lora_enable True --lora_r 128 --lora_alpha 256 \
    --learning_rate 2e-4 \
    --mm_projector_lr 2e-5 \
    "$@"
