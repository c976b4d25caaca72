"""``generate`` of a zipped model: it runs on shortened prompts, and shows the user's own prompts everywhere."""

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
from visionzip.integrations.prompts.held import Held
from visionzip.integrations.prompts.runs import find_runs
from visionzip.integrations.prompts.users_prompt import show_users_prompt
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
    """Shorten the prompts once, then run ``generate`` of transformers with all its arguments.

    Inside, rows are padded on the left, whichever side the user's padding is on, so that each row is answered as it
    would be alone. A batch without images is passed on unchanged. Everything that shows a prompt shows the user's own:
    the returned sequences, a streamer, logits processors, stopping criteria and prefix functions. ``max_length`` and
    ``min_length`` count the user's own prompt too.

    Args:
        model: the zipped model.
        inputs: (B, L), the prompts as the stock processor writes them; ``input_ids`` is another name.
        generation_config: as in transformers.
        logits_processor: as in transformers.
        stopping_criteria: as in transformers.
        prefix_allowed_tokens_fn: as in transformers.
        **kwargs: transformers' other arguments, and the model's. With ``past_key_values``, a prompt as long as its
            ``attention_mask`` is the whole conversation with all its images, as in transformers; a shorter one is the
            new tokens with the new images.

    Returns:
        The result of transformers' own ``generate``, with the user's prompts in front of the answers.

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
    _check_inputs(zipped, model, prompt, generation_config, kwargs)
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
        kwargs.pop("position_ids", None)  # positions follow from the mask
    kwargs, held = prepare(zipped, model, kwargs, side="left", whole=whole, found=Found(found, edits))
    length = kwargs["input_ids"].shape[1]
    own["generation_config"] = _count_users_prompt(kwargs, model, generation_config, prompt.shape[1] - length)
    shown = show_users_prompt(own, kwargs, prompt, length)
    return _run(functools.partial(stock, **own, **kwargs), kwargs.get("past_key_values"), held, len(prompt), shown)


def _check_inputs(
    zipped: Zipped,
    model: nn.Module,
    prompt: Tensor | None,
    generation_config: GenerationConfig | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse forms of input that a zipped model cannot shorten.

    Raises:
        ValueError: pixels come with embeddings or encoder outputs, features are given, or an assistant gets images.
    """
    if prompt is not None and getattr(generation_config, "is_assistant", False):
        _refuse_images(zipped, model, prompt)
    if has_pixels(zipped, kwargs):
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(NO_IDS)
        refuse_outputs(kwargs)
    refuse_features(zipped.family, kwargs.get("mm_encoder_outputs") or {})


