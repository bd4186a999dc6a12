#!/usr/bin/env bash
# ImageBind-LLM, first phase: prompts, gates and the bind network are trained on captions of images. Its recipe for 8 GPUs.
#
#   VISION_TOWER=imagebind_huge.pth DATA_PATH=captions.yaml OUTPUT=checkpoints/imagebind-pretrain bash scripts/v1_5/imagebind_pretrain.sh [flags]
#
# Variables as in adapter_pretrain.sh; VISION_TOWER is the released file of ImageBind, or a directory of it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# One prompt in each of all layers, from one vector of an image.
VISION_TOWER=${VISION_TOWER:-./checkpoints/imagebind_huge.pth} OUTPUT=${OUTPUT:-./checkpoints/imagebind-7b-pretrain} \
    exec bash "$here/adapter_pretrain.sh" \
    --mm_vision_select_feature pooled --mm_vision_projection False \
    --mm_projector_type gated_mlp3x \
    --adaption_prompt_len 1 --adaption_prompt_layers 32 \
    "$@"
