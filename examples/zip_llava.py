"""Zip a LLaVA in LLaVA's own layout: one question with all visual tokens, with a third of them, and unzipped again.

    python examples/zip_llava.py

The model is the embedded one, which was trained on drawn scenes. "liuhaotian/llava-v1.5-7b" is asked in the same way,
with 54 + 10 of its 576 tokens.
"""

from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.images import load_image
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from visionzip import unzip, visionzip

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "checkpoints/llava-mini")
QUESTION = "What color is the circle?"


def main() -> None:
    """Ask three times, and say how many visual tokens the language model got."""
    tokenizer, model, image_processor, _ = load_pretrained_model(
        MODEL, None, get_model_name_from_path(MODEL), device="cpu"
    )
    images = process_images([load_image(ROOT / "examples/scene.jpg")], image_processor, model.config)
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    input_ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]

    def ask(setting: str) -> None:
        (tokens,) = model.encode_images(images)  # as the language model gets them
        output = model.generate(input_ids, images=images, do_sample=False, max_new_tokens=8)
        answer = tokenizer.decode(output[0], skip_special_tokens=True).strip()
        print(f"{setting}: {len(tokens)} visual tokens, {QUESTION} {answer}")

    ask("all tokens")
    visionzip(model, dominant=40, contextual=8)  # CLS and 39 patches as they are; the others merged into 8
    ask("zipped")
    unzip(model)
    ask("unzipped")


if __name__ == "__main__":
    main()
