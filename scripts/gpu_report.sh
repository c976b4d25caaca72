#!/usr/bin/env bash
# All that only a GPU can show, in less than nine minutes on one card of 80 GB: tests that are skipped elsewhere, LLaVA and
# Qwen-VL of true shapes with random weights (prefill, first token from pixels, decoding, peak memory), FastV and SparseVLM
# beside them, a step of projector tuning, what choosing costs, CUDA graphs and torch.compile.
#
#   bash scripts/gpu_report.sh                              writes results/gpu.json, and the tables of docs/efficiency.md
#   bash scripts/gpu_report.sh --sections tuning compile    only these, beside what results/gpu.json has
#   bash scripts/gpu_report.sh --scaled                     tiny shapes, on a CPU too, in a minute; leaves the tables alone
#
# All arguments go to `visionzip benchmark gpu`. It stops at its limit (--minutes) with what it has. OUTPUT names the file.
# PYTHON=… uses an interpreter that has torch and transformers as it is, and installs nothing: for machines without a
# network. flash-attn is used if it is installed; FLASH_ATTN_WHEEL=… installs it from a file.
set -euo pipefail
GIVEN="${PYTHON:-}"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [[ -n "$GIVEN" ]]; then
    PYTHON="$GIVEN"
    "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(None in map(u.find_spec, ("torch", "transformers")))' || die "PYTHON=$PYTHON has no torch or no transformers:" \
        "name one that has both, or none, so that an environment is made"
else
    use_environment
fi
cd "$ROOT"

has_flash_attention() { "$PYTHON" -c 'import flash_attn' 2>/dev/null; }

# Whatever comes of it, the report is made: without flash-attn its rows are missing, and the report says so.
if ! has_flash_attention && [[ -n "${FLASH_ATTN_WHEEL:-}" ]]; then
    say "installing $FLASH_ATTN_WHEEL"
    "$PYTHON" -m pip install -q "$FLASH_ATTN_WHEEL" || "$PYTHON" -m pip install -q --no-deps "$FLASH_ATTN_WHEEL" || true
fi
if has_flash_attention; then
    say "flash-attn is installed"
elif type -P nvcc >/dev/null; then
    say "no flash-attn here, its rows will be missing; nvcc can build it in half an hour or more:" \
        "$PYTHON -m pip install flash-attn --no-build-isolation"
else
    say "no flash-attn here, its rows will be missing: FLASH_ATTN_WHEEL=… installs it from a file (there is no nvcc to build it)"
fi

docs=(--docs docs/efficiency.md) name=gpu
for word in "$@"; do
    case "$word" in
        --scaled) docs=() name=gpu-scaled ;;
        --docs | --docs=*) docs=() ;;
    esac
done
exec "$PYTHON" -m llava.cli benchmark gpu --output "${OUTPUT:-results/$name.json}" ${docs[@]+"${docs[@]}"} "$@"
