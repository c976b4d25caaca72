#!/usr/bin/env bash
# MSRVTT-QA; --judge MODEL scores it. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" msrvtt "$@"
