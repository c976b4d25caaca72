#!/usr/bin/env bash
# The paper's efficiency tables: 4 (POPE, LLaVA-NeXT-7B), 7 and 18 (TextVQA, 13B beside 7B).
#
#   bash scripts/efficiency.sh                     with the weights and the data: answers all questions; total time and
#                                                  prefill are the rows' "seconds" in OUTPUT/*/results.json
#   bash scripts/efficiency.sh shapes              anywhere: random weights of the same shapes, no data
#   SHAPES=llava-next-mini bash scripts/efficiency.sh shapes --device cpu --dtype bfloat16     for a CPU
#
# Further arguments go to each command. MODEL_7B and MODEL_13B name checkpoints, OUTPUT the folder of the results.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment
cd "$ROOT"
OUTPUT="${OUTPUT:-results/efficiency}"

if [[ "${1:-}" == shapes ]]; then
    shift
    for shape in ${SHAPES:-llava-next-7b llava-next-13b}; do
        say "$shape: from pixels to the first token"
        "$PYTHON" -m llava.cli benchmark prefill --shape "$shape" --tokens 640 320 160 \
            --output "$OUTPUT/$shape-prefill.json" --plot "$OUTPUT/$shape-prefill.png" "$@"
        say "$shape: whole answers"
        "$PYTHON" -m llava.cli benchmark generate --shape "$shape" --tokens 640 320 160 --max-new-tokens 8 \
            --output "$OUTPUT/$shape-generate.json" "$@"
    done
    exit
fi

MODEL_7B="${MODEL_7B:-liuhaotian/llava-v1.6-vicuna-7b}"
MODEL_13B="${MODEL_13B:-liuhaotian/llava-v1.6-vicuna-13b}"
# The budgets are per tile here: 32, 64 and 128 of five tiles are 160, 320 and 640. One question at a time, as in the paper.
say "Table 4: POPE, 7B"
"$PYTHON" -m eval run pope --model-path "$MODEL_7B" --method vanilla fastv sparsevlm visionzip --tokens 32 \
    --batch-size 1 --output "$OUTPUT/table-4" "$@"
say "Tables 7 and 18: TextVQA, 7B"
"$PYTHON" -m eval run textvqa --model-path "$MODEL_7B" --method vanilla --batch-size 1 \
    --output "$OUTPUT/table-7-18-7b" "$@"
say "Tables 7 and 18: TextVQA, 13B"
"$PYTHON" -m eval run textvqa --model-path "$MODEL_13B" --method vanilla visionzip --tokens 128 64 32 --batch-size 1 \
    --output "$OUTPUT/table-7-18-13b" "$@"

"$PYTHON" - "$OUTPUT" <<'PYTHON'
import json
import sys
from pathlib import Path

for folder in ("table-4", "table-7-18-7b", "table-7-18-13b"):
    results = json.loads(Path(sys.argv[1], folder, "results.json").read_text())
    print(f"{folder}: {results['benchmark']}, {results['model']}, {results['questions']} questions")
    for row in results["rows"]:
        own = row["seconds"]
        prefill = 1e3 * own["prefill"] / results["questions"]
        score = "" if row.get("score") is None else f", score {row['score']:.1f}"
        print(f"  {row['method']} {row['tokens'] or ''}: total {sum(own.values()):.0f} s, prefill {prefill:.1f} ms{score}")
PYTHON
