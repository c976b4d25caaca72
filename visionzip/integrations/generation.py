"""``generate`` of a zipped model: short prompts inside, the user's own prompt outside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionzip.integrations.huggingface import (
    NO_IDS,
    Zipped,
    cached_length,
    has_pixels,
    mask_misfit,
    pad_token,
    pixel_names,
    renamed,
    visuals,
)
from visionzip.integrations.placeholders import Edit, find_runs, shorten

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


@torch.no_grad()
def generate(
    model: nn.Module,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    **kwargs: Any,
) -> Any:
    """``generate`` of transformers, with all its arguments, on prompts whose runs of placeholders are shortened once.

    Rows are padded on the left inside, whichever side the user's padding is on, so that each answers as it would
    alone. Everything that shows the prompt shows the user's own: the returned sequences, a streamer, logits
    processors, stopping criteria and prefix functions; ``max_length`` and ``min_length`` count it.

    Args:
        model: the zipped model.
        inputs: (B, L) prompts as the stock processor writes them; also as ``input_ids``.
        generation_config: as in transformers.
        logits_processor: as in transformers.
        stopping_criteria: as in transformers.
        prefix_allowed_tokens_fn: as in transformers.
        **kwargs: transformers' other arguments, and the model's. With ``past_key_values``, a prompt as long as its
            ``attention_mask`` is the whole conversation with all its images, as in transformers.

    Returns:
        What transformers' own returns, with the user's prompts in front of the answers.

    Raises:
        ValueError: prompts and images do not fit together.
    """
    zipped: Zipped = model._visionzip
    own = {
        "generation_config": generation_config,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
    }
    stock = type(model).generate
    prompt = kwargs.get("input_ids") if inputs is None else inputs
    if kwargs.get("inputs_embeds") is not None and has_pixels(zipped.family, kwargs):
        raise ValueError(NO_IDS)
    encoded = kwargs.get("inputs_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None
    if prompt is None or encoded:
        return stock(model, inputs, **own, **kwargs)
    kwargs = renamed(zipped.family, kwargs) | {"input_ids": prompt}
    if misfit := mask_misfit(kwargs):
        raise ValueError(misfit)
    found = visuals(zipped, model.model, kwargs)
    if not any(visual.runs for visual in found):
        return stock(model, **own, **kwargs)

    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _infer_mask(prompt, model, generation_config, kwargs)
    mask = kwargs["attention_mask"]
    short = shorten(kwargs, find_runs(prompt, found), pad_token(model), side="left")
    kwargs |= short.arguments
    _skip_cached(zipped, model, kwargs, short.edits, mask)
    length = kwargs["input_ids"].shape[1]
    own["generation_config"] = _count_users_prompt(kwargs, model, generation_config, prompt.shape[1] - length)

    def shown(ids: Tensor) -> Tensor:
        return _with_prompt(prompt, ids, length)

    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], shown)
    if logits_processor is not None:
        own["logits_processor"] = [_Shown(each, shown) for each in logits_processor]
    if stopping_criteria is not None:
        own["stopping_criteria"] = [_Shown(each, shown) for each in stopping_criteria]
    if prefix_allowed_tokens_fn is not None:
        own["prefix_allowed_tokens_fn"] = lambda row, ids: prefix_allowed_tokens_fn(
            row, torch.cat([prompt[row].to(ids.device), ids[length:]])
        )
    result = stock(model, **own, **kwargs)
    if isinstance(result, Tensor):
        return shown(result)
    result.sequences = shown(result.sequences)
    return result


def _with_prompt(prompt: Tensor, ids: Tensor, length: int) -> Tensor:
    """Sequences (B * n, length + new) with the user's prompts (B, L) in the place of the short ones."""
    users = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), dim=0)
    return torch.cat([users, ids[:, length:]], dim=1)


def _setting(name: str, model: nn.Module, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
    """A generation setting from where transformers takes it: the arguments, the given config, the model's."""
    places = (kwargs.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in places if value is not None), None)


