"""One question about some images: ``eval_model(args)`` and ``python -m llava.eval.run_llava``, with LLaVA's flags."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava.commands.arguments import add_generation_arguments, add_language_arguments, add_model_arguments, sampling
from llava.commands.loading import load_from_arguments
from llava.commands.parsers import finite, parser_of, positive, run_command
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import new_conversation, with_image_tokens
from llava.mm_utils import load_image, process_images, tokenizer_image_token


def eval_model(args: Any) -> str:
    """Load a model, ask it one question, print the answer.

    Args:
        args: object with LLaVA's attributes: ``model_path``, ``model_base``, ``query``, ``image_file`` (several,
            separated by ``sep``), ``conv_mode`` (None: by the model's name), ``temperature``, ``top_p``, ``num_beams``,
            ``max_new_tokens``; optional: ``dominant`` and ``contextual`` for VisionZip, ``device``, ``load_8bit``,
            ``load_4bit``.

    Returns:
        The answer.

    Raises:
        FileNotFoundError: an image or the checkpoint is missing.
        ValueError: a file is not an image, or ``<image>`` in the query and images differ in number.
    """
    generate_kwargs = sampling(args.temperature, num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
    if args.top_p and not 0 < args.top_p <= 1:  # NaN neither
        raise ValueError(f"top_p={args.top_p} is not above 0 and at most 1: leave it out for all tokens")
    if args.temperature > 0 and args.top_p:
        generate_kwargs["top_p"] = args.top_p
    images = [load_image(file) for file in args.image_file.split(args.sep)]
    tokenizer, model, image_processor, conv_mode = load_from_arguments(args)
    query = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    conversation = new_conversation(conv_mode)
    conversation.append_message(conversation.roles[0], with_image_tokens(query, [1] * len(images), model.config))
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")
    output = model.generate(
        ids[None].to(model.device),
        images=process_images(images, image_processor, model.config),
        image_sizes=[image.size for image in images],
        **generate_kwargs,
    )
    answer = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    print(answer)
    return answer


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m llava.eval.run_llava``."""
    parser = parser_of("python -m llava.eval.run_llava", add_question_arguments)
    return run_command(parser.prog, eval_model, parser.parse_args(argv))


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """LLaVA's flags of its command for one question, and VisionZip's two."""
    parser.description = "Ask a model one question about some images, and print the answer."
    add_model_arguments(parser, unzipped="the model is left as the checkpoint has it")
    add_language_arguments(parser)
    parser.add_argument(
        "--image", "--image-file", dest="image_file", required=True, help="files or addresses, separated by --sep"
    )
    parser.add_argument("--query", required=True, help="the question; <image> in it says where images go")
    parser.add_argument("--sep", default=",", help="separates images")
    add_generation_arguments(parser)
    parser.add_argument("--top-p", "--top_p", type=finite, help="nucleus sampling, a share of 1 (default: all tokens)")
    parser.add_argument("--num-beams", "--num_beams", type=positive, default=1, help="beams")
    parser.set_defaults(run=eval_model)


if __name__ == "__main__":
    sys.exit(main())
