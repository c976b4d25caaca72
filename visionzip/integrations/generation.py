"""``generate`` of a zipped model: short prompts inside, the user's own prompt outside."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionzip.integrations.calls import GENERATING, SIZES, Found, prepare
from visionzip.integrations.checks import (
    NO_IDS,
    cached_length,
    has_pixels,
    hold,
    mask_misfit,
    refuse_features,
    refuse_images_at_the_end,
    refuse_outputs,
    renamed,
    visuals,
)
from visionzip.integrations.huggingface import Zipped
from visionzip.integrations.runs import find_runs
from visionzip.methods import has_size_bias

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

    Rows are padded on the left inside, whichever side the user's padding is on, so that each answers as it would alone
    (a batch without any image goes to transformers as it is). Everything that shows the prompt shows the user's own:
    the returned sequences, a streamer, logits processors, stopping criteria and prefix functions; ``max_length`` and
    ``min_length`` count it.

    Args:
        model: the zipped model.
        inputs: (B, L) prompts as the stock processor writes them; also as ``input_ids``.
        generation_config: as in transformers.
        logits_processor: as in transformers.
        stopping_criteria: as in transformers.
        prefix_allowed_tokens_fn: as in transformers.
        **kwargs: transformers' other arguments, and the model's. With ``past_key_values``, a prompt as long as its
            ``attention_mask`` is the whole conversation with all its images, as in transformers; otherwise it is the
            new tokens, with the new images.

    Returns:
        What transformers' own returns, with the user's prompts in front of the answers.

    Raises:
        ValueError: prompts and images do not fit together, a pixel is not finite, or tokens are to be drafted behind a
            cache.
    """
    zipped: Zipped = model._visionzip
    own = {
        "generation_config": generation_config,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
    }
    stock = _stock(zipped, model)
    prompt = kwargs.get("input_ids") if inputs is None else inputs
    if prompt is not None and getattr(generation_config, "is_assistant", False):
        _refuse_images(zipped, model, prompt)
    if has_pixels(zipped, kwargs):
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(NO_IDS)
        refuse_outputs(kwargs)
    refuse_features(zipped.family, kwargs.get("mm_encoder_outputs") or {})
    encoded = kwargs.get("inputs_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None
    if prompt is None or encoded:
        refuse_drafts_behind_a_cache(model, generation_config, kwargs)
        return stock(inputs, **own, **kwargs)
    kwargs = renamed(zipped.family, kwargs) | {"input_ids": prompt}
    if misfit := mask_misfit(kwargs):
        raise ValueError(misfit)
    found = visuals(zipped, model.model, kwargs)
    past, mask = cached_length(kwargs), kwargs.get("attention_mask")
    if mask is None or mask.shape[1] == prompt.shape[1]:
        refuse_drafts_behind_a_cache(model, generation_config, kwargs)
    if not any(visual.runs for visual in found) and not (zipped.original and past):
        return stock(**own, **kwargs)

    _refuse_settings(zipped, model, generation_config, kwargs)
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _infer_mask(prompt, model, generation_config, kwargs)
    edits = find_runs(prompt, found)
    if zipped.original:
        refuse_images_at_the_end(kwargs, edits)
    whole = past > 0 and kwargs["attention_mask"].shape[1] == prompt.shape[1]
    if whole:
        kwargs.pop("position_ids", None)  # counted by the mask
    kwargs, held = prepare(zipped, model, kwargs, side="left", whole=whole, found=Found(found, edits))
    length = kwargs["input_ids"].shape[1]
    own["generation_config"] = _count_users_prompt(kwargs, model, generation_config, prompt.shape[1] - length)

    shown = _show_users_prompt(own, kwargs, prompt, length)
    hold(kwargs.get("past_key_values"), None)  # in case that this is broken off
    token = GENERATING.set(True)
    try:
        result = stock(**own, **kwargs)
    finally:
        GENERATING.reset(token)
    sequences = result if isinstance(result, Tensor) else result.sequences
    held = held and held.repeated(len(sequences) // len(prompt))
    hold(getattr(result, "past_key_values", kwargs.get("past_key_values")), held)
    if isinstance(result, Tensor):
        return shown(result)
    result.sequences = shown(result.sequences)
    return result


def _refuse_settings(
    zipped: Zipped, model: nn.Module, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuse ways to generate to which transformers gives less than the whole prompt.

    Raises:
        ValueError: one of them is asked for.
    """
    if setting("cache_implementation", model, generation_config, kwargs) == "paged":
        raise ValueError(
            "cache_implementation='paged' is continuous batching, to which transformers gives ids alone, without their "
            "images: use another, or leave it out"
        )
    if has_size_bias(zipped.config) and setting("prefill_chunk_size", model, generation_config, kwargs):
        raise ValueError(
            f"prefill_chunk_size cuts the prompt, and the {SIZES} of a size bias are those of the whole: leave it out, "
            "or visionzip(model, size_bias=False)"
        )


def _refuse_images(zipped: Zipped, model: nn.Module, prompt: Tensor) -> None:
    """Refuse to assist with images: transformers shows an assistant the placeholders without them.

    Raises:
        ValueError: there are placeholders.
    """
    tokens = [getattr(model.config, f"{name}_token_id") for name in zipped.family.modalities]
    if any((prompt == token).any() for token in tokens):
        raise ValueError(
            "a zipped model cannot assist with prompts that have images, as transformers gives an assistant their "
            "placeholders alone: unzip(assistant_model)"
        )


def _stock(zipped: Zipped, model: nn.Module) -> Callable[..., Any]:
    """The model's ``generate`` without VisionZip: of its class, or what the user had put in its place."""
    replaced = next((own for _, name, own in zipped.replaced if name == "generate"), None)
    return functools.partial(type(model).generate, model) if replaced is None else replaced


def _show_users_prompt(
    own: dict[str, Any], kwargs: dict[str, Any], prompt: Tensor, length: int
) -> Callable[[Tensor], Tensor]:
    """Let all that looks at the sequences see the user's prompts (B, L) in the place of the short ones.

    Returns:
        How: from sequences (B * n, length + new) to (B * n, L + new).
    """

    def shown(ids: Tensor) -> Tensor:
        users = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), dim=0)
        return torch.cat([users, ids[:, length:]], dim=1)

    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], shown)
    for name in ("logits_processor", "stopping_criteria"):
        if own[name] is not None:
            own[name] = [_Shown(each, shown) for each in own[name]]
    if (allowed := own["prefix_allowed_tokens_fn"]) is not None:
        own["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([prompt[row].to(ids.device), ids[length:]])
        )
    return shown


