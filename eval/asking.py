"""Putting questions to a model: prompts, images as their batch comes, greedy answers, and the time of each phase."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import new_conversation
from llava.mm_utils import tokenizer_image_token
from llava.model.transformers_llava import generating_module
from llava.screen import progress
from llava.serve.chat import with_image_tokens
from llava.video import process_visuals

from .answers import Given, Part
from .benchmark import Benchmark
from .cost import measure_cost
from .methods import Run, attached
from .records import Question, Visual

_PIXEL_BYTES = 1 << 29  # of prepared images that are kept for the next run


@dataclass(frozen=True)
class World:
    """The processes that share the work, as torchrun or accelerate have started them."""

    rank: int
    size: int

    def wait(self) -> None:
        """Wait for all processes. If one fails, its launcher stops the others."""
        if self.size > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def world() -> World:
    """The processes that this one is of."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Prompt:
    """A question, ready for the model but for its images.

    Attributes:
        place: of the question in its benchmark.
        question: it.
        ids: (L,) token ids with the image sentinel.
    """

    place: int
    question: Question
    ids: Tensor

    @property
    def text_tokens(self) -> int:
        """Tokens that are not an image's."""
        return int((self.ids != IMAGE_TOKEN_INDEX).sum())


def prompt_of(question: Question, config: Any, conv_mode: str) -> str:
    """The whole prompt for a question, in a template."""
    conversation = new_conversation(conv_mode)
    counts = [visual.frames or 1 for visual in question.visuals]
    conversation.append_message(conversation.roles[0], with_image_tokens(question.text, counts, config))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def prepare(questions: Sequence[Question], tokenizer: Any, config: Any, conv_mode: str) -> list[Prompt]:
    """Prompts of all questions, in the order in which they are asked: by length, those about one image together."""
    prompts = [
        Prompt(place, q, tokenizer_image_token(prompt_of(q, config, conv_mode), tokenizer, return_tensors="pt"))
        for place, q in enumerate(questions)
    ]
    groups: dict[tuple[str, ...], list[Prompt]] = {}
    for number, prompt in enumerate(prompts):  # texts without an image are groups of their own
        key = tuple(visual.key for visual in prompt.question.visuals) or (f"no image {number}",)
        groups.setdefault(key, []).append(prompt)
    in_order = sorted(groups.values(), key=lambda group: -max(len(prompt.ids) for prompt in group))
    return [prompt for group in in_order for prompt in sorted(group, key=lambda prompt: -len(prompt.ids))]


class Pixels:
    """Prepared images: opened when their batch comes, and kept for the next run as long as there is room.

    Args:
        image_processor: the tower's.
        model: what they are for: it says whether it takes videos, or their frames as images.
        skip_bad: an image that cannot be read is not an error, but the reason why its questions are not asked.
    """

    def __init__(self, image_processor: Any, model: Any, skip_bad: bool) -> None:
        self._processor = image_processor
        self._model = model
        self._skip_bad = skip_bad
        self._kept: OrderedDict[str, Loaded] = OrderedDict()
        self._bytes = 0

    def of(self, batch: Sequence[Prompt]) -> dict[str, Loaded]:
        """What a batch's visuals look like to the model, by their keys.

        Raises:
            ValueError: one cannot be read, and ``skip_bad`` is not set.
        """
        visuals = {visual.key: visual for prompt in batch for visual in prompt.question.visuals}
        return {key: self._get(visual) for key, visual in visuals.items()}

    def _get(self, visual: Visual) -> Loaded:
        if visual.key in self._kept:
            return self._kept[visual.key]
        try:
            images = visual.open()
        except (ValueError, OSError) as error:
            if not self._skip_bad:
                raise ValueError(
                    f"{error} (what is answered is kept; --skip-bad counts such questions as wrong instead)"
                ) from error
            return Loaded((), (), str(error))
        tensors, sizes = process_visuals(images if visual.frames is None else [images], self._processor, self._model)
        loaded = Loaded(tuple(tensors), tuple(sizes))
        self._kept[visual.key] = loaded
        self._bytes += loaded.bytes
        while self._bytes > _PIXEL_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].bytes
        return loaded


@dataclass(frozen=True)
class Loaded:
    """A visual as the model gets it: a tensor and a (width, height) for each image or video, or why there are none."""

    images: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    error: str | None = None

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return sum(image.nbytes for image in self.images)


