#!/usr/bin/env bash
# GQA. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" gqa "$@"
