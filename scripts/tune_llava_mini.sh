#!/usr/bin/env bash
# Tunes the projector of checkpoints/llava-mini with VisionZip on, on 10 % of its training data, and tests what that recovers:
#
#   bash scripts/tune_llava_mini.sh [OUT]      OUT: where it works (results/tuned)
#   METHOD=visionzip-plus DOMINANT=9 CONTEXTUAL=0 bash scripts/tune_llava_mini.sh results/tuned-plus-9
#
# Through scripts/finetune_visionzip.sh, at the smallest budget of the quickstart (13 + 3 tokens), with three seeds of data and
# order (SEEDS). Prints the table of the quickstart for each. What is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment
cd "$ROOT"
OUT="${1:-results/tuned}"
IMAGES="${IMAGES:-30000}"
export METHOD="${METHOD:-visionzip}" DOMINANT="${DOMINANT:-13}" CONTEXTUAL="${CONTEXTUAL:-3}"
export DEVICE=cpu PROCESSES=2 GLOBAL_BATCH=32 MICRO_BATCH=16 LEARNING_RATE=5e-4
export MODEL_PATH=checkpoints/llava-mini DATA_PATH="$OUT/scenes/instruct.json" IMAGE_FOLDER="$OUT/scenes/images"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

mkdir -p "$OUT"
[[ -e "$DATA_PATH" ]] || "$PYTHON" -m playground.scenes train --output "$OUT/scenes" --images "$IMAGES"
for seed in ${SEEDS:-0 1 2}; do
    if [[ ! -e "$OUT/seed-$seed/mm_projector.safetensors" ]]; then
        say "projector, seed $seed"
        DATA_SEED="$seed" OUTPUT="$OUT/seed-$seed" bash scripts/finetune_visionzip.sh --seed "$seed" --num_train_epochs 2 \
            --turns_apart True --attn_implementation eager --bf16 True \
            --activation_checkpointing False --dataloader_num_workers 0
    fi
    "$PYTHON" -m eval run scenes --model-path "$OUT/seed-$seed" --model-base checkpoints/llava-mini --method "$METHOD" \
        --tokens "$((DOMINANT + CONTEXTUAL))" --batch-size 64 --output "$OUT/seed-$seed/test"
done
