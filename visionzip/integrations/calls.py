"""A call of a zipped model: encoder and choice first, then the stock forward on short prompts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from visionzip.encoder import check_tokens
from visionzip.integrations.checks import (
    NO_IDS,
    cached_length,
    check_mask,
    check_values,
    held_by,
    hold,
    pad_token,
    refuse_features,
    refuse_outputs,
    refuse_positions,
    refuse_videos,
    renamed,
    visuals,
)
from visionzip.integrations.held import Held, held_text, original_positions, position_behind
from visionzip.integrations.huggingface import Encoded, Family, Zipped, runs_stock
from visionzip.integrations.placeholders import Shortened, plan_prompts, shorten
from visionzip.integrations.runs import Edit, Visual, find_runs

GENERATING: ContextVar[bool] = ContextVar("generating", default=False)  # encoder outputs are generate's own
SIZES = "token_sizes"  # in mm_encoder_outputs (B, L) and, as an argument, of a language model with a size bias

Call = tuple[tuple[()], dict[str, Any]]


def before_model(zipped: Zipped, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Forward pre-hook of the model, and of its base model where that is called alone.

    ``mm_encoder_outputs`` says that there is nothing left to do: it is what the model hands to its base model, and
    ``generate`` to both, empty where there are no images.
    """
    given = dict(zip(_parameters(type(module)), args, strict=False)) | kwargs if args else kwargs
    for name in zipped.pixels:
        if given.get(name) is not None:
            return (), _encoded_first(zipped, module, given)
    if (outputs := given.get("mm_encoder_outputs")) and not GENERATING.get():
        refuse_features(zipped.family, outputs)
    ids = given.get("input_ids")
    if ids is None or given.get("mm_encoder_outputs") is not None or torch.compiler.is_compiling():
        return None
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if getattr(cache, "is_compileable", False) and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return None  # a step of generate: not worth a transfer of the cache's length
    past = 0 if cache is None else cache.get_seq_length()
    held = getattr(cache, "_visionzip", None)
    # A step of decoding is done here; whatever may be wrong or is to be noted is looked at.
    if past == 0 or held is not None or (mask is not None and mask.shape[-1] != past + ids.shape[1]):
        given = _as_text(zipped, module, given)
    return (), {**given, "mm_encoder_outputs": {}}


