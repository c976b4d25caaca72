#!/usr/bin/env bash
# Runs one benchmark; the other scripts here are its names. Settings come from the environment:
#
#   MODEL_PATH    checkpoint, folder or hub name          (liuhaotian/llava-v1.5-7b)
#   METHOD        vanilla, visionzip, …; several with spaces between  (vanilla, or visionzip if there is a budget)
#   DOMINANT, CONTEXTUAL    VisionZip's budget, per image or tile
#   DATA_ROOT     folder with the benchmarks' data        (playground/data/eval)
#   FROM_HUB      1: the Hugging Face data set; else a local copy of it
#   OUTPUT        folder of the results                   (results/NAME/MODEL/METHOD)
#   CUDA_VISIBLE_DEVICES, PROCESSES   several GPUs answer together
#
# Further arguments go to `python -m eval run NAME` (--help says which).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
use_environment eval
cd "$ROOT"
NAME="$1"
MODEL_PATH="${MODEL_PATH:-liuhaotian/llava-v1.5-7b}"
METHOD="${METHOD:-$([[ -n "${DOMINANT:-}" ]] && echo visionzip || echo vanilla)}"
OUTPUT="${OUTPUT:-results/$NAME/$(basename "$MODEL_PATH")/${METHOD// /-}${DOMINANT:+-$DOMINANT+${CONTEXTUAL:-}}}"
flags=(--model-path "$MODEL_PATH" --output "$OUTPUT" --method $METHOD)
[[ -z "${DOMINANT:-}" ]] || flags+=(--dominant "$DOMINANT" --contextual "${CONTEXTUAL:?give CONTEXTUAL too}")
[[ -z "${DATA_ROOT:-}" ]] || flags+=(--data-root "$DATA_ROOT")
case "${FROM_HUB:-}" in "") ;; 1) flags+=(--from-hub) ;; *) flags+=(--from-hub "$FROM_HUB") ;; esac
PROCESSES="${PROCESSES:-$(awk -F, '{print NF ? NF : 1}' <<<"${CUDA_VISIBLE_DEVICES:-}")}"
launch=("$PYTHON")
[[ "$PROCESSES" == 1 ]] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES")
exec "${launch[@]}" -m eval run "$NAME" "${flags[@]}" "${@:2}"
