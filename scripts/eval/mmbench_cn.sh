#!/usr/bin/env bash
# MMBench, Chinese, dev. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmbench_cn "$@"
