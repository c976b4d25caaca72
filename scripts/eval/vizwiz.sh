#!/usr/bin/env bash
# VizWiz. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" vizwiz "$@"
