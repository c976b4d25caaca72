#!/usr/bin/env bash
# Training with VisionZip from scratch (paper, Table 11), first stage: a random projector between CLIP and Vicuna learns from
# captions; both of these stay as they are. Settings as in LLaVA's pretrain.sh.
#
#   bash scripts/pretrain.sh                              then scripts/finetune.sh
#   DOMINANT=162 CONTEXTUAL=30 bash scripts/pretrain.sh
#
# The paper trains with LLaVA's scripts, and does not say in which of the two stages VisionZip is on: here, in both. Variables
# as in scripts/finetune_visionzip.sh, with the data of LLaVA's pretraining, and VISION_TOWER.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL_PATH="${MODEL_PATH:-lmsys/vicuna-7b-v1.5}"
OUTPUT="${OUTPUT:-checkpoints/llava-v1.5-7b-pretrain-visionzip-$TOKENS}"
DATA_PATH="${DATA_PATH:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
ZERO="${ZERO:-zero2}"

# Captions are short: 0.2 GiB a sample.
prepare_training 256 "${BASE_GIB:-15.5}" "${SAMPLE_GIB:-0.2}" "$@"
train --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --version plain \
    --tune_mm_mlp_adapter True \
    --image_folder "${IMAGE_FOLDER:-playground/data/LLaVA-Pretrain/images}" \
    --data_fraction "${DATA_FRACTION:-1}" \
    --model_max_length 2048 \
    --learning_rate "${LEARNING_RATE:-1e-3}" \
    "$@"
