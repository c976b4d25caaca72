#!/usr/bin/env bash
# ScienceQA. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" sqa "$@"
