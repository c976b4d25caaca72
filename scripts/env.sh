# Sourced by the other scripts: the Python environment that they work in.
#
#   source scripts/env.sh       sets ROOT, the repository's root
#   use_environment             installs this repository, editable, with the versions of constraints.txt; sets PYTHON, the
#                               interpreter to run things with
#
# The environment is the active virtual environment, else .venv/ at the root, made when it is missing. What all scripts need
# is installed at once, so that none of them installs anew what another did; a stamp records from what, so that a second call
# takes no time. Things are run as "$PYTHON -m pip" and the like: the
# commands in .venv/bin name an absolute interpreter, and in a copied or moved repository that is someone else's.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRAS=demo,dev,docs,eval,figures,quant,train,video

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# transformers 5.21 and later need Python 3.11
require_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$(type -P "$1") is $("$1" -V 2>&1)," \
        "but Python 3.11 or newer is needed. If you have one under another name, make a virtual environment with it," \
        "activate that, and run this again."
}

use_environment() {
    local venv="${VIRTUAL_ENV:-$ROOT/.venv}" stamp log checksum
    PYTHON="$venv/bin/python"
    stamp="$venv/visionzip-installed"
    log="$venv/visionzip-install.log"

    if [[ -z "${VIRTUAL_ENV:-}" && ! -e "$venv" ]]; then
        type -P python3 >/dev/null || die "there is no python3 on the PATH; Python 3.11 or newer is needed"
        require_python python3
        say "making $venv"
        python3 -m venv "$venv" || {
            rm -rf "$venv"
            die "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
        }
    fi

    # the place counts too: an editable install points at one directory
    checksum="$(cd "$ROOT" && { pwd && cat constraints.txt setup.py pyproject.toml visionzip/__init__.py && echo "$EXTRAS"; } | cksum)"
    [[ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]] || return 0

    "$PYTHON" -m pip --version >/dev/null || die "$PYTHON does not run pip: is $venv a whole virtual environment?"
    require_python "$PYTHON"
    say "installing into $venv, once for all scripts: a minute or two, and what is to be downloaded (log: $log)"
    {
        # this repository's own distribution had another name, and would stay beside the new one
        if [[ -e "$stamp" ]]; then "$PYTHON" -m pip uninstall -y visionzip; fi &&
            rm -f "$stamp" &&
            # the build backend first, at its tested version, so that no isolated environment is made for it
            "$PYTHON" -m pip install -c "$ROOT/constraints.txt" setuptools wheel &&
            # Python compiles what is imported; compiling all there is took pip as long as the rest
            "$PYTHON" -m pip install --no-compile -c "$ROOT/constraints.txt" --no-build-isolation -e "$ROOT[$EXTRAS]" &&
            "$PYTHON" -m pip check
    } >"$log" 2>&1 || {
        grep -i error "$log" >&2 || tail -n 5 "$log" >&2
        die "pip did not install everything into $venv: $log has all that it said. Run this again when that is mended"
    }
    echo "$checksum" >"$stamp"
}
