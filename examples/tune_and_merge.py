"""Tune the projector with VisionZip on (the paper's efficient tuning), and merge it with its base into one checkpoint.

    python examples/tune_and_merge.py [STEPS]

The data are drawn here, in LLaVA's format: eight discs whose color is asked. Tuning on real data is
``bash scripts/finetune_visionzip.sh`` (docs/tuning.md).
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw

from llava.cli import main as visionzip_command
from llava.eval.run_llava import eval_model
from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.train import train

BASE = str(Path(__file__).resolve().parents[1] / "checkpoints/llava-mini")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
QUESTION = "What color is the circle?"


def draw(folder: Path) -> Path:
    """Write 8 images and the records of a training set about them; returns its file."""
    records = []
    for color in COLORS:
        image = Image.new("RGB", (144, 144), "gray")
        ImageDraw.Draw(image).ellipse((40, 40, 100, 100), fill=color)
        image.save(folder / f"{color}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": color}]
        records.append({"id": color, "image": f"{color}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def main(steps: str = "6") -> None:
    """Tune at 13 + 3 of 144 tokens, merge, and ask the merged checkpoint, which comes back zipped."""
    with TemporaryDirectory() as place:
        tuned, merged = f"{place}/tuned", f"{place}/merged"
        model = ModelArguments(BASE, tune_mm_mlp_adapter=True, visionzip_dominant=13, visionzip_contextual=3)
        data = DataArguments(str(draw(Path(place))), image_folder=place)
        schedule = {"max_steps": int(steps), "learning_rate": 1e-4, "logging_steps": 1}
        train(model, data, LlavaTrainingArguments(tuned, **schedule, use_cpu=True, report_to="none"))
        history = json.loads(Path(tuned, "run.json").read_text())["losses"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
        visionzip_command(["merge", "--model-path", tuned, "--model-base", BASE, "--output", merged])
        asked = {"query": QUESTION, "image_file": f"{place}/red.png", "sep": ",", "conv_mode": None, "device": "cpu"}
        asked |= {"temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 8}
        eval_model(Namespace(model_path=merged, model_base=None, **asked))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
