"""What of a conversation is learnt: its text in a template, as token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, new_conversation

Turns = Sequence[dict[str, str]]

_SPEAKERS = ("human", "gpt")


def usable_turns(record: dict[str, Any], version: str) -> Turns:
    """The turns of a record that are learnt from: human, gpt, human, gpt, ….

    As in LLaVA, a first turn that is not the human's is dropped.

    Args:
        record: with ``conversations`` and, unless it is text only, ``image``.
        version: key of ``conv_templates``.

    Raises:
        ValueError: the turns do not alternate, an answer is missing or empty, or an image and ``<image>`` do not come
            together: one image, named in one question. (In a record without an image, ``<image>`` is text like any.)
    """
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise ValueError("its conversations are not a list of {'from': 'human' or 'gpt', 'value': text}")
    if turns and turns[0]["from"] != _SPEAKERS[0]:
        turns = turns[1:]
    _check_speakers(turns)
    if empty := [number for number, turn in enumerate(turns[1::2], start=1) if not turn["value"]]:
        raise ValueError(f"answer {empty[0]} is empty: there is nothing to learn")
    if version == "plain" and len(turns) != 2:
        raise ValueError(f"it has {len(turns)} turns: with version plain a record is one question and one caption")
    if "image" in record:
        if not isinstance(record["image"], str):
            raise ValueError(f"its image is {record['image']!r}: it must be the name of one file")
        named = [turn["from"] for turn in turns if DEFAULT_IMAGE_TOKEN in turn["value"]]
        if named != [_SPEAKERS[0]]:
            raise ValueError(
                f"it has an image, but {len(named)} turns with <image> ({', '.join(named) or 'none'}): one question, "
                "and nothing else, must name it"
            )
    return turns


def _check_speakers(turns: Turns) -> None:
    speakers = [turn["from"] for turn in turns]
    if len(turns) < 2 or len(turns) % 2 or speakers != list(_SPEAKERS) * (len(turns) // 2):
        raise ValueError(f"the turns are from {', '.join(speakers) or 'nobody'}; they must be human, gpt, human, gpt …")


def render(turns: Turns, version: str, has_image: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """The text that a conversation is trained on, and where in it the model speaks.

    Args:
        turns: ``{"from": "human" or "gpt", "value": text}``, in turn, the human first.
        version: key of ``conv_templates``; ``"plain"`` drops the human's text except ``<image>``, as LLaVA's
            pretraining does.
        has_image: ``<image>`` stands for one; else it is text.

    Returns:
        The prompt, and (start, end) of each stretch of characters to learn: answers with the separator that ends them.

    Raises:
        ValueError: the turns are not human, gpt, human, gpt, …
    """
    _check_speakers(turns)
    conversation = new_conversation(version)
    if conversation.sep_style is SeparatorStyle.PLAIN:
        image = DEFAULT_IMAGE_TOKEN if has_image and DEFAULT_IMAGE_TOKEN in turns[0]["value"] else ""
        prompt = image + turns[1]["value"] + conversation.sep
        return prompt, [(len(image), len(prompt))]
    spans = []
    for index in range(0, len(turns), 2):
        question = turns[index]["value"]
        conversation.append_message(conversation.roles[0], _image_first(question) if has_image else question)
        conversation.append_message(conversation.roles[1], None)
        start = len(conversation.get_prompt())
        conversation.messages[-1][1] = turns[index + 1]["value"]
        spans.append((start, len(conversation.get_prompt())))
    return conversation.get_prompt(), spans


def _image_first(text: str) -> str:
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()


def tokenize(
    prompt: str, spans: Sequence[tuple[int, int]], tokenizer: Any, has_image: bool = True
) -> tuple[Tensor, Tensor]:
    """Token ids of a prompt, with the image sentinel, and its labels.

    Args:
        prompt: from :func:`render`, as are the spans.
        spans: stretches of characters to learn.
        tokenizer: a fast tokenizer (it must know where its tokens come from).
        has_image: as for :func:`render`.

    Returns:
        input_ids (L,) and labels (L,): the same where a token reaches into a span, else ignored.
    """
    ids: list[int] = []
    labels: list[int] = []
    offset = 0
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN) if has_image else [prompt]):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            offset += len(DEFAULT_IMAGE_TOKEN)
        encoded = tokenizer(chunk, return_offsets_mapping=True)
        for position, (token, (start, end)) in enumerate(
            zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            if position == 0 and token == tokenizer.bos_token_id and number:
                continue  # it stays once, at the front
            ids.append(token)
            # Tokens without characters (the first of all) are never learnt; the blank before an answer belongs to its
            # first token, so what counts is where a token ends.
            learn = end > start and any(first < offset + end <= last for first, last in spans)
            labels.append(token if learn else IGNORE_INDEX)
        offset += len(chunk)
    return torch.tensor(ids), torch.tensor(labels)


def tokenize_apart(
    conversation: Turns, version: str, tokenizer: Any, has_image: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A conversation as prompts of one question each, which are written after one another but for their common start.

    Args:
        conversation: as for :func:`render`; an image is shown with every question.
        version: key of ``conv_templates``.
        tokenizer: a fast tokenizer.
        has_image: as for :func:`render`.

    Returns:
        input_ids (L,), labels (L,) and turns (L,): 0 in the common start (system prompt and image), then 1, 2, ….
    """
    has_image = has_image and any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in conversation)
    alone = []
    _check_speakers(conversation)
    for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
        text = question["value"].replace(DEFAULT_IMAGE_TOKEN, "" if has_image else DEFAULT_IMAGE_TOKEN).strip()
        asked = {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{text}" if has_image else text}
        alone.append(tokenize(*render([asked, answer], version, has_image), tokenizer, has_image))
    start = 0
    while all(start < len(ids) and ids[start] == alone[0][0][start] for ids, _ in alone):
        start += 1
    parts = [tuple(part[:start] for part in alone[0]), *(tuple(part[start:] for part in one) for one in alone)]
    turns = [torch.full((len(ids),), number) for number, (ids, _) in enumerate(parts)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts]), torch.cat(turns)


def attention_apart(turns: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What keeps the turns of :func:`tokenize_apart` from seeing each other.

    Args:
        turns: (B, L) numbers of turns, -1 for padding on the right.
        positions: (B, L) of the tokens if all saw each other; None: one after the other.

    Returns:
        An additive mask (B, 1, L, L), where a token sees what came before it in the common start and in its own turn,
        and positions (B, L), which every turn counts on from the end of the common start.
    """
    same = turns[:, :, None] == turns[:, None, :]
    visible = (same | (turns[:, None, :] == 0)).tril()
    mask = torch.zeros(visible.shape, device=turns.device).masked_fill(~visible, torch.finfo(torch.bfloat16).min)
    index = torch.arange(turns.shape[1], device=turns.device).expand_as(turns)
    first = torch.where(same, index[:, None, :], turns.shape[1]).amin(dim=2)  # of each token's turn
    common = (turns == 0).sum(dim=1, keepdim=True)
    if positions is None:
        positions = index
    ahead = positions.gather(1, first) - positions.gather(1, common.clamp(max=turns.shape[1] - 1))
    return mask[:, None], torch.where(turns > 0, positions - ahead, positions)
