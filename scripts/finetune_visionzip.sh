#!/usr/bin/env bash
# Efficient tuning (paper, Table 1, VisionZip‡): the projector of a LLaVA-1.5 learns to work with few visual tokens, on a
# tenth of LLaVA-1.5's instruction data; tower and language model stay as they are. The paper: 30 minutes on 8 A800.
#
#   bash scripts/finetune_visionzip.sh                                8 GPUs, or as many as there are
#   CUDA_VISIBLE_DEVICES=0 bash scripts/finetune_visionzip.sh         one GPU; a 3090 will do
#   MODEL_PATH=liuhaotian/llava-v1.5-13b ZERO=zero3 DOMINANT=108 CONTEXTUAL=20 bash scripts/finetune_visionzip.sh
#   DEVICE=cpu PROCESSES=2 MODEL_PATH=… bash scripts/finetune_visionzip.sh --max_steps 4
#
# Further flags go to llava.train.train and override those here. Besides the variables that scripts/launch.sh explains (GPUs,
# several machines, batches, wandb):
#
#   MODEL_PATH     a LLaVA: folder or hub name (liuhaotian/llava-v1.5-7b)
#   DATA_PATH      LLaVA's json (playground/data/llava_v1_5_mix665k.json)
#   IMAGE_FOLDER   what the json's image names are relative to (playground/data)
#   DATA_FRACTION, DATA_SEED     share of the data, drawn at random (0.1, 42); run.json has the ids
#   DOMINANT, CONTEXTUAL         visual tokens of an image (54, 10)
#   METHOD         another method of choosing than VisionZip's, of as many tokens in all (visionzip-plus, cen-prune, …)
#   VERSION        prompt template (v1)
#   LEARNING_RATE  (2e-5)
#   OUTPUT         the result: mm_projector.safetensors and .bin, config.json, run.json (checkpoints/<model>-visionzip-<tokens>)
#
# Afterwards: load_pretrained_model(OUTPUT, MODEL_PATH), or `--model-path OUTPUT --model-base MODEL_PATH` on the command line.
#
# Learning rate: the paper states none. 2e-5 is the rate at which LLaVA's scripts tune a projector that has been trained
# before (finetune.sh, and --mm_projector_lr of finetune_lora.sh); 1e-3, of pretrain.sh, is for one of random weights.
# Everything else is as in LLaVA's finetune.sh.
#
# Memory, for the micro-batch (7B, bf16, gradient checkpointing; calculated, not measured). BASE_GIB: 7.06e9 frozen weights x
# 2 bytes = 13.2 GiB; the projector's 21e6 with gradients, float32 copy and AdamW's moments, 0.3 GiB; CUDA itself and
# fragmentation, 2 GiB: 15.5 GiB. SAMPLE_GIB: a token takes the checkpointed inputs of 32 layers, 32 x 4096 x 2 bytes = 0.25
# MiB, and then the larger of the logits (32000 words x 16 bytes: bf16, float32, its softmax, and both gradients, 0.49 MiB)
# and of one layer that is computed again (0.3 MiB). The longest sample has 2048 tokens x 0.74 MiB = 1.5 GiB; 1.6 with the
# tower. So a 3090 (24 GiB) has room for (24 - 15.5) / 1.6 = 5.3 samples and gets 4, and accumulates 32 steps alone, or 4 on
# 8 of them. An 80 GiB GPU has room for the 16 that make 128 on 8 GPUs. A 13B model (26 GiB) does not fit into 24 GiB: several
# GPUs with ZERO=zero3 share it out, BASE_GIB=8 on 4 of them; a single one has to offload it, ZERO=zero3_offload BASE_GIB=8.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL_PATH="${MODEL_PATH:-liuhaotian/llava-v1.5-7b}"
OUTPUT="${OUTPUT:-checkpoints/$(basename "$MODEL_PATH")-visionzip-$TOKENS}"
DATA_PATH="${DATA_PATH:-playground/data/llava_v1_5_mix665k.json}"
ZERO="${ZERO:-zero2}"

prepare_training 128 "${BASE_GIB:-15.5}" "${SAMPLE_GIB:-1.6}" "$@"
train --version "${VERSION:-v1}" \
    --tune_mm_mlp_adapter True \
    --image_folder "${IMAGE_FOLDER:-playground/data}" \
    --data_fraction "${DATA_FRACTION:-0.1}" \
    --group_by_modality_length True \
    --learning_rate "${LEARNING_RATE:-2e-5}" \
    "$@"
