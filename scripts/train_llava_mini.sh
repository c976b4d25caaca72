#!/usr/bin/env bash
# Trains checkpoints/llava-mini from nothing, on two CPU cores, in about 75 minutes (2026-11-21, Xeon with AMX, shared):
#
#   bash scripts/train_llava_mini.sh [OUT]      OUT: where it works and leaves the model (results/llava-mini)
#
#   1  scenes     draws the training images and writes what is said about them (playground/scenes.py)
#   2  tower      contrastive pretraining against sentences, on small images first, then at full size
#   3  language   a tokenizer, and a small Llama with random weights; with a projector it learns from questions about small images
#   4  projector  LLaVA's first stage: the full-size tower in front of that language model, projector only
#   5  model      LLaVA's second stage: projector and language model
#   6  export     the checkpoint in bfloat16, with the picture of all losses
#
# Seeded; each step is skipped when it is done, and a step that was stopped goes on from its last checkpoint. SCALE=0.01 makes
# every step that much shorter, to see it run through.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
OUT="${1:-results/llava-mini}"
PROCESSES="${PROCESSES:-2}"

# train MODULE FOLDER STEPS BATCH RATE …: one Trainer run; BATCH is for one process, the rest goes to the module
train() {
    local module="$1" folder="$2" steps warmup
    steps="$(scaled "$3")"
    warmup="$(scaled 100)"
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m "$module" --output_dir "$OUT/$folder" \
        --max_steps "$steps" --per_device_train_batch_size "$4" --learning_rate "$5" --warmup_steps "$warmup" \
        --weight_decay 0.05 "${TRAINER[@]}" "${@:6}"
}

scenes() { "$PYTHON" -m playground.scenes train --output "$OUT/$1" --images "$(scaled "$2")" "${@:3}"; }

tower() { # FOLDER DATA STEPS BATCH RATE …
    train llava.train.contrastive "$1" "$3" "$4" "$5" --data_path "$OUT/$2/tower.json" --image_folder "$OUT/$2/images" \
        --validation_path "$OUT/$2-held-out/tower.json" --validation_folder "$OUT/$2-held-out/images" "${@:6}"
}

model() { # FOLDER DATA TOWER STEPS BATCH RATE …
    train llava.train.train "$1" "$4" "$5" "$6" --vision_tower "$OUT/$3" --data_path "$OUT/$2/instruct.json" \
        --image_folder "$OUT/$2/images" --mm_projector_lr 5e-4 --weight_decay 0 --attn_implementation eager \
        --turns_apart True "${@:7}"
}

mkdir -p "$OUT"
step scenes-small scenes small 60000 --edge 72 --max-things 3
step scenes-small-held-out scenes small-held-out 400 --edge 72 --max-things 3 --split validation
step scenes scenes full 30000
step scenes-held-out scenes full-held-out 400 --split validation
step tower-small tower tower-small small 2200 32 1.5e-3 --image_size 72
step tower-kinds tower tower-kinds small 3000 32 1.2e-3 --image_size 72 --init "$OUT/tower-small" --harder True
step language "$PYTHON" -m playground.llava_mini language "$OUT/full" "$OUT/language"
step model-small model model-small small tower-kinds 2000 32 1e-3 --model_name_or_path "$OUT/language" \
    --whiten_mm_projector True
step tower tower tower full 600 16 8e-4 --init "$OUT/tower-kinds" --harder True
step projector model projector full tower 60 16 1e-3 --model_name_or_path "$OUT/model-small" --tune_mm_mlp_adapter True
step model model model full tower 1800 16 1e-3 --model_name_or_path "$OUT/model-small" \
    --pretrain_mm_mlp_adapter "$OUT/projector/mm_projector.safetensors"
step export "$PYTHON" -m playground.llava_mini export "$OUT" "$OUT/llava-mini"
