# Sourced by the training scripts: where a training runs, how large its batches are, and its start. They say MODEL_PATH,
# DATA_PATH, OUTPUT and ZERO; TOKENS is what VisionZip leaves of an image.
#
#   prepare_training GLOBAL_BATCH BASE_GIB SAMPLE_GIB FLAG…
#                          looks for the data, installs; settles DEVICE, PROCESSES, NNODES, MICRO_BATCH, ACCUMULATION
#   train FLAG…            starts llava.train.train on them; the last of equal flags holds
#
# From the environment, all optional:
#
#   DEVICE         cuda or cpu (cuda if there is a GPU)
#   PROCESSES      on this machine (the GPUs that can be seen; 1 on a CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: start the script on each of them, with the same NNODES,
#                  MASTER_ADDR and MASTER_PORT and another NODE_RANK, from 0 (MASTER_ADDR is the machine of rank 0)
#   HOSTFILE       several machines, the other way: DeepSpeed's hostfile (lines "name slots=8"); start the script on one of
#                  them, DeepSpeed's launcher reaches the others by ssh (pdsh)
#   ZERO           zero2, zero3 or zero3_offload: which of scripts/*.json DeepSpeed gets; none: no DeepSpeed
#   GLOBAL_BATCH   samples of one update, over all machines
#   MICRO_BATCH    samples that a GPU has at once (fitted to its memory); the rest of GLOBAL_BATCH is accumulated
#   REPORT_TO      wandb, tensorboard or none (none); WANDB_MODE=offline keeps wandb's files here, in OUTPUT
#
# A run that was stopped goes on at its last whole checkpoint when the same command is given again; the two newest are kept.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
DOMINANT="${DOMINANT:-54}"
CONTEXTUAL="${CONTEXTUAL:-10}"
TOKENS=$((DOMINANT + CONTEXTUAL))

# gpu_gib: memory of the smallest GPU
gpu_gib() {
    nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | awk 'NR == 1 { print int($1 / 1024) }'
}

visible_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^ *[^ -]' || true # -1 hides all
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    fi
}

# world_size: processes on all machines
world_size() {
    if [[ -n "${HOSTFILE:-}" ]]; then
        [[ -f "$HOSTFILE" ]] || die "HOSTFILE=$HOSTFILE is no file"
        awk '!/^[[:space:]]*(#|$)/ { sub(/.*slots=/, ""); total += $1 } END { print total + 0 }' "$HOSTFILE"
    else
        echo $((NNODES * PROCESSES))
    fi
}

prepare_training() {
    local base="$2" sample="$3" world room name
    cd "$ROOT"
    [[ " ${*:4} " == *" --data_path"* || -f "$DATA_PATH" ]] ||
        die "DATA_PATH=$DATA_PATH: there is no such file; get the data, or name a json file in LLaVA's format"
    use_environment
    DEVICE="${DEVICE:-$([[ "$(visible_gpus)" -gt 0 ]] && echo cuda || echo cpu)}"
    [[ "$DEVICE" == cuda || "$DEVICE" == cpu ]] || die "DEVICE=$DEVICE is neither cuda nor cpu"
    [[ "$DEVICE" == cpu || "$(visible_gpus)" -gt 0 ]] || die "DEVICE=cuda, but there is no GPU to be seen"
    PROCESSES="${PROCESSES:-$([[ "$DEVICE" == cuda ]] && visible_gpus || echo 1)}"
    NNODES="${NNODES:-1}"
    GLOBAL_BATCH="${GLOBAL_BATCH:-$1}"
    for name in NNODES GLOBAL_BATCH PROCESSES ${MICRO_BATCH:+MICRO_BATCH}; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} is not a whole number of at least 1"
    done
    world="$(world_size)"
    ((world > 0)) || die "HOSTFILE=${HOSTFILE:-} has no line with slots=…"
    ((GLOBAL_BATCH % world == 0)) ||
        die "GLOBAL_BATCH=$GLOBAL_BATCH cannot be shared out to $world processes: give a multiple of $world"
    if [[ -z "${MICRO_BATCH:-}" ]]; then
        # The largest power of two that fits and divides each process's share of the batch.
        room="$([[ "$DEVICE" == cuda ]] && gpu_gib || echo 24)"
        MICRO_BATCH=1
        while ((GLOBAL_BATCH / world % (2 * MICRO_BATCH) == 0)) &&
            awk "BEGIN { exit !($base + 2 * $MICRO_BATCH * $sample <= $room) }"; do
            MICRO_BATCH=$((2 * MICRO_BATCH))
        done
    fi
    ((GLOBAL_BATCH / world % MICRO_BATCH == 0)) ||
        die "MICRO_BATCH=$MICRO_BATCH does not divide the $((GLOBAL_BATCH / world)) samples of a process"
    ACCUMULATION=$((GLOBAL_BATCH / world / MICRO_BATCH))
    say "$world processes ($DEVICE) x $MICRO_BATCH samples x $ACCUMULATION steps = $GLOBAL_BATCH samples an update"
}

