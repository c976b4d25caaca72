#!/usr/bin/env bash
# Runs a benchmark: run.sh NAME [flags of `python -m eval run`]; the other scripts are its names. The environment may set
# MODEL_PATH, METHOD, DOMINANT, CONTEXTUAL, DATA_ROOT, FROM_HUB, OUTPUT, CUDA_VISIBLE_DEVICES and PROCESSES: eval/launch.py
# says what each means.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
use_environment
cd "$ROOT"
exec "$PYTHON" -m eval.launch "$@"
