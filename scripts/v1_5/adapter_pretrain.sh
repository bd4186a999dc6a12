#!/usr/bin/env bash
# LLaMA-Adapter V2, first phase: prompts, gates and the connector are trained on captions. Its recipe for 8 GPUs.
#
#   DATA_PATH=captions.yaml MODEL=huggyllama/llama-7b OUTPUT=checkpoints/adapter-pretrain bash scripts/v1_5/adapter_pretrain.sh [flags]
#
# Variables: MODEL, VISION_TOWER, OUTPUT below; DATA_PATH (caption files, or a YAML of them), IMAGE_FOLDER in ../lib/data.sh;
# LAUNCHER, NUM_GPUS, HOSTFILE, ZERO in ../lib/launch.sh. Flags come last and win. Keep devices x batch x accumulation at 32.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../lib/launch.sh"
source "$here/../lib/data.sh"
choose_named_data captions.yaml

# 3 epochs: the original counts 150 of 1/50 of the data. 31 layers: all but the first of a 7B model.
launch_train \
    --deepspeed "$(zero_config 2)" \
    --model_name_or_path "${MODEL:-huggyllama/llama-7b}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14}" \
    --mm_vision_select_layer -1 --mm_vision_select_feature cls_patch --mm_vision_projection True \
    --mm_projector_type query_vit --mm_query_len 10 \
    --mm_injection adaption_prompt --adaption_prompt_len 10 --adaption_prompt_layers 31 --mm_text_only blank \
    --tuning prompts \
    --version alpaca \
    --data_path "${DATA_PATHS[@]}" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio random_crop \
    --model_max_length 96 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --learning_rate 1.25e-5 --warmup_steps 0.0333 --weight_decay 0.05 --adam_beta2 0.95 \
    --max_grad_norm 0 \
    --gradient_checkpointing auto \
    --dataloader_num_workers 4 \
    --save_steps 5000 --save_total_limit 1 \
    --output_dir "${OUTPUT:-./checkpoints/adapter-7b-pretrain}" \
    "$@"