train() {
    local launcher flags log why last
    if [[ "$DEVICE" == cpu ]]; then
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        flags=(--use_cpu True)
    else
        flags=(--bf16 True --tf32 True)
    fi
    if [[ "${ZERO:-none}" != none ]]; then
        [[ -f "scripts/$ZERO.json" ]] ||
            die "ZERO=$ZERO: there is no scripts/$ZERO.json; use zero2, zero3, zero3_offload or none"
        flags+=(--deepspeed "scripts/$ZERO.json")
    fi
    export TOKENIZERS_PARALLELISM=false WANDB_DIR="${WANDB_DIR:-$OUTPUT}" WANDB_PROJECT="${WANDB_PROJECT:-visionzip}"
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}" # of the libraries, about each other
    log="$(mktemp)"
    # shellcheck disable=SC2064 - the name of now
    trap "rm -f '$log'" EXIT
    if [[ -n "${HOSTFILE:-}" ]]; then
        launcher=(-m deepspeed.launcher.runner --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"}
            --master_port "${MASTER_PORT:-29500}" --no_local_rank --module)
    elif ((NNODES > 1)); then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] || die "NNODES=$NNODES needs NODE_RANK and MASTER_ADDR"
        launcher=(-m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$PROCESSES"
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m)
    else
        launcher=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m)
    fi
    { "$PYTHON" "${launcher[@]}" llava.train.train \
        --model_name_or_path "$MODEL_PATH" \
        --visionzip_dominant "$DOMINANT" \
        --visionzip_contextual "$CONTEXTUAL" \
        ${METHOD:+--visionzip_method "$METHOD"} \
        --data_seed "${DATA_SEED:-42}" \
        --output_dir "$OUTPUT" \
        --per_device_train_batch_size "$MICRO_BATCH" \
        --gradient_accumulation_steps "$ACCUMULATION" \
        --num_train_epochs 1 \
        --lr_scheduler_type cosine \
        --warmup_steps 0.03 \
        --weight_decay 0 \
        --activation_checkpointing True \
        --dataloader_num_workers 4 \
        --logging_steps 1 \
        --save_steps 100 \
        --save_total_limit 2 \
        --report_to "${REPORT_TO:-none}" \
        --run_name "$(basename "$OUTPUT")" \
        --data_path "$DATA_PATH" \
        "${flags[@]}" "$@" 2>&1 >&3 | tee "$log" >&2; } 3>&1 || {
        # The launcher buries what a process has said last under its own report; a progress bar may stand before it.
        why="$(tr '\r' '\n' <"$log" | grep -o 'llava\.train\.train: .*' | tail -n 1)" || true
        last="$(cd "$OUTPUT" 2>/dev/null && find checkpoint-* -maxdepth 1 -name trainer_state.json 2>/dev/null)" || true
        [[ -n "$last" ]] && last="goes on at its last checkpoint" || last="begins anew: there is no checkpoint yet"
        die "${why:-the training stopped, see above. The same command $last}"
    }
}
