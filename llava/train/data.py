"""LLaVA's training data: a json list of conversations about images, as token ids and labels.

A record has ``id``, ``image`` (a file; without it the record is text only) and ``conversations``: turns ``{"from":
"human", "value": "<image> …"}`` and ``{"from": "gpt", "value": …}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, new_conversation
from llava.mm_utils import load_image, process_images, processor_resolution

_SPEAKERS = ("human", "gpt")


def render(turns: Sequence[dict[str, str]], version: str) -> tuple[str, list[tuple[int, int]]]:
    """The text that a conversation is trained on, and where in it the model speaks.

    Args:
        turns: ``{"from": "human" or "gpt", "value": text}``, in turn, the human first.
        version: key of ``conv_templates``; ``"plain"`` drops the human's text except ``<image>``, as LLaVA's
            pretraining does.

    Returns:
        The prompt, and (start, end) of each stretch of characters to learn: answers with the separator that ends them.

    Raises:
        ValueError: the turns are not human, gpt, human, gpt, …
    """
    speakers = [turn["from"] for turn in turns]
    if len(turns) < 2 or len(turns) % 2 or speakers != list(_SPEAKERS) * (len(turns) // 2):
        raise ValueError(f"the turns are from {', '.join(speakers) or 'nobody'}; they must be human, gpt, human, gpt …")
    conversation = new_conversation(version)
    if conversation.sep_style is SeparatorStyle.PLAIN:
        image = DEFAULT_IMAGE_TOKEN if DEFAULT_IMAGE_TOKEN in turns[0]["value"] else ""
        prompt = image + turns[1]["value"] + conversation.sep
        return prompt, [(len(image), len(prompt))]
    spans = []
    for index in range(0, len(turns), 2):
        conversation.append_message(conversation.roles[0], _image_first(turns[index]["value"]))
        conversation.append_message(conversation.roles[1], None)
        start = len(conversation.get_prompt())
        conversation.messages[-1][1] = turns[index + 1]["value"]
        spans.append((start, len(conversation.get_prompt())))
    return conversation.get_prompt(), spans


def _image_first(text: str) -> str:
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()


def tokenize(prompt: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of a prompt, with the image sentinel, and its labels.

    Args:
        prompt: from :func:`render`, as are the spans.
        spans: stretches of characters to learn.
        tokenizer: a fast tokenizer (it must know where its tokens come from).

    Returns:
        input_ids (L,) and labels (L,): the same where a token reaches into a span, else ignored.
    """
    ids: list[int] = []
    labels: list[int] = []
    offset = 0
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
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
    conversation: Sequence[dict[str, str]], version: str, tokenizer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """A conversation as prompts of one question each, which are written after one another but for their common start.

    Args:
        conversation: as for :func:`render`; an image is shown with every question.
        version: key of ``conv_templates``.
        tokenizer: a fast tokenizer.

    Returns:
        input_ids (L,), labels (L,) and turns (L,): 0 in the common start (system prompt and image), then 1, 2, ….
    """
    has_image = any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in conversation)
    alone = []
    render(conversation, version)  # checks the speakers
    for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
        text = question["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        asked = {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{text}" if has_image else text}
        alone.append(tokenize(*render([asked, answer], version), tokenizer))
    start = 0
    while all(start < len(ids) and ids[start] == alone[0][0][start] for ids, _ in alone):
        start += 1
    parts = [tuple(part[:start] for part in alone[0]), *(tuple(part[start:] for part in one) for one in alone)]
    turns = [torch.full((len(ids),), number) for number, (ids, _) in enumerate(parts)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts]), torch.cat(turns)


