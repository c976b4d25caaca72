#!/usr/bin/env bash
# TextVQA, validation, with OCR tokens. Settings: see run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" textvqa "$@"
