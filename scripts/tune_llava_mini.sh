#!/usr/bin/env bash
# Tunes the projector of checkpoints/llava-mini with VisionZip on, on 10 % of its training data, and tests what that recovers:
#
#   bash scripts/tune_llava_mini.sh [OUT]      OUT: where it works (results/tuned)
#
# The smallest budget of the quickstart (13 + 3 tokens), three seeds of data and order; language model and vision tower stay
# as they are. Prints the table of the quickstart for each. What is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment eval,figures
cd "$ROOT"
OUT="${1:-results/tuned}"
IMAGES="${IMAGES:-30000}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

mkdir -p "$OUT"
if [[ ! -e "$OUT/scenes/instruct.json" ]]; then
    "$PYTHON" -m playground.scenes train --out "$OUT/scenes" --images "$IMAGES"
fi
for seed in 0 1 2; do
    if [[ ! -e "$OUT/seed-$seed/mm_projector.safetensors" ]]; then
        say "projector, seed $seed"
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 -m llava.train.train \
            --model_name_or_path checkpoints/llava-mini --output_dir "$OUT/seed-$seed" --tune_mm_mlp_adapter True \
            --visionzip_dominant 13 --visionzip_contextual 3 --data_path "$OUT/scenes/instruct.json" \
            --image_folder "$OUT/scenes/images" --data_fraction 0.1 --data_seed "$seed" --seed "$seed" \
            --num_train_epochs 2 --per_device_train_batch_size 16 --learning_rate 5e-4 --warmup_steps 20 \
            --lr_scheduler_type cosine --turns_apart True --attn_implementation eager --bf16 True --use_cpu True \
            --logging_steps 10 --save_steps 100 --save_total_limit 1 --report_to none
    fi
    "$PYTHON" -m eval run scenes --model-path "$OUT/seed-$seed" --model-base checkpoints/llava-mini --method visionzip \
        --tokens 16 --batch-size 64 --output "$OUT/seed-$seed/test"
done
