#!/usr/bin/env bash
# The project's checks, from nothing: installs, then runs ruff and pytest.
#
#   bash scripts/test.sh                          everything
#   bash scripts/test.sh tests/test_golden.py     these tests only; all arguments go to pytest (paths: from the root)
#
# Works from any directory. Installs into the active virtual environment, else into .venv/ at the repository's root, with the
# versions of constraints.txt; later runs install again only when what is to be installed has changed. Stops at the first
# check that fails. The tests use no network: HF_HUB_OFFLINE is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment
cd "$ROOT"

say "ruff check"
"$PYTHON" -m ruff check .
say "ruff format --check"
"$PYTHON" -m ruff format --check .
say "pytest $*"
# a file of tests at a time on each core; `-n 0` at the end of the arguments runs them one after another
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
