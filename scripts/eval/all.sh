#!/usr/bin/env bash
# All benchmarks, one after another; NAMES="gqa pope" runs only some. Settings: see run.sh; OUTPUT is left to it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" && failed=()
for name in ${NAMES:-$(basename -s .sh -- [a-z]*.sh | grep -vxE 'all|run')}; do
    OUTPUT='' bash ./run.sh "$name" "$@" || { [[ $? != 130 ]] && failed+=("$name"); } || exit 130 # interrupted
done
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
