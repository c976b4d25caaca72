#!/usr/bin/env bash
# VQAv2, test-dev. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" vqav2 "$@"
