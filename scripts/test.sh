#!/usr/bin/env bash
# The project's checks, from nothing: installs, then runs ruff, mypy and pytest.
#
#   bash scripts/test.sh                          everything, with the lines of visionzip/ that no test runs
#   bash scripts/test.sh tests/method/test_golden.py     these tests only; all arguments go to pytest (paths: from the root)
#
# Works from any directory. Installs into the active virtual environment, else into .venv/ at the repository's root, with the
# versions of constraints.txt; later runs install again only when what is to be installed has changed. Stops at the first
# check that fails. The tests use no network: HF_HUB_OFFLINE is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# The page's tests want a browser: Debian's, where this may install it. Elsewhere they are skipped, and say so.
install_browser() {
    if type -P chromium >/dev/null && type -P chromedriver >/dev/null; then return; fi
    if [[ $EUID != 0 ]] || ! type -P apt-get >/dev/null; then
        say "no chromium with chromedriver: the page's browser tests are skipped (Debian: apt install chromium chromium-driver)"
        return
    fi
    say "installing chromium and chromium-driver, for the page's browser tests"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver; } \
        >/dev/null || say "that failed: the page's browser tests are skipped"
}

use_environment
cd "$ROOT"
[[ $# != 0 && "$*" != *demo* ]] || install_browser

say "ruff check"
"$PYTHON" -m ruff check .
say "ruff format --check"
"$PYTHON" -m ruff format --check .
say "mypy"
"$PYTHON" -m mypy
[[ $# != 0 ]] || set -- --cov # of the core: it adds less than a tenth to the time
say "pytest $*"
# a file of tests at a time on each core; `-n 0` at the end of the arguments runs them one after another
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
