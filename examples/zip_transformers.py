"""Zip models of transformers, with their own processors, batches and ``generate``; save one zipped, and load it again.

    python examples/zip_transformers.py

The models are the embedded Qwen3-VL and the embedded LLaVA, which is written in transformers' layout first.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.cli import main as visionzip_command
from llava.model.stock.processor_model import load_processor
from visionzip import visionzip

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What color is the ring?", "What pattern does the background have?")


def main() -> None:
    """Ask two questions in one batch, with all visual tokens and zipped."""
    with TemporaryDirectory() as folder:
        native, zipped = f"{folder}/native", f"{folder}/zipped"
        visionzip_command(["convert", str(ROOT / "checkpoints/llava-mini"), native, "--to", "transformers"])
        for path in (str(ROOT / "checkpoints/qwen-mini"), native):
            processor = load_processor(path)  # AutoProcessor.from_pretrained(path), for Qwen without torchvision
            model = AutoModelForImageTextToText.from_pretrained(path)
            ask(f"{model.config.model_type}, all tokens", model, processor)
            visionzip(model, keep=0.5)  # a share of each image's tokens, so that images may have any size
            ask(f"{model.config.model_type}, zipped", model, processor)
        model.save_pretrained(zipped)  # the setting is in its config
        ask("loaded", visionzip(AutoModelForImageTextToText.from_pretrained(zipped)), processor)


def ask(setting: str, model: AutoModelForImageTextToText, processor: AutoProcessor) -> None:
    """Print the answers, and the length of the longest prompt as the language model gets it."""
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in QUESTIONS]
    prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
    images = [[Image.open(ROOT / "examples/scene.jpg")] for _ in prompts]
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    length = model(**inputs).logits.shape[1]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{setting}: prompts of {length} tokens, answers {', '.join(answer.strip() for answer in answers)}")


if __name__ == "__main__":
    main()
