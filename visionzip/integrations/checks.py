"""Check the arguments of a zipped model's call, and read and write the record on its KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from visionzip.encoder import check_finite
from visionzip.integrations.huggingface import Family, Zipped
from visionzip.integrations.prompts.held import Held
from visionzip.integrations.prompts.runs import Edit, Visual

NO_IDS = "a zipped model needs input_ids, not inputs_embeds, beside pixels: it shortens the placeholders in them"


def refuse_outputs(given: Mapping[str, Any]) -> None:
    """Refuse encoder outputs beside pixels, from which a zipped model computes them itself.

    Raises:
        ValueError: both are given.
    """
    if given.get("mm_encoder_outputs") is not None:
        raise ValueError(
            "mm_encoder_outputs were given beside pixels, from which a zipped model computes them itself: leave one of "
            "the two out"
        )


def refuse_features(family: Family, outputs: Mapping[str, Any]) -> None:
    """Refuse features of images that the user has encoded, as they have all tokens or another choice of them.

    Raises:
        ValueError: there are such features.
    """
    if given := [name for name in family.modalities if outputs.get(name) is not None]:
        raise ValueError(
            f"mm_encoder_outputs has features of {given[0]}s, but a zipped model chooses their tokens itself: give the "
            "pixels instead, or unzip(model) first"
        )


def check_mask(given: Mapping[str, Any]) -> None:
    """Check the length of a mask, unless it masks nothing.

    Raises:
        ValueError: the length fits neither the prompts nor the cache; see :func:`mask_misfit`.
    """
    # A wrong length is harmless while nothing is masked, so the values are looked at last.
    if (misfit := mask_misfit(given)) and not given["attention_mask"].all():
        raise ValueError(misfit)


def refuse_positions(given: Mapping[str, Any]) -> None:
    """Refuse arguments that point at tokens of the uncompressed prompts.

    Raises:
        ValueError: such an argument is given.
    """
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep has positions in the prompts, but prompts are shorter in a zipped model: give a number, "
            "which counts from the end"
        )
    if names := [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if given.get(name) is not None]:
        raise ValueError(
            f"{' and '.join(names)} count tokens of the prompts, but prompts are shorter in a zipped model: leave them "
            "out; position_ids that start anew tell packed prompts apart"
        )


def has_pixels(zipped: Zipped, arguments: Mapping[str, Any]) -> bool:
    """Say whether a call has images or videos, under the present names of the arguments or former ones."""
    return any(arguments.get(name) is not None for name in zipped.pixels)


def check_values(family: Family, arguments: Mapping[str, Any]) -> None:
    """Check the values of a call's pixels. This is done once for each call, and not in every step of decoding.

    Raises:
        ValueError: pixels are NaN or infinite, or not normalised; the message names the image.
    """
    for modality in family.modalities.values():
        if (pixels := arguments.get(modality.pixels)) is not None:
            check_finite(pixels, [1] * len(pixels), modality.pixels)


def renamed(family: Family, arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename pixels that have a former name of their argument."""
    for modality in family.modalities.values():
        if modality.former_pixels in arguments:
            pixels = arguments[modality.former_pixels]
            others = {name: value for name, value in arguments.items() if name != modality.former_pixels}
            arguments = others if pixels is None else others | {modality.pixels: pixels}
    return arguments


def visuals(zipped: Zipped, base: nn.Module, arguments: Mapping[str, Any]) -> list[Visual]:
    """Collect the images and videos of a call.

    Raises:
        ValueError: pixels do not have the model's shape, or the prompts have placeholders but there are no pixels.
    """
    refuse_videos(zipped.family, arguments)
    found = []
    for name, modality in zipped.family.modalities.items():
        given = arguments.get(modality.pixels) is not None
        runs = modality.runs(base, zipped.config, arguments) if given else []
        found.append(Visual(name, getattr(base.config, f"{name}_token_id"), runs))
        if not given:
            _refuse_placeholders(arguments["input_ids"], found[-1], modality.pixels)
    return found


