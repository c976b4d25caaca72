#!/usr/bin/env bash
# LLaVA-Bench (in the wild); --judge MODEL scores it. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" llavabench "$@"
