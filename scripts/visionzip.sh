#!/usr/bin/env bash
# The command `visionzip`, in an environment that is made if there is none:
#
#   bash scripts/visionzip.sh chat --model-path liuhaotian/llava-v1.5-7b --image photo.jpg
#   bash scripts/visionzip.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment >&2
exec "$PYTHON" -m llava.cli "$@"
