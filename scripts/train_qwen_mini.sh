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
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
use_environment
cd "$ROOT"
OUT="${1:-results/qwen-mini}"
SCALE="${SCALE:-1}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# glibc keeps the memory of large tensors for the next step: a fifth faster than giving it back to the system and taking it anew
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

# train STAGE INIT STEPS …
train() {
    "$PYTHON" -m playground.qwen_training --data "$OUT/scenes" --stage "$1" --init "$OUT/$2" --output_dir "$OUT/$1" \
        --max_steps "$(scaled "$3")" --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps "$(scaled 50)" \
        --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.02}' --adam_beta2 0.98 \
        --weight_decay 0.01 --max_grad_norm 1 --bf16 True --use_cpu True --seed 0 --logging_steps 20 --save_steps 200 \
        --save_total_limit 2 --report_to none "${@:4}"
}

mkdir -p "$OUT"
step scenes "$PYTHON" -m playground.scenes train --output "$OUT/scenes" --images "$(scaled 60000)"
step start "$PYTHON" -m playground.qwen_mini start "$OUT/scenes" "$OUT/start"
step encoder train encoder start 250
step model train model encoder 1400 --encoder_rate 3e-4
step export "$PYTHON" -m playground.qwen_mini export "$OUT" "$OUT/qwen-mini"
