#!/usr/bin/env bash
# ActivityNet-QA; --judge MODEL scores it. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" activitynet "$@"
