#!/usr/bin/env bash
# A LoRA adapter of the language model and the projector learn together, with VisionZip on: rank 128, alpha 256, learning rate
# 2e-4, and 2e-5 for the projector, as in LLaVA's finetune_lora.sh.
#
#   bash scripts/finetune_lora.sh                        on a LLaVA-1.5
#   bash scripts/finetune_lora.sh --bits 4               the same on a quantised language model (QLoRA)
#   MODEL_PATH=lmsys/vicuna-7b-v1.5 VISION_TOWER=openai/clip-vit-large-patch14-336 PROJECTOR=…/mm_projector.bin \
#       bash scripts/finetune_lora.sh --image_aspect_ratio pad              from the pretrained projector of scripts/pretrain.sh
#
# Variables as in scripts/finetune_visionzip.sh; DATA_FRACTION is 1. OUTPUT gets the adapter, non_lora_trainables.bin and
# config.json: load_pretrained_model(OUTPUT, MODEL_PATH). Memory: the adapter's 320e6 numbers with gradients, float32 copy and
# AdamW's moments are 4.8 GiB more than a projector's, shared out by ZeRO.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL_PATH="${MODEL_PATH:-liuhaotian/llava-v1.5-7b}"
OUTPUT="${OUTPUT:-checkpoints/$(basename "$MODEL_PATH")-visionzip-$TOKENS-lora}"
DATA_PATH="${DATA_PATH:-playground/data/llava_v1_5_mix665k.json}"
ZERO="${ZERO:-zero2}"

prepare_training 128 "${BASE_GIB:-20}" "${SAMPLE_GIB:-1.8}" "$@"
train ${VISION_TOWER:+--vision_tower "$VISION_TOWER"} \
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"} \
    --version "${VERSION:-v1}" \
    --lora_enable True \
    --lora_r 128 \
    --lora_alpha 256 \
    --mm_projector_lr 2e-5 \
    --image_folder "${IMAGE_FOLDER:-playground/data}" \
    --data_fraction "${DATA_FRACTION:-1}" \
    --group_by_modality_length True \
    --learning_rate "${LEARNING_RATE:-2e-4}" \
    "$@"