def before_base(zipped: Zipped, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Forward pre-hook of the base model: ids and encoder outputs are there; what no ``generate`` hands on is added."""
    if args:  # LLaVA-NeXT hands the ids on by place
        kwargs = dict(zip(_parameters(type(base)), args, strict=False)) | kwargs
    outputs = kwargs.get("mm_encoder_outputs")
    if outputs is None:
        alone = before_model(zipped, base, (), kwargs)
        if alone is None:
            return (), kwargs
        kwargs = alone[1]
        outputs = kwargs["mm_encoder_outputs"]
    ids, embeds, added = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), {}
    if outputs.get(SIZES) is not None:
        given = ids if embeds is None else embeds
        sizes = outputs[SIZES].to(given.device).repeat_interleave(len(given) // len(outputs[SIZES]), dim=0)
        missing = given.shape[1] - sizes.shape[1]  # without a cache, answers grow; with one, what it holds is not given
        added[SIZES] = F.pad(sizes, (0, missing), value=1.0) if missing > 0 else sizes[:, -given.shape[1] :]
    if zipped.original and kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
        # Without either, transformers takes positions that jump for several prompts packed into one row.
        added["attention_mask"] = None if ids is None else torch.ones_like(ids)
    return (), kwargs | added


@torch.compiler.disable  # reads the ids
def _encoded_first(zipped: Zipped, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    if given.get("input_ids") is None or given.get("inputs_embeds") is not None:
        raise ValueError(NO_IDS)
    refuse_positions(given)
    check_mask(given)
    refuse_outputs(given)
    arguments, held = prepare(zipped, module, renamed(zipped.family, given))
    if not zipped.original:
        hold(given.get("past_key_values"), None)
        return arguments
    config = module.config.get_text_config()
    use_cache = given.get("use_cache")
    use_cache = (config.use_cache if use_cache is None else use_cache) and not module.training
    if arguments.get("past_key_values") is None and use_cache:  # the language model would make it, unseen
        arguments["past_key_values"] = DynamicCache(config=config)
    hold(arguments.get("past_key_values"), held)
    return arguments


def _as_text(zipped: Zipped, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Check a forward without pixels; ``generate`` has checked its own.

    Raises:
        ValueError: a prompt has placeholders but no pixels, or the mask is one of a prompt that was not shortened.
    """
    refuse_videos(zipped.family, given)
    held = held_by(given)  # corrects it before the cache grows again
    past = cached_length(given)
    if past == 0:
        visuals(zipped, getattr(module, "model", module), given)
    check_mask(given)
    if held is None or held.after is None or given.get("position_ids") is not None:
        return given
    ids, mask = given["input_ids"], given.get("attention_mask")
    new = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    positions = position_behind(held, past, mask).to(ids.device) + new.cumsum(dim=1) - 1
    columns = torch.arange(ids.shape[1]).expand(len(ids), -1)
    hold(given["past_key_values"], held.grown(past).followed(Held(columns, ids.shape[1], positions + 1)))
    return given | {"position_ids": zipped.family.with_axes(positions)}


class Found(NamedTuple):
    """What a call is given to see, and where its prompts have the placeholders of each."""

    visuals: list[Visual]
    edits: list[list[Edit]]


def prepare(
    zipped: Zipped,
    model: nn.Module,
    given: dict[str, Any],
    side: str | None = None,
    whole: bool = False,
    found: Found | None = None,
) -> tuple[dict[str, Any], Held | None]:
    """Run the encoder, choose tokens, and shorten the prompts to them.

    Args:
        zipped: how.
        model: the model or its base model.
        given: the arguments of its forward, with pixels under their present names.
        side: on which rows are padded, ``"left"`` or ``"right"``; as before if None.
        whole: the prompts are a conversation whose beginning the given cache holds; otherwise what is new alone.
        found: what the prompts have, where the caller has looked for it.

    Returns:
        The arguments with ``mm_encoder_outputs`` for the pixels, and what a cache holds that was given them.

    Raises:
        ValueError: prompts and images do not fit together, or pixels are no numbers.
    """
    base, family = getattr(model, "model", model), zipped.family
    if found is None:
        seen = visuals(zipped, base, given)
        found = Found(seen, find_runs(given["input_ids"], seen))
    check_values(family, given)
    past, held = cached_length(given), held_by(given)
    own = {name: value for name, value in given.items() if name != "position_ids"} if zipped.original else given
    plan = plan_prompts(own, found.edits, side, past if whole else 0, held)
    encoded = _encode(zipped, base, given, found.visuals, plan.new)
    short = shorten(own, plan, pad_token(model), _staying(plan.new, encoded))
    taken = {name for modality in family.modalities for name in _taken(type(base), modality)}
    arguments = {name: value for name, value in given.items() if name not in taken} | short.arguments
    arguments["mm_encoder_outputs"] = _outputs(family, encoded, short)
    now = short.held
    if zipped.original:
        places = {key: own for key, (own, _) in _by_run(encoded).items()}
        offset = 0 if whole or not past else position_behind(held, past, given.get("attention_mask"))
        positions = _long_positions(family, base, given, offset)
        places = short.spread(places, None, -1)
        arguments["position_ids"], now = original_positions(positions, places, now)
        arguments.setdefault("attention_mask", None)
        if arguments["attention_mask"] is None:
            shape = (len(places), places.shape[1] + (0 if whole else past))
            arguments["attention_mask"] = places.new_ones(shape).to(given["input_ids"].device)
        if held is None and past and not whole:
            held = held_text(past, given.get("attention_mask"), len(places))
        family.note(base, now, arguments)
    return arguments, now if whole or not past else held and held.grown(past).followed(now)


Chosen = dict[str, tuple[list[int], Encoded]]
"""By modality: which of its runs are not in the cache, and their tokens."""


def _encode(zipped: Zipped, base: nn.Module, given: Mapping[str, Any], found: list[Visual], new: list[Edit]) -> Chosen:
    encoded: Chosen = {}
    for visual in found:
        chosen = sorted(edit.index for edit in new if edit.modality == visual.modality)
        if chosen:  # images that a cache holds are not encoded again where no new one is
            modality = zipped.family.modalities[visual.modality]
            own = modality.encode(base, zipped.config, given).of_runs(chosen)
            if not base.training:
                check_tokens(own.tokens, modality.pixels)
            encoded[visual.modality] = chosen, own
    return encoded


def _staying(new: list[Edit], encoded: Chosen) -> dict[tuple[str, int], Tensor]:
    """Places of what stays of each run where the choice says it, which has to be waited for."""
    chosen = {edit.key for edit in new if edit.row or edit.short is None}
    return {key: places for key, (places, _) in _by_run(encoded).items() if key in chosen} if chosen else {}


def _by_run(encoded: Chosen) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
    """Places and sizes of each run's tokens, on the host where ids are looked through."""
    return {
        (name, index): (own.places[at].cpu(), own.sizes[at].cpu() if own.sizes else None)
        for name, (chosen, own) in encoded.items()
        for at, index in enumerate(chosen)
    }


def _outputs(family: Family, encoded: Chosen, short: Shortened) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    new = set(short.new)
    for name, (_, own) in encoded.items():
        # A prompt's images in one piece: for beams, GLM-4V's generate would repeat each behind itself.
        counts = [sum(edit.modality == name and edit in new for edit in row) for row in short.edits]
        modality = family.modalities[name]
        outputs[name] = modality.output(own if modality.stacks(own) else own.in_pieces(counts))
    if any(own.sizes for _, own in encoded.values()):
        outputs[SIZES] = short.spread({key: sizes for key, (_, sizes) in _by_run(encoded).items()}, 1.0, 1.0)
    return outputs


def features(zipped: Zipped, base: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """``get_image_features`` or ``get_video_features`` of a zipped base model: the chosen tokens.

    Args:
        zipped: how.
        base: the model without its head.
        name: ``"image"`` or ``"video"``.
        *args: as the class's own.
        **kwargs: as the class's own.

    Raises:
        ValueError: the pixels have another shape, or another layer is asked for.
    """
    if runs_stock():
        return getattr(type(base), f"get_{name}_features")(base, *args, **kwargs)
    modality = zipped.family.modalities[name]
    given = dict(zip(_taken(type(base), name), args, strict=False)) | kwargs
    return modality.output(modality.encode(base, zipped.config, renamed(zipped.family, given)))


# --- positions ---


def _long_positions(family: Family, base: nn.Module, given: dict[str, Any], offset: Tensor | int) -> Tensor:
    """Positions (B, L) or (3, B, L) of the prompts as they are, the user's own where given."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    if (own := given.get("position_ids")) is not None:
        own = own[1:] if own.ndim == 3 and len(own) == 4 else own  # Qwen's first row is of the mask
        if mask is None and (own.diff(dim=-1) < 0).any() and own.ndim == 2:
            raise ValueError(
                "position_ids start anew, as those of packed prompts do: with positions='original' give each prompt a "
                "row of its own"
            )
        return own.expand(*own.shape[:-2], *ids.shape)
    mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    offset = offset.to(ids.device) if isinstance(offset, Tensor) else offset
    positions = family.positions(base, given | {"attention_mask": mask})
    if positions is None:
        positions = mask.long().cumsum(dim=1) - 1
    return (positions + offset).masked_fill(mask == 0, 0)


@functools.cache
def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


@functools.cache
def _taken(cls: type, modality: str) -> list[str]:
    """Arguments that the encoder takes, which are nobody's business behind it."""
    return [
        name
        for name in inspect.signature(getattr(cls, f"get_{modality}_features")).parameters
        if name not in ("self", "kwargs")
    ]
