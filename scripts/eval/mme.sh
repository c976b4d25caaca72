#!/usr/bin/env bash
# MME, perception and cognition. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mme "$@"
