#!/usr/bin/env bash
# Training with VisionZip from scratch (paper, Table 11), second stage: projector and language model learn from instructions;
# the tower stays as it is. Settings as in LLaVA's finetune.sh.
#
#   bash scripts/pretrain.sh && bash scripts/finetune.sh
#
# Variables as in scripts/finetune_visionzip.sh, with VISION_TOWER and PROJECTOR, the first stage's mm_projector.safetensors or
# .bin. DATA_FRACTION is 1. OUTPUT gets a whole checkpoint. With MODEL_PATH a LLaVA and VISION_TOWER= PROJECTOR= (both empty)
# that one is trained on.
#
# Memory: 7.06e9 parameters x 16 bytes (bf16 weights and gradients, float32 copy, two moments) = 105 GiB, which ZeRO-3 shares
# out: 13.2 GiB on each of 8 GPUs, and 2.5 GiB for layers that are gathered. Fewer GPUs: ZERO=zero3_offload.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL_PATH="${MODEL_PATH:-lmsys/vicuna-7b-v1.5}"
VISION_TOWER="${VISION_TOWER-openai/clip-vit-large-patch14-336}"
PROJECTOR="${PROJECTOR-checkpoints/llava-v1.5-7b-pretrain-visionzip-$TOKENS/mm_projector.safetensors}"
OUTPUT="${OUTPUT:-checkpoints/llava-v1.5-7b-train-visionzip-$TOKENS}"
DATA_PATH="${DATA_PATH:-playground/data/llava_v1_5_mix665k.json}"
ZERO="${ZERO:-zero3}"

prepare_training 128 "${BASE_GIB:-18}" "${SAMPLE_GIB:-1.8}" "$@"
train ${VISION_TOWER:+--vision_tower "$VISION_TOWER"} \
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"} \
    --version "${VERSION:-v1}" \
    --image_folder "${IMAGE_FOLDER:-playground/data}" \
    --image_aspect_ratio pad \
    --data_fraction "${DATA_FRACTION:-1}" \
    --group_by_modality_length True \
    --model_max_length 2048 \
    --learning_rate "${LEARNING_RATE:-2e-5}" \
    --save_steps 1000 \
    "$@"
