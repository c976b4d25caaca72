#!/usr/bin/env bash
# The main job, on the embedded model: from nothing to a table and a picture, in a few minutes on two cores.
#
#   bash scripts/quickstart.sh                             all of it
#   bash scripts/quickstart.sh --limit 100                 fewer questions; all arguments go to `python -m eval run scenes`
#   MODEL_PATH=my-llava OUTPUT=results/mine bash scripts/quickstart.sh         another checkpoint, another folder
#
# Asks the scenes test set with all visual tokens and at three budgets (1/3, 2/9 and 1/9 of the patches, the paper's
# ratios), with VisionZip and with random, uniform and pooled tokens. Writes OUTPUT/table.md, results.json and tokens.png:
# an image, where CLS looks, the dominant patches and the contextual groups. The image is the first that VisionZip answered
# with the median accuracy, at the first of the budgets (40 + 8), and is left as scene.jpg.
#
# Works from any directory, and installs as scripts/test.sh does. A second run has little to do; one that was killed goes on
# where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment
cd "$ROOT"
MODEL_PATH="${MODEL_PATH:-checkpoints/llava-mini}"
OUTPUT="${OUTPUT:-results/quickstart}"

say "accuracy and cost, vanilla and at 48, 32 and 16 of 144 visual tokens"
"$PYTHON" -m eval run scenes --model-path "$MODEL_PATH" --output "$OUTPUT" \
    --method vanilla visionzip random uniform pool --tokens 48 32 16 --batch-size 64 "$@"

say "what VisionZip keeps and merges of one image"
budget="$("$PYTHON" - "$OUTPUT" <<'PYTHON'
import json
import sys
from pathlib import Path

from eval.running.answer_files import read_answers
from eval.benchmarks.scenes import median_image

folder = Path(sys.argv[1])
results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
if zipped := [row for row in results["rows"] if row["method"] == "visionzip"]:
    name = next(name for name in results["not_asked"] if name.startswith("visionzip-"))
    answers, _ = read_answers(folder / "answers" / f"{name}.jsonl")
    (folder / "scene.jpg").write_bytes(median_image(Path(results["data"]), answers))
    print("--dominant", zipped[0]["dominant"], "--contextual", zipped[0]["contextual"])
PYTHON
)"
if [[ -z "$budget" ]]; then
    say "done: $OUTPUT/table.md, results.json; no picture, as --method has no visionzip"
    exit
fi
# shellcheck disable=SC2086 # four words
"$PYTHON" -m llava.cli visualize --model-path "$MODEL_PATH" $budget --image "$OUTPUT/scene.jpg" --output "$OUTPUT"

say "done: $OUTPUT/table.md, results.json, tokens.png"