def attention_apart(turns: Tensor) -> tuple[Tensor, Tensor]:
    """What keeps the turns of :func:`tokenize_apart` from seeing each other.

    Args:
        turns: (B, L) numbers of turns, -1 for padding on the right.

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
    return mask[:, None], torch.where(turns > 0, index - first + common, index)


class InstructionData(Dataset):
    """Conversations of a json file, tokenized when they are asked for.

    Args:
        data_path: the json file.
        image_folder: where the images are.
        tokenizer: the model's.
        version: key of ``conv_templates``.
        image_processor: the vision tower's; None trains on text alone.
        model_config: says how images are padded.
        fraction: learn from this share of the records, a uniform sample.
        seed: of the sample.
        apart: the questions of a record do not see each other (:func:`tokenize_apart`).

    Raises:
        FileNotFoundError: there is no such json file or folder.
        ValueError: it is not a list of records, none is left to train on, or the fraction is not in (0, 1].
    """

    def __init__(
        self,
        data_path: str,
        image_folder: str | None,
        tokenizer: Any,
        version: str,
        image_processor: Any,
        model_config: Any,
        fraction: float = 1.0,
        seed: int = 42,
        apart: bool = False,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"data_fraction={fraction} is not in (0, 1]: 0.1 takes a tenth of the records")
        if not Path(data_path).is_file():
            raise FileNotFoundError(f"no training data at {data_path}: data_path names a json file in LLaVA's format")
        try:
            records = json.loads(Path(data_path).read_text())
        except ValueError as error:
            raise ValueError(f"{data_path} is no json: {error}") from error
        is_list = isinstance(records, list) and bool(records)
        if not is_list or not all(isinstance(record, dict) and "conversations" in record for record in records):
            raise ValueError(f"{data_path} is not a list of records with 'conversations' (LLaVA's format)")
        if fraction < 1:
            number = max(1, round(len(records) * fraction))
            chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:number]
            records = [records[index] for index in sorted(chosen.tolist())]
        if image_processor is None:
            records = [record for record in records if "image" not in record]
            if not records:
                raise ValueError(f"{data_path} has no record without an image to train a model without a tower on")
        elif any("image" in record for record in records) and not (image_folder and Path(image_folder).is_dir()):
            raise FileNotFoundError(f"image_folder={image_folder!r} is no folder, but {data_path} has images")
        self.records = records
        self.folder = Path(image_folder or "")
        self.tokenizer = tokenizer
        self.version = version
        self.image_processor = image_processor
        self.model_config = model_config
        self.apart = apart

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``turns`` if they are apart (L,); with a tower ``image``: (3, h, w) or tiles.

        Raises:
            ValueError: the record cannot be used; the message names it.
        """
        record = self.records[index]
        try:
            if self.apart:
                names = ("input_ids", "labels", "turns")
                parts = tokenize_apart(record["conversations"], self.version, self.tokenizer)
            else:
                names = ("input_ids", "labels")
                parts = tokenize(*render(record["conversations"], self.version), self.tokenizer)
            sample = dict(zip(names, parts, strict=True))
            if self.image_processor is None:
                return sample
            if "image" in record:
                image = load_image(self.folder / record["image"])
                sample["image"] = process_images([image], self.image_processor, self.model_config)[0]
            else:  # every process must use the projector in every step, or its gradients could not be exchanged
                edge = processor_resolution(self.image_processor)
                sample["image"] = torch.zeros(3, edge, edge)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"record {record.get('id', index)!r} cannot be used: {error}") from error
        return sample


class Collator:
    """Stacks samples: ids padded on the right, labels of padding ignored, images in a list."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.max_length = max_length

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """``input_ids``, ``labels``, ``attention_mask`` and maybe ``turns`` (B, L), and ``images``, a list of B."""

        def stack(name: str, padding: int) -> Tensor:
            rows = [sample[name][: self.max_length] for sample in samples]
            return pad_sequence(rows, batch_first=True, padding_value=padding)

        ones = [torch.ones_like(sample["input_ids"][: self.max_length]) for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": stack("input_ids", self.pad),
            "labels": stack("labels", IGNORE_INDEX),
            "attention_mask": pad_sequence(ones, batch_first=True),
        }
        if "turns" in samples[0]:
            batch["turns"] = stack("turns", -1)
        if "image" in samples[0]:
            batch["images"] = [sample["image"] for sample in samples]
        return batch
