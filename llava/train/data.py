"""LLaVA's training data: a json list of conversations about images.

A record has ``id``, ``image`` (a file; without it the record is text only) and ``conversations``: turns ``{"from":
"human", "value": "<image> …"}`` and ``{"from": "gpt", "value": …}``. Images are read as LLaVA's training reads them: as
they are stored, EXIF's orientation ignored and transparency dropped (:mod:`llava.images`).
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import new_conversation
from llava.images import existing_file, load_image, shorten
from llava.mm_utils import process_images, processor_resolution
from llava.storage.files import writing
from llava.train.labels import render, tokenize, tokenize_apart, usable_turns
from llava.train.token_store import CachedImages, DamagedCacheError

logger = logging.getLogger(__name__)

Record = dict[str, Any]

UNUSABLE = (ValueError, OSError, KeyError)  # what damaged images and records lead to


@dataclass(frozen=True)
class Records:
    """What of a json file is trained on.

    Attributes:
        kept: the records.
        left_out: ``{"id", "why"}`` of those that cannot be used.
    """

    kept: list[Record]
    left_out: list[dict[str, Any]]


def read_records(
    data_path: str,
    image_folder: str | None,
    version: str,
    *,
    fraction: float = 1.0,
    seed: int = 42,
    has_tower: bool = True,
    skip_bad: bool = False,
) -> Records:
    """Read a json file in LLaVA's format, draw a sample, and check all of it but the images' content.

    This takes seconds, so that what is wrong with the data is known before a model is loaded.

    Args:
        data_path: the json file.
        image_folder: where the images are.
        version: key of ``conv_templates``.
        fraction: take this share of the records, a uniform sample.
        seed: of the sample.
        has_tower: without a vision tower, records with an image are not taken.
        skip_bad: leave out what cannot be used.

    Raises:
        FileNotFoundError: there is no such json file or folder.
        ValueError: it is not a list of records, some cannot be used (the message names them), none is left, the
            fraction is not in (0, 1], or there is no such template.
    """
    new_conversation(version)
    if not 0 < fraction <= 1:
        raise ValueError(f"data_fraction={fraction} is not in (0, 1]: 0.1 takes a tenth of the records")
    if not Path(data_path).is_file():
        raise FileNotFoundError(f"no training data at {data_path}: data_path names a json file in LLaVA's format")
    try:
        records = json.loads(Path(data_path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{data_path} is no json: {error}") from error
    is_list = isinstance(records, list) and bool(records)
    if not is_list or not all(isinstance(record, dict) and "conversations" in record for record in records):
        raise ValueError(f"{data_path} is not a list of records with 'conversations' (LLaVA's format)")
    if fraction < 1:
        number = max(1, round(len(records) * fraction))
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:number]
        records = [records[index] for index in sorted(chosen.tolist())]
    if not has_tower:
        records = [record for record in records if "image" not in record]
        if not records:
            raise ValueError(f"{data_path} has no record without an image to train a model without a tower on")
    elif any("image" in record for record in records) and not (image_folder and Path(image_folder).is_dir()):
        raise FileNotFoundError(f"image_folder={image_folder!r} is no folder, but {data_path} has images")
    return _check(records, data_path, Path(image_folder or ""), version, skip_bad)


def _check(records: list[Record], data_path: str, folder: Path, version: str, skip_bad: bool) -> Records:
    kept, left_out, named = [], [], []
    for index, record in enumerate(records):
        try:
            turns = usable_turns(record, version)
            if "image" in record:
                existing_file(folder / record["image"], str(folder / shorten(record["image"])))
        except (ValueError, OSError) as error:
            left_out.append({"id": record.get("id", index), "why": str(error)})
            continue
        if "image" not in record and any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns):
            named.append(record.get("id", index))
        kept.append(record)
    if left_out:
        examples = "; ".join(f"record {bad['id']!r}: {bad['why']}" for bad in left_out[:3])
        problem = f"{len(left_out)} of {len(records)} records of {data_path} cannot be used: {examples}"
        if not skip_bad:
            raise ValueError(f"{problem}. Mend them, or leave them out with skip_bad_samples")
        if not kept:
            raise ValueError(f"{problem}. None is left")
        logger.warning("%s. They are left out", problem)
    if named:
        logger.warning(
            "%d records without an image have %s in their text, such as %r: it is read as text, as LLaVA does",
            len(named),
            DEFAULT_IMAGE_TOKEN,
            named[0],
        )
    return Records(kept, left_out)


class InstructionData(Dataset):
    """Conversations, tokenized when they are asked for.

    Args:
        records: from :func:`read_records`.
        image_folder: where the images are.
        tokenizer: the model's.
        version: key of ``conv_templates``.
        image_processor: the vision tower's; None trains on text alone.
        model_config: says how images are padded.
        apart: the questions of a record do not see each other (:func:`llava.train.labels.tokenize_apart`).
        skipped: file to note records in whose image turns out to be damaged. The next record that can be used stands in
            for such a one, so that batches keep their size and every process takes part in every step. None: error.

    Attributes:
        encoded: the images' visual tokens, if samples are to have these as ``image`` (``EncodedImage``), not pixels.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_folder: str | None,
        tokenizer: Any,
        version: str,
        image_processor: Any,
        model_config: Any,
        apart: bool = False,
        skipped: Path | None = None,
    ) -> None:
        self.records = records
        self.folder = Path(image_folder or "")
        self.tokenizer = tokenizer
        self.version = version
        self.image_processor = image_processor
        self.model_config = model_config
        self.apart = apart
        self.skipped = skipped
        self.encoded: CachedImages | None = None

    def __len__(self) -> int:
        return len(self.records)

    def modality_lengths(self) -> list[int]:
        """Words of each record over all its turns, negative for text only: what LLaVA groups records by."""
        return [
            sum(len(turn["value"].split()) for turn in record["conversations"]) * (1 if "image" in record else -1)
            for record in self.records
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``record``, its id, and ``input_ids``, ``labels``, ``turns`` if they are apart (L,).

        With a tower also ``image``, (3, h, w) or (tiles, 3, h, w), and ``image_size``, (width, height) of the original.

        Raises:
            ValueError: the record cannot be used; the message names it.
        """
        if self.skipped is None:
            return self._sample(index)
        for place in itertools.chain(range(index, len(self)), range(index)):
            try:
                return self._sample(place)
            except ValueError as error:
                logger.warning("%s; the next one stands in for it", error)
                note = {"id": self.records[place].get("id", place), "why": str(error)}
                safe = "Checkpoints are whole: the same command goes on at the last one"
                with writing(self.skipped, safe), self.skipped.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(note) + "\n")  # one write: processes do not tear each other's lines
        raise ValueError("not one of the records can be used")

    def _sample(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        try:
            sample = {"record": record.get("id", index), **self.text(index)}
            if self.image_processor is None:
                return sample
            if self.encoded is not None:
                sample["image"], sample["image_size"] = self.encoded.sample(record.get("image"))
            elif "image" in record:
                image = load_image(self.folder / record["image"], as_stored=True)
                sample["image"] = process_images([image], self.image_processor, self.model_config)[0]
                sample["image_size"] = image.size
            else:  # every process must use the projector in every step, or its gradients could not be exchanged
                edge = processor_resolution(self.image_processor)
                sample["image"] = torch.zeros(3, edge, edge)
                sample["image_size"] = (edge, edge)
        except DamagedCacheError:
            raise
        except UNUSABLE as error:
            raise ValueError(f"record {record.get('id', index)!r} cannot be used: {error}") from error
        return sample

    def text(self, index: int) -> dict[str, Any]:
        """A sample without its image: ``input_ids``, ``labels``, ``turns`` if they are apart (L,)."""
        record = self.records[index]
        turns, has_image = usable_turns(record, self.version), "image" in record
        if self.apart:
            parts = tokenize_apart(turns, self.version, self.tokenizer, has_image)
            return dict(zip(("input_ids", "labels", "turns"), parts, strict=True))
        parts = tokenize(*render(turns, self.version, has_image), self.tokenizer, has_image)
        return dict(zip(("input_ids", "labels"), parts, strict=True))


class Collator:
    """Stacks samples: ids padded on the right, labels of padding ignored, images in a list."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.max_length = max_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``labels``, ``attention_mask``, maybe ``turns`` (B, L); lists ``images``, ``image_sizes``.

        Also the samples' ``records``, if they have names.
        """

        def stack(name: str, padding: int) -> Tensor:
            rows = [sample[name][: self.max_length] for sample in samples]
            return pad_sequence(rows, batch_first=True, padding_value=padding)

        ones = [torch.ones_like(sample["input_ids"][: self.max_length]) for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": stack("input_ids", self.pad),
            "labels": stack("labels", IGNORE_INDEX),
            "attention_mask": pad_sequence(ones, batch_first=True),
        }
        if "record" in samples[0]:
            batch["records"] = [sample["record"] for sample in samples]
        if "turns" in samples[0]:
            batch["turns"] = stack("turns", -1)
        if "image" in samples[0]:
            batch["images"] = [sample["image"] for sample in samples]
            batch["image_sizes"] = [sample["image_size"] for sample in samples]
        return batch
