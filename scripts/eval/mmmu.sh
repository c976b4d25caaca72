#!/usr/bin/env bash
# MMMU, validation. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmmu "$@"
