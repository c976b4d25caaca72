"""Conversation templates: how turns become the prompt that a checkpoint was trained on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN


class SeparatorStyle(Enum):
    """How the turns are joined; see :meth:`Conversation.get_prompt`."""

    TWO = auto()
    MPT = auto()
    CHATML = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A template together with the turns so far, with LLaVA's field names.

    Attributes:
        system: text before the first turn.
        roles: name of the user and of the assistant.
        messages: [role, text] pairs; a text of None (or an empty one) is the answer that the model is to write.
        sep: separator; with ``sep2``, the one after the user's turns.
        sep2: separator after the assistant's turns, and the end of its answers.
    """

    system: str
    roles: tuple[str, str]
    sep_style: SeparatorStyle
    sep: str
    sep2: str | None = None
    version: str = ""
    messages: list[list[str | None]] = field(default_factory=list)

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; None asks the model for it."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent copy: templates are shared, conversations are not."""
        return dataclasses.replace(self, messages=copy.deepcopy(self.messages))

    def get_prompt(self) -> str:
        """The prompt for the turns so far.

        Raises:
            TypeError: a finished assistant turn in the ``plain`` template, which has no separator for it.
        """
        return _RENDER[self.sep_style](self)


def _two(conv: Conversation) -> str:
    ends = (conv.sep, conv.sep2)
    turns = [
        f"{role}:" if not text else f"{role}: {text}{ends[index % 2]}"
        for index, (role, text) in enumerate(conv.messages)
    ]
    return conv.system + conv.sep + "".join(turns)


def _mpt(conv: Conversation) -> str:
    turns = [role if not text else role + text + conv.sep for role, text in conv.messages]
    return conv.system + conv.sep + "".join(turns)


def _chatml(conv: Conversation) -> str:
    turns = [f"{role}\n" if not text else f"{role}\n{text}{conv.sep}\n" for role, text in conv.messages]
    return (f"{conv.system}{conv.sep}\n" if conv.system else "") + "".join(turns)


def _llama_2(conv: Conversation) -> str:
    system = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n" if conv.system else ""
    prompt = ""
    for index, (_, text) in enumerate(conv.messages):
        if not text:
            continue
        if index % 2:
            prompt += f" {text} {conv.sep2}"
        else:
            prompt += f"{conv.sep}[INST] {system if index == 0 else ''}{text} [/INST]"
    return prompt.removeprefix(conv.sep)  # the tokenizer puts the first <s>


def _plain(conv: Conversation) -> str:
    prompt = conv.system
    for index, (_, text) in enumerate(conv.messages):
        if not text:
            continue
        if index % 2 and conv.sep2 is None:
            raise TypeError(
                f"the plain template (pretraining captions) has no separator after an answer, but turn {index + 1} is "
                "one: use a chat template such as 'vicuna_v1'"
            )
        prompt += text + (conv.sep2 if index % 2 else conv.sep)
    return prompt


_RENDER = {
    SeparatorStyle.TWO: _two,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.CHATML: _chatml,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
}

_ASSISTANT = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {who}'s questions."
)

_vicuna_v1 = Conversation(
    system=_ASSISTANT.format(who="user"),
    roles=("USER", "ASSISTANT"),
    version="v1",
    sep_style=SeparatorStyle.TWO,
    sep=" ",
    sep2="</s>",
)

conv_templates: dict[str, Conversation] = {
    "vicuna_v1": _vicuna_v1,
    "v1": _vicuna_v1,
    "llava_v1": dataclasses.replace(_vicuna_v1, system=_ASSISTANT.format(who="human")),
    "llava_llama_2": Conversation(
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        roles=("USER", "ASSISTANT"),
        version="llama_v2",
        sep_style=SeparatorStyle.LLAMA_2,
        sep="<s>",
        sep2="</s>",
    ),
    "mistral_instruct": Conversation(
        system="",
        roles=("USER", "ASSISTANT"),
        version="llama_v2",
        sep_style=SeparatorStyle.LLAMA_2,
        sep="",
        sep2="</s>",
    ),
    "chatml_direct": Conversation(
        system="<|im_start|>system\nAnswer the questions.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        version="mpt",
        sep_style=SeparatorStyle.MPT,
        sep="<|im_end|>",
    ),
    "qwen_1_5": Conversation(
        system="<|im_start|>system\nYou are a helpful assistant.",
        roles=("<|im_start|>user", "<|im_start|>assistant"),
        version="qwen",
        sep_style=SeparatorStyle.CHATML,
        sep="<|im_end|>",
    ),
    "plain": Conversation(
        system="",
        roles=("", ""),
        version="plain",
        sep_style=SeparatorStyle.PLAIN,
        sep="\n",
    ),
}

default_conversation = conv_templates["vicuna_v1"]


def new_conversation(conv_mode: str) -> Conversation:
    """An empty conversation in a template.

    Raises:
        ValueError: ``conv_mode`` is not a key of :data:`conv_templates`.
    """
    if conv_mode not in conv_templates:
        raise ValueError(f"conv_mode={conv_mode!r} is unknown: use one of {', '.join(conv_templates)}")
    return conv_templates[conv_mode].copy()


def conv_mode_for(model_name: str) -> str:
    """The template that LLaVA's own commands use for a checkpoint of this name.

    For LLaVA-1.5 and Video-LLaVA that is ``llava_v1`` ("a curious human"); benchmarks about images name ``vicuna_v1``.

    Args:
        model_name: as :func:`llava.mm_utils.get_model_name_from_path` returns it.

    Returns:
        A key of :data:`conv_templates`.
    """
    name = model_name.lower()
    for part, mode in (
        ("llama-2", "llava_llama_2"),
        ("mistral", "mistral_instruct"),
        ("v1.6-34b", "chatml_direct"),
        ("mgm-34b", "chatml_direct"),
        ("qwen", "qwen_1_5"),
        ("video-llava", "llava_v1"),
        ("v1", "llava_v1"),
    ):
        if part in name:
            return mode
    return "vicuna_v1"


def with_image_tokens(text: str, counts: Sequence[int], config: Any) -> str:
    """A question with one ``<image>`` per image and per frame of a video: where the text has them, else in front.

    Args:
        text: the question.
        counts: for each visual that it is about, 1 or a video's frames; these stand together.
        config: the model's; with ``mm_use_im_start_end`` each is put between start and end markers.

    Raises:
        ValueError: the text has ``<image>``, but not as many.
    """
    marker = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        marker = DEFAULT_IM_START_TOKEN + marker + DEFAULT_IM_END_TOKEN
    present = text.count(DEFAULT_IMAGE_TOKEN)
    if present == 0:
        groups = [marker * count for count in counts]
        if groups and getattr(config, "mm_video_tower", None):  # Video-LLaVA has one line break, behind all of them
            groups = ["".join(groups)]
        return "".join(f"{group}\n" for group in groups) + text
    if present != sum(counts):
        raise ValueError(
            f"the text has {present} {DEFAULT_IMAGE_TOKEN} but {sum(counts)} images were given: give one each (a video "
            "takes one for each of its frames)"
        )
    return text.replace(DEFAULT_IMAGE_TOKEN, marker)
