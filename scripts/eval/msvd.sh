#!/usr/bin/env bash
# MSVD-QA; --judge MODEL scores it. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" msvd "$@"
