# Sourced by the scripts that train a small model in steps, below "$OUT" and SCALE times as long. Enters the environment, the root
# and what two CPU cores do best with.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment
cd "$ROOT"
SCALE="${SCALE:-1}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# glibc keeps the memory of large tensors for the next step: a fifth faster than giving it back to the system and taking it anew
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

# what all their Trainer runs are told; a step's own flags come behind
TRAINER=(--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.02}' --adam_beta2 0.98
    --max_grad_norm 1 --bf16 True --use_cpu True --seed 0 --logging_steps 20 --save_steps 200 --save_total_limit 2
    --report_to none)

# scaled N: N of the full recipe at this SCALE
scaled() { "$PYTHON" -c "print(max(1, round($1 * $SCALE)))"; }

# step NAME COMMAND…: runs a step unless it is done
step() {
    local name="$1"
    shift
    [[ -e "$OUT/done-$name" ]] && return
    say "$name"
    local start=$SECONDS
    "$@"
    echo "$((SECONDS - start)) s" >"$OUT/done-$name"
}
