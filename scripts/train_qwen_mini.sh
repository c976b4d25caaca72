#!/usr/bin/env bash
# Trains checkpoints/qwen-mini, a small Qwen3-VL, from checkpoints/llava-mini, on one CPU core, in about an hour:
#
#   bash scripts/train_qwen_mini.sh [OUT]      OUT: where it works and leaves the model (results/qwen-mini)
#
#   1  scenes     draws the training images and the questions about them (playground/scenes.py)
#   2  start      a Qwen-VL processor, and a Qwen3-VL that has llava-mini's weights where both have the same part
#   3  encoder    its blocks learn to give what llava-mini's tower gives, which has a CLS token and no rotary positions
#   4  model      all of it learns to answer, on pictures of 36, 16, 9 and 4 tokens
#   5  export     the checkpoint in bfloat16, with the picture of the losses
#
# Seeded; each step is skipped when it is done, and a step that was stopped goes on from its last checkpoint. SCALE=0.01 makes
# every step that much shorter, to see it run through.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
OUT="${1:-results/qwen-mini}"

# train STAGE INIT STEPS …
train() {
    "$PYTHON" -m playground.qwen_training --data "$OUT/scenes" --stage "$1" --init "$OUT/$2" --output_dir "$OUT/$1" \
        --max_steps "$(scaled "$3")" --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps "$(scaled 50)" \
        --weight_decay 0.01 "${TRAINER[@]}" "${@:4}"
}

mkdir -p "$OUT"
step scenes "$PYTHON" -m playground.scenes train --output "$OUT/scenes" --images "$(scaled 60000)"
step start "$PYTHON" -m playground.qwen_mini start "$OUT/scenes" "$OUT/start"
step encoder train encoder start 250
step model train model encoder 1400 --encoder_rate 3e-4
step export "$PYTHON" -m playground.qwen_mini export "$OUT" "$OUT/qwen-mini"
