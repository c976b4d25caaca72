"""Handle a call of a zipped model: choose visual tokens and shorten the prompts, then run the stock forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
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
from visionzip.integrations.huggingface import Encoded, Family, Zipped, runs_stock
from visionzip.integrations.prompts.held import Held, held_text, original_positions, position_behind
from visionzip.integrations.prompts.placeholders import Shortened, plan_prompts, shorten
from visionzip.integrations.prompts.runs import Edit, Visual, find_runs

GENERATING: ContextVar[bool] = ContextVar(
    "generating", default=False
)  # whether encoder outputs come from our own generate
SIZES = "token_sizes"  # (B, L), an entry of mm_encoder_outputs and an argument of a language model with a size bias

Call = tuple[tuple[()], dict[str, Any]]


def before_model(zipped: Zipped, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Prepare a call of the model, or of its base model if that is called alone; a forward pre-hook.

    Arguments with ``mm_encoder_outputs`` have been prepared already: the model passes them on to its base model, and
    ``generate`` passes them to both. Without images they are empty.
    """
    given = dict(zip(_parameters(type(module).forward), args, strict=False)) | kwargs if args else kwargs
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
        return None  # a step of generate, in which the cache's length is not worth a transfer
    past = 0 if cache is None else cache.get_seq_length()
    held = getattr(cache, "_visionzip", None)
    # For a step of decoding there is nothing left to do. All other calls are checked and recorded.
    if past == 0 or held is not None or (mask is not None and mask.shape[-1] != past + ids.shape[1]):
        given = _as_text(zipped, module, given)
    return (), {**given, "mm_encoder_outputs": {}}


