"""``lmms-eval --model visionzip --model_args pretrained=DIR,keep=0.25,method=scope``: this project's models there.

All models of :mod:`eval.models`, LLaVA's own and transformers' families, with prompts, images and batches as ``python
-m eval`` makes them, so that both harnesses get the same answers. lmms-eval finds it by an entry point; it needs
versions of its own, and thus an environment of its own (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from visionzip import visionzip

from .config import RunConfig
from .models import kind_of
from .models.base import Prompt
from .records import Question, Visual
from .running.setting import config_of


def manifest() -> ModelManifest:
    """What lmms-eval's entry point ``lmms_eval.models`` asks for."""
    return ModelManifest("visionzip", simple_class_path="visionzip_eval.lmms.VisionZip")


class VisionZip(lmms):
    """A model, zipped or not, as lmms-eval asks it.

    Args:
        pretrained: checkpoint: folder or hub name.
        conv_mode: prompt template (default: by the model's name).
        device: where it runs.
        batch_size: questions at a time.
        vanilla: all visual tokens, whatever the checkpoint's own setting is.
        **setting: arguments of :func:`visionzip.visionzip`: ``keep``, ``method``, ``dominant``, ``contextual``, ….
            Without any, the checkpoint's own setting holds, if it has one.

    Raises:
        TypeError: a setting's name or type is wrong.
        ValueError: a setting does not fit the model.
    """

    def __init__(
        self,
        pretrained: str,
        conv_mode: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        vanilla: bool = False,
        **setting: Any,
    ) -> None:
        super().__init__()
        setting = {name: value for name, value in setting.items() if name not in ("max_batch_size",)}
        if vanilla and setting:
            raise ValueError(f"vanilla keeps all visual tokens, but a setting was given too ({setting}): choose one")
        checkpoint = config_of(pretrained)
        config = RunConfig("lmms-eval", pretrained, Path(), conv_mode=conv_mode, device=device)
        self._asked = kind_of(checkpoint).load(config)  # without any method on it
        if setting := setting or (not vanilla and getattr(checkpoint, "visionzip", None)) or {}:
            visionzip(self._asked.inner, **setting)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions greedily, in batches of equal lengths of answers.

        Raises:
            ValueError: a question is about a video, or asks for sampling.
        """
        answers: dict[int, str] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, Question]]] = {}
        for number, request in enumerate(requests):
            context, wanted, doc_to_visual, doc_id, task, split = request.args
            visuals = _visuals(doc_to_visual(self.task_dict[task][split][doc_id]), f"{task}/{split}/{doc_id}")
            question = Question(number, context, visuals)
            groups.setdefault(_limits(wanted), []).append((number, question))
        for (tokens, stops), group in groups.items():
            prompts = self._asked.prepare([question for _, question in group])
            for start in range(0, len(prompts), self._batch_size):
                for prompt, text in self._answer(prompts[start : start + self._batch_size], tokens):
                    answers[int(prompt.question.id)] = _cut(text, stops)
        found = [answers[number] for number in range(len(requests))]
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return found

    def _answer(self, batch: list[Prompt], tokens: int) -> list[tuple[Prompt, str]]:
        given = self._asked.answers_to(batch, self._asked.visuals_of(batch), tokens)
        texts = {each.place: each.text for each in given}
        return [(prompt, texts[prompt.place]) for prompt in batch]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks of this kind.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("visionzip answers tasks of output_type generate_until only, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of this kind.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("visionzip answers tasks of output_type generate_until only, not of several rounds")


def _visuals(given: Any, key: str) -> tuple[Visual, ...]:
    images = given if isinstance(given, list | tuple) else [given] if given is not None else []
    for image in images:
        if not hasattr(image, "convert"):
            raise ValueError(
                f"{key} is about a {type(image).__name__}: only images can be asked about here, not videos"
            )

    def opened(image: Any) -> Any:
        return lambda: [image.convert("RGB")]

    return tuple(Visual(f"{key}/{index}", opened(image)) for index, image in enumerate(images))


def _limits(wanted: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The longest answer, and the texts that end one, of a task's ``generation_kwargs``."""
    if wanted.get("do_sample") or wanted.get("temperature"):
        raise ValueError(f"the task asks for sampling ({wanted}): answers are greedy here, set temperature=0")
    until = wanted.get("until") or ()
    return int(wanted.get("max_new_tokens", 128)), (until,) if isinstance(until, str) else tuple(until)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    for stop in filter(None, stops):
        text = text.split(stop, maxsplit=1)[0]
    return text.strip()
