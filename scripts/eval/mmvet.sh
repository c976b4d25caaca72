#!/usr/bin/env bash
# MM-Vet; --judge MODEL scores it. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmvet "$@"
