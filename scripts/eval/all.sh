#!/usr/bin/env bash
# All benchmarks, one after another; NAMES="gqa pope" runs only some. Settings: see run.sh; OUTPUT is left to it.
set -uo pipefail
failed=()
for name in ${NAMES:-gqa mmbench mme pope sqa vqav2 textvqa mmmu seed mmvet llavabench tgif msvd msrvtt activitynet}; do
    OUTPUT='' bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$name" "$@" || failed+=("$name")
done
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
