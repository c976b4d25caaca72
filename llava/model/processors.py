"""Tokenizer, image processor and chat template of a LLaVA, as transformers' processors have them, and back."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.mm_utils import processor_resolution

_PAD_TOKEN = "<pad>"
_SPACE = "▁"  # SentencePiece's
_PIXELS = ("image_mean", "image_std", "resample", "rescale_factor")


def native_processor(
    tokenizer: PreTrainedTokenizerBase, image_processor: Any, config: Any, conversation: Conversation, pad: bool
) -> Any:
    """The processor of transformers, which makes of images and texts what LLaVA's functions do.

    Args:
        tokenizer: LLaVA's; it is changed.
        image_processor: of the vision tower.
        config: transformers' ``LlavaConfig`` or ``LlavaNextConfig``.
        conversation: template for the chat template.
        pad: LLaVA-1.5: images are padded to squares (else as the image processor has it).
    """
    edge = processor_resolution(image_processor)
    is_next = not isinstance(config, LlavaConfig)
    if is_next or pad:
        pixels: dict[str, Any] = {name: getattr(image_processor, name) for name in _PIXELS}
        pixels |= {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}, "do_pad": True}
        if is_next:
            image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **pixels)
        else:
            image_processor = LlavaImageProcessorPil(**pixels)
    return (LlavaNextProcessor if is_next else LlavaProcessor)(
        image_processor=image_processor,
        tokenizer=_native_tokenizer(tokenizer),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        chat_template=chat_template(conversation),
    )


def original_image_processor(path: str | Path, vision: Any) -> Any:
    """The image processor of LLaVA's vision tower, with the pixel values of a transformers checkpoint's.

    Args:
        path: the checkpoint's folder.
        vision: the encoder's config.

    Raises:
        OSError: the checkpoint has none.
    """
    values, _ = BaseImageProcessor.get_image_processor_dict(str(path))
    own = {name: values[name] for name in _PIXELS if name in values}
    edge = vision.image_size
    if vision.model_type == "clip_vision_model":
        own |= {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        return CLIPImageProcessorPil(**own)
    return SiglipImageProcessorPil(size={"height": edge, "width": edge}, **own)


def _native_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A tokenizer with ``<image>`` and a token for padding, whose ids are those of ``tokenizer_image_token``.

    Not the model's own class, which transformers builds anew from the vocabulary when it loads it
    (:mod:`llava.model.tokenizer` says what that loses).
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    added = [DEFAULT_IMAGE_TOKEN]
    if special["pad_token"] in (None, special["unk_token"], special["eos_token"]):
        special["pad_token"] = _PAD_TOKEN
        added.append(_PAD_TOKEN)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    backend = tokenizer.backend_tokenizer
    if getattr(tokenizer, "legacy", None) is False:
        # LLaVA tokenizes what follows an image apart, so it has a prefix space; what follows other special tokens has
        # none. The two look different in all templates: only the first starts with a new line or a space.
        start = [normalizers.Replace(Regex(rf"\A{mark}"), f" {mark}") for mark in ("\n", _SPACE)]
        backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", _SPACE), *start])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",  # for generation
        clean_up_tokenization_spaces=False,
        **special,
    )


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """``tokenizer_config.json`` of a tokenizer, as it would be saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    return {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}


def check_added_tokens(tokenizer: PreTrainedTokenizerBase, image_token: int, path: str) -> None:
    """Check that nothing but a token for padding was added after ``<image>``: LLaVA's layout has neither.

    Raises:
        ValueError: there is more; the message lists it.
    """
    after = {token for token, index in tokenizer.get_added_vocab().items() if index > image_token}
    if others := sorted(after - {tokenizer.pad_token}):
        raise ValueError(
            f"{path} has no counterpart in LLaVA's layout: its vocabulary has {others} after <image> ({image_token}), "
            "which would be lost"
        )


def save_original_tokenizer(
    source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, image_token: int, settings: dict[str, Any] | None
) -> None:
    """Save a transformers checkpoint's tokenizer without ``<image>`` and the tokens that were added after it.

    Args:
        source: the checkpoint's folder.
        folder: where it goes.
        tokenizer: the checkpoint's.
        image_token: id of ``<image>``.
        settings: of the original tokenizer, from :func:`tokenizer_settings`; None takes the checkpoint's, without those
            that name the tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    dropped = {token["content"] for token in state["added_tokens"] if token["id"] >= image_token}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in dropped]
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    if settings is None:
        settings = tokenizer_settings(tokenizer)
        for name in ("added_tokens_decoder", "extra_special_tokens", "chat_template", "processor_class", "image_token"):
            settings.pop(name, None)
        if settings.get("pad_token") in dropped:  # LLaVA's own choice, where there is one
            settings["pad_token"] = settings.get("unk_token") or settings.get("eos_token")
        settings["padding_side"] = "right"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    copy_sentencepiece(source, folder)


def copy_sentencepiece(source: Path, folder: Path) -> None:
    """Copy ``tokenizer.model``, which older libraries read, where there is one."""
    if (source / "tokenizer.model").is_file():
        shutil.copy(source / "tokenizer.model", folder)


def chat_template(conversation: Conversation) -> str:
    """A conversation's template in Jinja: its prompts, each image as ``<image>`` and a new line before the text.

    What stands between the turns is read off prompts with known texts.
    """
    first, assistant, user = "\x01", "\x02", "\x03"

    def prompt(*texts: str | None) -> str:
        example = conversation.copy()
        for index, text in enumerate(texts):
            example.append_message(example.roles[index % 2], text)
        return example.get_prompt()

    begin, user_end = prompt(first).split(first)
    answered, assistant_end = prompt(first, assistant).split(assistant)
    assistant_begin = answered.removeprefix(begin + first + user_end)
    user_begin = prompt(first, assistant, user).split(assistant)[1].split(user)[0].removeprefix(assistant_end)
    asking = prompt(first, None).removeprefix(begin + first + user_end)
    content = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% endif %}"
    )

    def text(value: str) -> str:
        return "{{ " + json.dumps(value, ensure_ascii=False) + " }}"

    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{% if loop.first %}}{text(begin)}{{% else %}}{text(user_begin)}{{% endif %}}{content}{text(user_end)}"
        "{% elif message['role'] == 'assistant' %}"
        f"{text(assistant_begin)}{content}{text(assistant_end)}"
        "{% else %}{{ raise_exception('this template has its own system text: give user and assistant turns only') }}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{text(asking)}{{% endif %}}"
    )
