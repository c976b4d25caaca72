#!/usr/bin/env bash
# scripts/finetune_visionzip.sh for LLaVA-NeXT (paper, Table 2, VisionZip‡), with the same variables and other defaults:
# MODEL_PATH is liuhaotian/llava-v1.6-vicuna-7b, and DOMINANT and CONTEXTUAL count for each of up to 5 tiles, so that 54 and
# 10 are the paper's 320 tokens (27 5: 160; 108 20: 640). The data are LLaVA-1.5's here, too.
#
#   bash scripts/finetune_visionzip_next.sh
#
# Prompts have up to 4096 tokens, as in LLaVA-NeXT's own training, so that a sample takes twice the memory: 3.1 GiB, of which
# a 3090 has room for 2.
set -euo pipefail

export MODEL_PATH="${MODEL_PATH:-liuhaotian/llava-v1.6-vicuna-7b}" SAMPLE_GIB="${SAMPLE_GIB:-3.1}"
if [[ -z "${VERSION:-}" ]]; then
    case "${MODEL_PATH,,}" in
        *mistral*) VERSION=mistral_instruct ;;
        *34b*) VERSION=chatml_direct ;;
        *) VERSION=v1 ;;
    esac
fi
export VERSION
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune_visionzip.sh" --model_max_length 4096 "$@"
