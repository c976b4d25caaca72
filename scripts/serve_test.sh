#!/usr/bin/env bash
# The tests that start the real server: makes the environment of scripts/serve.sh (3.5 GB) and the tests' own, and runs them.
#
#   bash scripts/serve_test.sh                  all; arguments go to pytest: -k qwen is Qwen-VL alone
#
# Some minutes on two cores, most of them vLLM's start (docs/serving.md has a figure).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export SERVE_ENV="${SERVE_ENV:-$ROOT/.venv-serve}"

bash "$ROOT/scripts/serve.sh" --install
use_environment
cd "$ROOT"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 0 tests/serving/test_engine*.py "$@"