def before_base(zipped: Zipped, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Add to a call of the base model what ``generate`` does not pass on: sizes and a mask; a forward pre-hook."""
    if args:  # LLaVA-NeXT passes the ids on without their name
        kwargs = dict(zip(_parameters(type(base).forward), args, strict=False)) | kwargs
    outputs = kwargs.get("mm_encoder_outputs")
    if outputs is None:
        alone = before_model(zipped, base, (), kwargs)
        if alone is None:
            return (), kwargs
        kwargs = alone[1]
        outputs = kwargs["mm_encoder_outputs"]
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    given = ids if embeds is None else embeds
    added: dict[str, Any] = {}
    if outputs.get(SIZES) is not None and given is not None:
        sizes = outputs[SIZES].to(given.device).repeat_interleave(len(given) // len(outputs[SIZES]), dim=0)
        missing = given.shape[1] - sizes.shape[1]  # answers grow without a cache; with one, only new tokens come
        added[SIZES] = F.pad(sizes, (0, missing), value=1.0) if missing > 0 else sizes[:, -given.shape[1] :]
    if zipped.original and kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
        # Without both, transformers takes a jump of positions for the start of another prompt packed into the row.
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
    if (
        arguments.get("past_key_values") is None and use_cache
    ):  # else the language model would make one where nothing can be recorded on it
        arguments["past_key_values"] = DynamicCache(config=config)
    hold(arguments.get("past_key_values"), held)
    return arguments


def _as_text(zipped: Zipped, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Check a forward without pixels, and continue original positions; ``generate`` has done so for its own.

    Raises:
        ValueError: a prompt has placeholders but no pixels, or the mask is that of an uncompressed prompt.
    """
    refuse_videos(zipped.family, given)
    held = held_by(given)  # adapts the record before the cache grows again
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
    """The images and videos of a call, and their runs of placeholders in each prompt."""

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
        zipped: what is attached to the model.
        model: the model or its base model.
        given: the arguments of its forward, with pixels under their present names.
        side: the side on which rows are padded, ``"left"`` or ``"right"``; None keeps each row's side.
        whole: whether the prompts are a whole conversation, whose beginning the cache holds, and not new tokens only.
        found: the images and videos of the call and their runs, if the caller has found them already.

    Returns:
        The arguments with ``mm_encoder_outputs`` in place of the pixels, and the record of a cache that they fill.

    Raises:
        ValueError: prompts and images do not fit together, or pixels or visual tokens are not finite.
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
    taken = {name for modality in family.modalities for name in _taken(getattr(type(base), f"get_{modality}_features"))}
    arguments = {name: value for name, value in given.items() if name not in taken} | short.arguments
    arguments["mm_encoder_outputs"] = _outputs(family, encoded, short)
    now = short.held
    if zipped.original:
        by_run = {key: own for key, (own, _) in _by_run(encoded).items()}
        offset = 0 if whole or not past else position_behind(held, past, given.get("attention_mask"))
        positions = _long_positions(family, base, given, offset)
        places = short.spread(by_run, None, -1)
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
"""By modality: the numbers of its runs that are not in the cache, and the tokens of these runs."""


def _encode(zipped: Zipped, base: nn.Module, given: Mapping[str, Any], found: list[Visual], new: list[Edit]) -> Chosen:
    encoded: Chosen = {}
    for visual in found:
        chosen = sorted(edit.number for edit in new if edit.modality == visual.modality)
        if chosen:  # nothing is encoded again if the cache holds all images
            modality = zipped.family.modalities[visual.modality]
            own = modality.encode(base, zipped.config, given).of_runs(chosen)
            if not base.training:
                check_tokens(own.tokens, modality.pixels)
            encoded[visual.modality] = chosen, own
    return encoded


def _staying(new: list[Edit], encoded: Chosen) -> dict[tuple[str, int], Tensor]:
    """Collect the places of tokens that stay in runs where the choice decides that; this waits for the device."""
    chosen = {edit.key for edit in new if edit.row or edit.short is None}
    return {key: places for key, (places, _) in _by_run(encoded).items() if key in chosen} if chosen else {}


def _by_run(encoded: Chosen) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
    """Collect the places and sizes of each run's tokens on the host, where the prompts are shortened."""
    return {
        (name, index): (own.places[at].cpu(), own.sizes[at].cpu() if own.sizes else None)
        for name, (chosen, own) in encoded.items()
        for at, index in enumerate(chosen)
    }


def _outputs(family: Family, encoded: Chosen, short: Shortened) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    new = set(short.new)
    for name, (_, own) in encoded.items():
        # A prompt's images are joined to one piece: for beams, GLM-4V's generate repeats each piece right after itself.
        counts = [sum(edit.modality == name and edit in new for edit in row) for row in short.edits]
        modality = family.modalities[name]
        if modality.stacks(own) and sum(map(bool, counts)) > 1 and len({len(tokens) for tokens in own.tokens}) > 1:
            raise ValueError("different numbers of patches are picked, which this model takes in one prompt at a time")
        outputs[name] = modality.output(own if modality.stacks(own) else own.in_pieces(counts))
    if any(own.sizes for _, own in encoded.values()):
        sizes = {key: sizes for key, (_, sizes) in _by_run(encoded).items() if sizes is not None}
        outputs[SIZES] = short.spread(sizes, 1.0, 1.0)
    return outputs


def features(zipped: Zipped, base: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Return the chosen tokens, in place of ``get_image_features`` or ``get_video_features`` of the base model.

    Args:
        zipped: what is attached to the model.
        base: the model without its head.
        name: ``"image"`` or ``"video"``.
        *args: the arguments of the class's own method.
        **kwargs: the same, by name.

    Raises:
        ValueError: the pixels do not have the model's shape, or another encoder layer is asked for.
    """
    if runs_stock():
        return getattr(type(base), f"get_{name}_features")(base, *args, **kwargs)
    modality = zipped.family.modalities[name]
    given = dict(zip(_taken(getattr(type(base), f"get_{name}_features")), args, strict=False)) | kwargs
    return modality.output(modality.encode(base, zipped.config, renamed(zipped.family, given)))


# --- positions ---


def _long_positions(family: Family, base: nn.Module, given: dict[str, Any], offset: Tensor | int) -> Tensor:
    """Compute the positions (B, L) or (3, B, L) of the uncompressed prompts, or take those that the user gives."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    if (own := given.get("position_ids")) is not None:
        own = own[1:] if own.ndim == 3 and len(own) == 4 else own  # Qwen's first of four rows is about the mask
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
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


@functools.cache
def _taken(features: Callable[..., Any]) -> list[str]:
    """List the arguments of ``get_image_features`` or ``get_video_features``, which nothing needs after it."""
    return [name for name in inspect.signature(features).parameters if name not in ("self", "kwargs")]