def _infer_mask(
    prompt: Tensor, model: nn.Module, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> Tensor:
    """The mask that transformers infers: padding by its id, unless that also ends answers."""
    pad = _setting("pad_token_id", model, generation_config, kwargs)
    end = _setting("eos_token_id", model, generation_config, kwargs)
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    return torch.ones_like(prompt) if pad is None or pad in ends else (prompt != pad).long()


def _count_users_prompt(
    kwargs: dict[str, Any], model: nn.Module, generation_config: GenerationConfig | None, dropped: int
) -> GenerationConfig | None:
    """The given config or else ``kwargs``, with lengths for prompts that are shorter by ``dropped`` tokens."""
    generation_config = copy.deepcopy(generation_config)
    for name, more in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = _setting(name, model, generation_config, kwargs)
        if length and _setting(more, model, generation_config, kwargs) is None:
            length = max(length - dropped, 0)
            if generation_config is None or kwargs.get(name) is not None:
                kwargs[name] = length
            else:  # transformers wants one or the other
                setattr(generation_config, name, length)
    return generation_config


def _check_padding(mask: Tensor) -> None:
    """Refuse, with a cache of earlier turns, padding between tokens of a prompt.

    The cache has the prompts padded on the left, whichever side the padding was on in the first turn.

    Raises:
        ValueError: there is such padding. Not where other rows are padded on the left, as then all were.
    """
    gaps = (mask[:, 1:] > mask[:, :-1]).any(dim=1)
    if mask[:, 0].all() and gaps.any():
        raise ValueError(
            f"attention_mask has padding inside prompt {int(gaps.nonzero()[0])}: with past_key_values, prompts must be "
            "padded on the left, and behind an answer that ended early the mask must be 1. Or leave past_key_values out"
        )


def _skip_cached(
    zipped: Zipped, model: nn.Module, kwargs: dict[str, Any], edits: list[list[Edit]], users_mask: Tensor
) -> None:
    """With a cache of earlier turns, keep only the images behind it; transformers skips the tokens before.

    Where there are none behind it, none are encoded.

    Raises:
        ValueError: the cache holds more than the prompts, or ends inside an image, or is padded otherwise.
    """
    past = cached_length(kwargs)
    if past == 0 or kwargs["attention_mask"].shape[1] != kwargs["input_ids"].shape[1]:
        return  # nothing before, or the new tokens alone
    _check_padding(users_mask)
    if past >= kwargs["input_ids"].shape[1]:
        raise ValueError(
            f"past_key_values holds {past} tokens, and the prompt has {kwargs['input_ids'].shape[1]} when zipped, so "
            "nothing in it is new. Give the whole conversation with all its images, or the new tokens alone with an "
            "attention_mask that covers the cache too"
        )
    flat = [edit for row in edits for edit in row]
    if cut := next((edit for edit in flat if edit.start < past < edit.start + edit.short), None):
        raise ValueError(
            f"past_key_values holds {past} tokens, which ends inside {cut.modality} {cut.index}: it is of another "
            "conversation, or of one that was not zipped"
        )
    outputs = {}
    for name, modality in zipped.family.modalities.items():
        own = [edit for edit in flat if edit.modality == name]
        new = sorted(edit.index for edit in own if edit.start >= past)
        if kwargs.get(modality.pixels) is not None and new:
            method = getattr(model.model, f"get_{name}_features")
            names = inspect.signature(method).parameters
            outputs[name] = method(**{key: value for key, value in kwargs.items() if key in names})
            every = outputs[name].pooler_output
            if isinstance(every, Tensor):  # of as many frames of each video, or of images
                outputs[name].pooler_output = every.unflatten(0, (len(own), -1))[new].flatten(0, 1)
            else:
                outputs[name].pooler_output = [every[index] for index in new]
    for name in pixel_names(zipped.family):
        kwargs.pop(name, None)
    kwargs["mm_encoder_outputs"] = outputs


class _Streamer:
    """The user's streamer, which is shown the user's prompt first."""

    def __init__(self, streamer: Any, shown: Callable[[Tensor], Tensor]) -> None:
        self._streamer = streamer
        self._shown: Callable[[Tensor], Tensor] | None = shown

    def put(self, value: Tensor) -> None:
        """The prompts first, then token by token."""
        shown, self._shown = self._shown, None
        self._streamer.put(value if shown is None else shown(value))

    def end(self) -> None:
        """Nothing comes any more."""
        self._streamer.end()


class _Shown:
    """The user's logits processor or stopping criterion, which is shown sequences with the user's prompt."""

    def __init__(self, inner: Any, shown: Callable[[Tensor], Tensor]) -> None:
        self._inner = inner
        self._shown = shown

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self._inner(self._shown(input_ids), scores)