def _refuse_placeholders(input_ids: Tensor, visual: Visual, pixels: str) -> None:
    if count := int((input_ids == visual.token_id).sum()):
        raise ValueError(
            f"the prompts have {count} {visual.modality} placeholders (id {visual.token_id}), but no {pixels} were "
            "given: pass all that the processor returned. With a cache of earlier turns, pass the new tokens alone, or "
            "the whole conversation with all its images"
        )


def refuse_images_at_the_end(arguments: Mapping[str, Any], edits: list[list[Edit]]) -> None:
    """Refuse prompts that end with an image, for ``generate`` with original positions.

    ``generate`` counts on from the position of the prompt's last token. After an image that would be the position of
    the last kept token and not the image's end.

    Raises:
        ValueError: a prompt ends with an image.
    """
    ids, mask = arguments["input_ids"], arguments["attention_mask"][:, -arguments["input_ids"].shape[1] :]
    lasts = (ids.shape[1] - 1 - mask.flip(1).argmax(dim=1)).tolist()
    for row, (last, own) in enumerate(zip(lasts, edits, strict=True)):
        if any(edit.start <= last < edit.end - bool(edit.row) for edit in own):  # what ends the last row is text
            raise ends_with_an_image(row)


def ends_with_an_image(row: int) -> ValueError:
    """Make the error for a prompt with original positions that ends with an image."""
    return ValueError(
        f"prompt {row} ends with an image: with positions='original' (always so with Qwen-VL) the answer's positions "
        "count on from text after the image: put text behind it (a line break will do), or set positions='consecutive'"
    )


def refuse_videos(family: Family, arguments: Mapping[str, Any]) -> None:
    """Refuse videos if the family's videos are not compressed, such as GLM-V's, which have placeholders of images.

    Raises:
        ValueError: videos are given.
    """
    if "video" not in family.modalities and arguments.get("pixel_values_videos") is not None:
        raise ValueError(
            "pixel_values_videos were given, but videos of this family are not compressed: give their frames as "
            "images, or unzip(model) first"
        )


def mask_misfit(arguments: Mapping[str, Any]) -> str | None:
    """Word what is wrong with a mask (B, P + L) whose P is not the length of the cache; None if nothing is wrong."""
    ids, mask, past = arguments["input_ids"], arguments.get("attention_mask"), cached_length(arguments)
    if past == 0 or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape[1] <= ids.shape[1] or mask.shape[1] == past + ids.shape[1]:
        return None
    return (
        f"attention_mask has {mask.shape[1]} positions, but the cache holds {past} tokens and {ids.shape[1]} are new: "
        "images take fewer tokens in a zipped model. Give a mask of that length, with zeros where the cache holds "
        "padding, or generate from the whole conversation with all its images"
    )


# --- the cache ---


def cached_length(arguments: Mapping[str, Any]) -> int:
    """Count the tokens in a call's cache; 0 without one."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def hold(cache: Any, held: Held | None) -> None:
    """Note the record of the prompts on a cache, so that its copies have it too; None if it is unknown."""
    if cache is not None:
        cache._visionzip = held


def held_by(arguments: Mapping[str, Any]) -> Held | None:
    """Return the record on a call's cache, adapted if the cache was cropped; None if its rows are others now."""
    cache: Any = arguments.get("past_key_values")
    held: Held | None = getattr(cache, "_visionzip", None)
    past = cached_length(arguments)
    if held is not None and len(held.columns) != len(arguments["input_ids"]):
        held = cache._visionzip = None
    elif held is not None and held.columns.shape[1] > past:
        held = cache._visionzip = held.cut(past)
    return held


def pad_token(model: nn.Module) -> int | None:
    """Choose the id for padding. Padding is masked, so any id will do that is no placeholder."""
    config = model.config
    pad = getattr(config, "pad_token_id", None)
    return getattr(config.get_text_config(), "pad_token_id", None) if pad is None else pad
