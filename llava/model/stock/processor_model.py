"""Any other model of transformers as the commands take it: its own processor, its own chat template.

Nothing here is of one family: what differs lies in the checkpoint's files and in :mod:`visionzip.integrations`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoints.layouts import KINDS
from llava.model.stock.loading import is_transformers

Message = dict[str, Any]


def takes_processor(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model of transformers that is no LLaVA."""
    return is_transformers(dict(values)) and values.get("model_type") not in KINDS


def refuse_llava_flags(args: Any) -> None:
    """Refuse flags that are for LLaVA's families alone.

    Raises:
        ValueError: one of them is given.
    """
    for flag in ("model_base", "conv_mode", "load_8bit", "load_4bit"):
        if getattr(args, flag, None):
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is for LLaVA's families: {args.model_path} is of another, leave it out")


@lru_cache(maxsize=1)  # a run asks for a prompt first and loads the weights then
def load_processor(path: str) -> Any:
    """Load a checkpoint's processor, set up to pad on the left.

    Where torchvision is missing, it is one of images alone: transformers' processors of videos need it.

    Raises:
        ValueError: it has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (ImportError, ValueError):
        if find_spec("torchvision") is not None or type(AutoConfig.from_pretrained(path)) not in PROCESSOR_MAPPING:
            raise
        processor = _of_images_alone(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path))]).from_pretrained(path)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{path} has no chat template (chat_template.jinja): copy the one of its model there")
    processor.tokenizer.padding_side = "left"
    return processor


def _of_images_alone(processor: type) -> type:
    """The class of a processor, without its part for videos."""
    parts = [name for name in processor.get_attributes() if "video" not in name]
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _cls: list(parts))})


def load_model(path: str, processor: Any, device: str, dtype: torch.dtype | str) -> Any:
    """Load a checkpoint's model, ready to generate, with no method on it."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def user_turn(text: str, images: int) -> Message:
    """A user's message; images go where its text has ``<image>``, else in front.

    Raises:
        ValueError: the text has another number of ``<image>`` than images.
    """
    pieces = text.split(DEFAULT_IMAGE_TOKEN)
    if len(pieces) == 1:
        pieces = [*[""] * images, text]
    if len(pieces) - 1 != images:
        raise ValueError(f"its text has {len(pieces) - 1} {DEFAULT_IMAGE_TOKEN} for {images} images")
    content = []
    for number, piece in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return {"role": "user", "content": content}


def assistant_turn(text: str) -> Message:
    """An answer as a message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def prompt_of(processor: Any, messages: Sequence[Message]) -> str:
    """The whole prompt of a conversation, in the checkpoint's template, up to where the answer begins."""
    template = {"chat_template": processor.chat_template, "tokenize": False, "add_generation_prompt": True}
    return processor.tokenizer.apply_chat_template(list(messages), **template)


def inputs_of(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], size: dict[str, int] | None = None
) -> Any:
    """What the processor makes of prompts (B) with some images each: a left-padded batch of tensors.

    Args:
        processor: the model's.
        texts: the prompts, with a placeholder for each image.
        images: of each prompt.
        size: of pictures, from :func:`size_for`; None is the processor's own.
    """
    given = {} if size is None else {"images_kwargs": {"size": size}}
    given |= {"images": [list(own) for own in images]} if any(images) else {}
    return processor(text=list(texts), padding=True, return_tensors="pt", **given, **_start(processor, texts))


def size_for(processor: Any, tokens: int) -> dict[str, int]:
    """The limits on a picture's pixels with which it has at most so many tokens.

    A picture keeps its shape, and each side is a whole number of tokens, so that it may have fewer.

    Args:
        processor: of a model that takes pictures of any size, as Qwen-VL's and GLM-V's.
        tokens: T, of the language model.

    Raises:
        ValueError: all pictures have one size, or are cut into tiles of one.
    """
    images = processor.image_processor
    limits = ("shortest_edge", "longest_edge")
    if not hasattr(images, "merge_size") or any(getattr(images.size, name, None) is None for name in limits):
        raise ValueError(
            f"resize makes pictures smaller, but {type(images).__name__} gives a model all pictures in one size, or in "
            "tiles of one: use uniform, which keeps tokens of a grid"
        )
    edge, many = images.patch_size * images.merge_size, 32
    for copies in (images.temporal_patch_size, 1):  # GLM-V counts the pixels of both frames that it makes of a picture
        trial = copy.copy(images)
        trial.size = type(images.size)(shortest_edge=edge**2, longest_edge=copies * (many * edge) ** 2)
        if trial.get_number_of_image_patches(2 * many * edge, 2 * many * edge) == (many * images.merge_size) ** 2:
            break
    longest = copies * tokens * edge**2
    return {
        "shortest_edge": min(images.size.shortest_edge, longest),
        "longest_edge": min(images.size.longest_edge, longest),
    }


def text_length(processor: Any, text: str) -> int:
    """Tokens of a prompt whose images are one placeholder each."""
    return len(processor.tokenizer(text, **_start(processor, [text])).input_ids)


def _start(processor: Any, texts: Sequence[str]) -> dict[str, bool]:
    """Whether the tokenizer begins a prompt, or the template has done so."""
    start = processor.tokenizer.bos_token
    return {"add_special_tokens": not (start and all(text.startswith(start) for text in texts))}