def setting(name: str, model: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]) -> Any:
    """A generation setting from where transformers takes it: the arguments, the given config, the model's."""
    if name in arguments:
        return arguments[name]
    configs = (generation_config, getattr(model, "generation_config", None))
    return next((value for value in (getattr(config, name, None) for config in configs) if value is not None), None)


DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings with which transformers drafts several tokens at once."""


def refuse_drafts_behind_a_cache(
    model: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> None:
    """Refuse to draft tokens for a whole conversation of which a part is cached: transformers then feeds that again.

    Raises:
        ValueError: tokens are to be drafted, and there is something in the cache.
    """
    drafts = [name for name in DRAFTS if setting(name, model, generation_config, arguments)]
    if drafts and (past := cached_length(arguments)):
        raise ValueError(
            f"{drafts[0]} does not go with past_key_values of earlier turns ({past} positions): transformers would "
            f"feed the whole conversation again behind it. Leave {drafts[0]} out, start with an empty cache, or, where "
            "a model takes ids, give the new tokens alone"
        )


def logits_processors(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``_get_logits_processor`` of the model's class, with a mask of the ids that the processors will see."""
    return type(model)._get_logits_processor(model, *args, **with_mask_of_ids(kwargs))


def with_mask_of_ids(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``_get_logits_processor`` whose ``attention_mask`` (B, P) is of the ids (B, n), the last of P.

    Its processors take leading zeros of the mask for ids to be passed over. But of embeddings there are no ids, and
    behind a cache those of the new turn alone: what would be passed over is the beginning of a padded row's answer.
    """
    length, others = kwargs.get("input_ids_seq_length"), kwargs.get("model_kwargs") or {}
    mask = others.get("attention_mask")
    if mask is None or length is None or mask.shape[1] == length:
        return kwargs
    return kwargs | {"model_kwargs": {**others, "attention_mask": mask[:, -length:] if length else None}}


def _infer_mask(
    prompt: Tensor, model: nn.Module, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> Tensor:
    """The mask that transformers infers: padding by its id, unless that also ends answers."""
    pad = setting("pad_token_id", model, generation_config, kwargs)
    end = setting("eos_token_id", model, generation_config, kwargs)
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    return torch.ones_like(prompt) if pad is None or pad in ends else (prompt != pad).long()


def _count_users_prompt(
    kwargs: dict[str, Any], model: nn.Module, generation_config: GenerationConfig | None, dropped: int
) -> GenerationConfig | None:
    """The given config or else ``kwargs``, with lengths for prompts that are shorter by ``dropped`` tokens."""
    generation_config = copy.deepcopy(generation_config)
    for name, more in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(name, model, generation_config, kwargs)
        if length and setting(more, model, generation_config, kwargs) is None:
            length = max(length - dropped, 0)
            if generation_config is None or kwargs.get(name) is not None:
                kwargs[name] = length
            else:  # transformers wants one or the other
                setattr(generation_config, name, length)
    return generation_config


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
