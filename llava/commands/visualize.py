"""``visionzip visualize``: figures of what a model's vision tower attends to, keeps and merges."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from llava.commands.arguments import (
    add_image_argument,
    add_language_arguments,
    add_method_arguments,
    add_model_arguments,
)
from llava.commands.loading import has_processor, load_from_arguments, load_with_processor
from llava.images import load_image
from llava.methods import METHODS as ALL_METHODS
from llava.model.stock.processor_model import inputs_of, prompt_of, user_turn
from llava.picture import encoder_inputs
from llava.storage.files import write_atomically
from visionzip.integrations.seam.maps import inspect_picture
from visionzip.methods import METHODS


def visualize(args: argparse.Namespace) -> None:
    """Draw where a model's vision tower looks and what a method makes of it: five figures, one row per image.

    tokens.png (image, attention, kept patches, merged groups), attention.png, overlay.png, layers.png and
    histogram.png. Of tiles the one with the whole image is shown. Where an encoder merges patches, as Qwen-VL's, what
    is called a patch is one of the language model's tokens. Videos are not drawn, nor what FastV and
    SparseVLM prune inside the language model.

    Raises:
        ValueError: an image cannot be read, the method is none that chooses before the language model, or the model
            cannot be loaded as asked.
        OSError: a file is missing, or a part of the output folder's path is a file.
        ImportError: matplotlib is not installed.
    """
    from visionzip import visualize as figures  # noqa: PLC0415 - matplotlib is an extra: only this command needs it

    if args.choose_by in ALL_METHODS and args.choose_by not in METHODS:
        raise ValueError(
            f"--method {args.choose_by} does not choose before the language model, so there is nothing to draw of it: "
            f"the vision tower keeps all tokens. Use one of {', '.join(METHODS)}"
        )
    folder = _check_folder(args.output)
    images = [load_image(file) for file in args.image]
    if has_processor(args.model_path):
        model, processor = load_with_processor(args, vanilla=False)
        prompt = prompt_of(processor, [user_turn("", 1)])
        inputs = [inputs_of(processor, [prompt], [[image]]).to(model.device).to(model.dtype) for image in images]
        maps = [inspect_picture(model, own, image) for own, image in zip(inputs, images, strict=True)]
    else:
        _, model, image_processor, _ = load_from_arguments(args, vanilla=False)
        whole = [encoder_inputs(model, image, image_processor)[0] for image in images]
        maps = figures.inspect_tokens(model, torch.stack(whole))
    for name, draw in (
        ("tokens", figures.overview),
        ("attention", figures.attention_map),
        ("overlay", figures.token_overlay),
        ("layers", figures.layer_panel),
        ("histogram", figures.attention_histogram),
    ):
        file = folder / f"{name}.png"
        write_atomically(file, partial(draw(maps).savefig, format="png"))
        print(f"wrote {file}")


def _check_folder(path: str) -> Path:
    """The output folder, which may not exist yet: said before a model is loaded."""
    folder = Path(path)
    nearest = next(part for part in (folder, *folder.parents) if part.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"--output {path}: {nearest} is a file, not a folder; choose another one")
    return folder


def add_visualize_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``visionzip visualize``."""
    add_model_arguments(parser, unzipped="the checkpoint's own, else 54 + 10")
    add_language_arguments(parser)
    add_method_arguments(parser)
    add_image_argument(parser, "files or addresses of the images", required=True)
    parser.add_argument("--output", "--out", default="results/visualize", metavar="FOLDER", help="where the figures go")
    parser.set_defaults(run=visualize)