@dataclass(frozen=True)
class Asked:
    """A loaded model and what it is asked."""

    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    pixels: Pixels

    def measure(self, given: Mapping[Run, Mapping[int, Given]]) -> dict[str, Any]:
        """What the visual tokens cost; see :func:`eval.cost.measure_cost`."""
        image = None
        for prompt in self.prompts:
            loaded = next(iter(self.pixels.of([prompt]).values()), None)
            if loaded is not None and loaded.images:
                image = loaded.images[0], loaded.sizes[0]
                break
        text_tokens = round(sum(prompt.text_tokens for prompt in self.prompts) / len(self.prompts))
        return measure_cost(self.model, text_tokens, image, given)


def answer_all(asked: Asked, benchmark: Benchmark, parts: Mapping[Run, Part], batch_size: int, own: World) -> None:
    """Answer a process's share of what is not answered yet, and append it to its parts, batch by batch.

    Batches are cut before what is answered is left out, and before they are dealt out: a run that was killed, and one
    of several processes, answer as one that was not. The next batch's images are opened while one is answered.
    """
    prompts = asked.prompts
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)][
        own.rank :: own.size
    ]
    total = sum(map(len, batches)) * len(parts)
    done = sum(prompt.place in part.given for part in parts.values() for batch in batches for prompt in batch)
    with progress(total, "questions", "questions", done, own.rank > 0) as bar, ThreadPoolExecutor(1) as ahead:
        for run, part in parts.items():
            bar.set_description(run.name)
            missing = [batch for batch in batches if any(prompt.place not in part.given for prompt in batch)]
            upcoming: Future[dict[str, Loaded]] | None = None
            with attached(asked.model, run):
                for number, batch in enumerate(missing):
                    pixels = asked.pixels.of(batch) if upcoming is None else upcoming.result()
                    upcoming = None
                    if number + 1 < len(missing):
                        upcoming = ahead.submit(asked.pixels.of, missing[number + 1])
                    new = [prompt.place not in part.given for prompt in batch]
                    found = answer(asked.model, asked.tokenizer, batch, pixels, benchmark.max_new_tokens)
                    part.append([one for one, wanted in zip(found, new, strict=True) if wanted])
                    bar.update(sum(new))


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, batch: Sequence[Prompt], pixels: Mapping[str, Loaded], max_new_tokens: int
) -> list[Given]:
    """Greedy answers to a batch of prompts; an empty one, with the reason, where an image could not be read."""
    errors = {
        prompt.place: next((e for v in prompt.question.visuals if (e := pixels[v.key].error)), None) for prompt in batch
    }
    asked = [prompt for prompt in batch if errors[prompt.place] is None]
    answers = {prompt.place: Given(prompt.place, "", 0, error=errors[prompt.place]) for prompt in batch}
    if asked:
        device = model.get_input_embeddings().weight.device
        ids = [prompt.ids for prompt in asked]
        pad = model.generation_config.pad_token_id
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        visuals = [pixels[visual.key] for prompt in asked for visual in prompt.question.visuals]
        with _watched(model) as watch:
            output = model.generate(
                pad_sequence(ids, batch_first=True, padding_value=pad or 0, padding_side="left").to(device),
                attention_mask=mask.to(device),
                images=[image for visual in visuals for image in visual.images] or None,
                image_sizes=[size for visual in visuals for size in visual.sizes] or None,
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        share = tuple(seconds / len(asked) for seconds in watch.seconds)
        for prompt, text, length in zip(asked, texts, watch.lengths, strict=True):
            answers[prompt.place] = Given(prompt.place, text.strip(), length - prompt.text_tokens, share)
    return list(answers.values())


class _Watch:
    """What happens in a call of ``generate``: its prompts' lengths and the seconds of its three phases."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lengths: list[int] = []  # visual tokens included, as the language model gets them
        self._times = [self._now()]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the language model: the first is the prefill."""
        if len(self._times) == 1:
            embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")  # no mask where there is no padding
            self.lengths += [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(dim=1).tolist()
            self._times.append(self._now())

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """After a forward."""
        if len(self._times) == 2:
            self._times.append(self._now())

    def stop(self) -> None:
        """At the end of the call."""
        self._times.append(self._now())

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of vision tower and projector, prefill, and decoding."""
        start, embedded, first, end = self._times
        return embedded - start, first - embedded, end - first


@contextmanager
def _watched(model: Any) -> Iterator[_Watch]:
    watch, module = _Watch(model.device), generating_module(model)
    handles = [
        module.register_forward_pre_hook(watch.before, with_kwargs=True),
        module.register_forward_hook(watch.after),
    ]
    try:
        yield watch
        watch.stop()
    finally:
        for handle in handles:
            handle.remove()