def _run(
    stock: Callable[[], Any], cache: Any, held: Held | None, prompts: int, shown: Callable[[Tensor], Tensor]
) -> Any:
    """Run the stock ``generate``, note the record of the prompts on its cache, and put the user's prompts back.

    Args:
        stock: the stock ``generate`` with its arguments.
        cache: the cache that the user gives, or None.
        held: the record of the cache that the shortened prompts fill.
        prompts: B, the number of prompts.
        shown: puts the user's prompts in place of the shortened ones.
    """
    hold(cache, None)  # if generation is interrupted, the cache has no wrong record
    token = GENERATING.set(True)
    try:
        result = stock()
    finally:
        GENERATING.reset(token)
    sequences = result if isinstance(result, Tensor) else result.sequences
    held = held and held.repeated(len(sequences) // prompts)
    hold(getattr(result, "past_key_values", cache), held)
    if isinstance(result, Tensor):
        return shown(result)
    result.sequences = shown(result.sequences)
    return result


def _refuse_settings(
    zipped: Zipped, model: nn.Module, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuse settings with which transformers gives the model less than the whole prompt.

    Raises:
        ValueError: such a setting is made.
    """
    if setting("cache_implementation", model, generation_config, kwargs) == "paged":
        raise ValueError(
            "cache_implementation='paged' is continuous batching, which gets from transformers ids alone, without "
            "their images: use another, or leave it out"
        )
    if has_size_bias(zipped.config) and setting("prefill_chunk_size", model, generation_config, kwargs):
        raise ValueError(
            f"prefill_chunk_size cuts the prompt, but the {SIZES} of a size bias are those of the whole prompt: leave "
            "it out, or call visionzip(model, size_bias=False)"
        )


def _refuse_images(zipped: Zipped, model: nn.Module, prompt: Tensor) -> None:
    """Refuse prompts with images for an assistant, as transformers gives it their placeholders without the images.

    Raises:
        ValueError: the prompts have placeholders.
    """
    tokens = [getattr(model.config, f"{name}_token_id") for name in zipped.family.modalities]
    if any((prompt == token).any() for token in tokens):
        raise ValueError(
            "a zipped model cannot assist with prompts that have images, as transformers gives an assistant the "
            "placeholders without the images: unzip(assistant_model)"
        )


def _stock(zipped: Zipped, model: nn.Module) -> Callable[..., Any]:
    """Return the model's ``generate`` without VisionZip: that of its class, or one that the user had put there."""
    replaced = next((own for _, name, own in zipped.replaced if name == "generate"), None)
    return functools.partial(type(model).generate, model) if replaced is None else replaced


def setting(name: str, model: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]) -> Any:
    """Look up a generation setting in the order of transformers: arguments, the given config, the model's config."""
    if name in arguments:
        return arguments[name]
    configs = (generation_config, getattr(model, "generation_config", None))
    return next((value for value in (getattr(config, name, None) for config in configs) if value is not None), None)


DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""The settings with which transformers drafts several tokens at once."""


def refuse_drafts_behind_a_cache(
    model: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> None:
    """Refuse drafted tokens for a conversation of which a part is cached: transformers would feed that part again.

    Raises:
        ValueError: tokens are to be drafted, and the cache is not empty.
    """
    drafts = [name for name in DRAFTS if setting(name, model, generation_config, arguments)]
    if drafts and (past := cached_length(arguments)):
        raise ValueError(
            f"{drafts[0]} does not go with past_key_values of earlier turns ({past} positions): transformers would "
            f"feed the whole conversation again behind it. Leave {drafts[0]} out, start with an empty cache, or, where "
            "a model takes ids, give the new tokens alone"
        )


def logits_processors(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Make the logits processors as the model's class does, with the mask of the ids that they will see."""
    return type(model)._get_logits_processor(model, *args, **with_mask_of_ids(kwargs))


def with_mask_of_ids(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Cut ``attention_mask`` (B, P) in the arguments of ``_get_logits_processor`` to the last n columns, those of ids.

    The processors skip as many ids as the mask has leading zeros. But embeddings have no ids, and with a cache only the
    ids of the new turn are there: without the cut, the beginning of a padded row's answer would be skipped.
    """
    length, others = kwargs.get("input_ids_seq_length"), kwargs.get("model_kwargs") or {}
    mask = others.get("attention_mask")
    if mask is None or length is None or mask.shape[1] == length:
        return kwargs
    return kwargs | {"model_kwargs": {**others, "attention_mask": mask[:, -length:] if length else None}}


def _infer_mask(
    prompt: Tensor, model: nn.Module, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> Tensor:
    """Infer the mask as transformers does: ids of padding are masked, unless that id also ends answers."""
    pad = setting("pad_token_id", model, generation_config, kwargs)
    end = setting("eos_token_id", model, generation_config, kwargs)
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    return torch.ones_like(prompt) if pad is None or pad in ends else (prompt != pad).long()


def _count_users_prompt(
    kwargs: dict[str, Any], model: nn.Module, generation_config: GenerationConfig | None, dropped: int
) -> GenerationConfig | None:
    """Lower the lengths in the given config, or else in ``kwargs``, by the ``dropped`` tokens of the prompt."""
    generation_config = copy.deepcopy(generation_config)
    for name, more in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(name, model, generation_config, kwargs)
        if length and setting(more, model, generation_config, kwargs) is None:
            length = max(length - dropped, 0)
            if generation_config is None or kwargs.get(name) is not None:
                kwargs[name] = length
            else:  # transformers takes a length in one of the two places only
                setattr(generation_config, name, length)
    return generation_config
