"""The model that a command's flags name, loaded and zipped as they say."""

from __future__ import annotations

from typing import Any

import torch

from llava.commands.arguments import device_of, setting_of
from llava.conversation import conv_mode_for, new_conversation
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.configs import config_values
from llava.model.checkpoints.files import checkpoint_path
from llava.model.stock.processor_model import load_model, load_processor, refuse_llava_flags, takes_processor
from visionzip import unzip, visionzip


def _checked_setting(args: Any, vanilla: bool | None) -> dict[str, Any]:
    """What the flags say for ``visionzip``, checked; nothing beside ``--vanilla``."""
    given = setting_of(args)
    if vanilla and given:
        raise ValueError(f"--vanilla keeps all visual tokens, but a setting was given too ({given}): choose one")
    return given


def load_from_arguments(args: Any, vanilla: bool | None = None) -> tuple[Any, Any, Any, str]:
    """Load the model that :func:`add_model_arguments` describes, zipped as it says.

    Args:
        args: the parsed flags, or any object with ``model_path``, ``model_base`` and ``conv_mode``; the rest may lack.
        vanilla: without a budget in ``args``: None leaves the model as its checkpoint has it (LLaVA's commands), True
            unzips it, False applies the checkpoint's own setting or the default one.

    Returns:
        tokenizer, model, image_processor, conv_mode.

    Raises:
        ValueError: the budget, the device or the template is not valid; before anything is loaded. For the rest see
            :func:`llava.model.builder.load_pretrained_model`.
        FileNotFoundError: there is no such folder.
    """
    name = get_model_name_from_path(args.model_path)
    if has_processor(args.model_path):
        raise ValueError(
            f"{args.model_path} is a model of transformers with its own processor, which this command does not take: "
            "use visionzip chat, eval run, or from_pretrained and visionzip(model) in Python"
        )
    conv_mode = args.conv_mode or conv_mode_for(name)
    new_conversation(conv_mode)  # checks it
    given, device = _checked_setting(args, vanilla), device_of(args)
    checkpoint_path(args.model_path, "--model-path")
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        load_8bit=getattr(args, "load_8bit", False),
        load_4bit=getattr(args, "load_4bit", False),
        device=device,
    )
    if vanilla:
        unzip(model)
    elif given or vanilla is False:
        visionzip(model, **given)
    return tokenizer, model, image_processor, conv_mode


def has_processor(model_path: str) -> bool:
    """Whether a checkpoint is of a model of transformers that is no LLaVA; False if it has no config to say so."""
    try:
        return takes_processor(config_values(model_path))
    except (OSError, ValueError):
        return False


def load_with_processor(args: Any, vanilla: bool | None = None) -> tuple[Any, Any]:
    """Load a model of transformers that is no LLaVA, zipped as :func:`add_model_arguments`'s flags say.

    Args:
        args: the parsed flags, as in :func:`load_from_arguments`.
        vanilla: the same.

    Returns:
        model, processor.

    Raises:
        ValueError: a flag is for LLaVA's families, or a value is not valid, or the model's family cannot be zipped.
    """
    refuse_llava_flags(args)
    given, device = _checked_setting(args, vanilla), device_of(args)
    processor = load_processor(args.model_path)
    dtype = "auto" if device.startswith("cuda") else torch.float32
    model = load_model(args.model_path, processor, device, dtype)
    if vanilla or (vanilla is None and not given and not getattr(model.config, "visionzip", None)):
        return model, processor
    try:
        return visionzip(model, **given), processor
    except TypeError as error:
        raise ValueError(f"{error} (or ask it unzipped, with --vanilla)") from error
