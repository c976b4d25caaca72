#!/usr/bin/env bash
# SEED-Bench. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" seed "$@"
