#!/usr/bin/env bash
# POPE. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" pope "$@"
