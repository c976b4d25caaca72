"""What all of transformers' LLaVA families share: where VisionZip is plugged in, and what a family has to say.

``visionzip(model)`` puts five things on this one model object, and ``unzip`` takes them off; no class is changed and no
forward is typed again:

- ``get_image_features`` (and ``get_video_features``) of the base model return the zipped visual tokens. Both
  ``forward`` and ``generate`` of transformers call them;
- a forward pre-hook on the model, and one on its base model (for who calls that), shortens the runs of placeholders
  that the stock processor wrote, in everything that runs along with the ids
  (:mod:`visionzip.integrations.placeholders`);
- ``generate`` does that once for the whole answer (:mod:`visionzip.integrations.generation`);
- ``save_pretrained`` writes names of weights that inference engines read (:mod:`visionzip.integrations.saving`).

A family is one file with a :class:`Family` in it. It says two things of images, and of videos if it has them: how long
each one's run of placeholders is before and after (from shapes and the config alone, nothing is computed), and how the
zipped visual tokens are made. Everything else is here.

What ``generate`` returns begins with the user's own prompts. Everything else that a call returns has the length of the
short ones: logits, hidden states and attentions, and the KV cache. So a Trainer's ``compute_metrics``,
``compute_loss_func`` and ``label_smoothing_factor``, which compare logits with labels outside the model, do not fit.

Refused, each with an error that names the cure: pixels beside ``inputs_embeds``; ``logits_to_keep`` as positions and
``cu_seq_lens_*``, which point at tokens of the long prompts; masks of four dimensions beside pixels; a zipped
``assistant_model`` for prompts with images; a second turn with the cache of the first whose mask has the long prompts'
length, or, in a batch of unequal prompts, that is padded anew or has a cache that ``generate`` has not filled; encoders
other than CLIP and SigLIP; projectors that take several layers.

To know: PEFT saves an adapter without the model's config, so say ``visionzip(model, …)`` again after loading one (a
merged model keeps its setting). ``model.forward(…)`` called by that name, as old versions of PEFT do, runs no hooks of
the model, so that ``labels`` are not shortened and the loss fails; ``model(…)`` it is. ``DataParallel`` runs the
encoder of all replicas on the first device. ``torch.compile(model, fullgraph=True)`` fails on prompts with images, as
it does without VisionZip; decoding steps are one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionzip.config import VisionZipConfig
from visionzip.encoder import check_finite, has_cls_token, side_length
from visionzip.integrations.placeholders import Held, Run, Visual
from visionzip.methods import TokenCounts, token_counts


@dataclass(frozen=True)
class Modality:
    """Images or videos of a family.

    Attributes:
        pixels: the argument of the model's forward that has them.
        runs: ``(base, config, arguments) -> [Run, …]``, one for each image or video in order. ``base`` is the model
            without its head (``model.model``), ``arguments`` are the forward's by name, with the pixels. Checks the
            pixels' shape. Nothing may be computed that needs the pixels' values.
        features: ``(base, config, pixels, …) -> BaseModelOutputWithPooling`` in the place of the base model's
            ``get_image_features`` or ``get_video_features``, called with its arguments by name. The parameters after
            ``config`` must have the same names (transformers' ``generate`` looks at them), with ``**kwargs`` for the
            rest. ``pooler_output`` is what the base model's own function returns there: a list of (n, hidden_size) or
            a tensor; of each, n is the run's ``short``.
        former_pixels: an older name of that argument, which the stock processor still uses.
        pooled_patches: ``(base) -> int``, patches of one frame that is pooled before it is compressed.
    """

    pixels: str
    runs: Callable[[nn.Module, VisionZipConfig, Mapping[str, Any]], list[Run]]
    features: Callable[..., Any]
    former_pixels: str | None = None
    pooled_patches: Callable[[nn.Module], int] | None = None


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    Attributes:
        modalities: by name, ``"image"`` and ``"video"``: the model's config has ``<name>_token_id`` and its base model
            ``get_<name>_features``.
        towers: attributes of the base model that hold image encoders.
        needs: what else of the base model the family's functions use, dotted (``"config.spatial_pool_stride"``): a
            version of transformers that has it no more fails at ``visionzip(model)``.
        tiles: whether images are cut into tiles, whose patches are laid out as one image.
        default: the setting where the user gives none; its layer is replaced by the one that the model's config names.
    """

    modalities: Mapping[str, Modality]
    towers: tuple[str, ...] = ("vision_tower",)
    needs: tuple[str, ...] = ()
    tiles: bool = False
    default: VisionZipConfig = field(default_factory=VisionZipConfig)


@dataclass(eq=False)
class Zipped:
    """What hangs on a zipped model as ``model._visionzip``.

    Attributes:
        family: how it is zipped.
        config: the setting.
        handles: of the hooks.
        replaced: module and name of each function that was put on it, and what the user had put there before, if
            anything.
    """

    family: Family
    config: VisionZipConfig
    handles: list[RemovableHandle] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


# --- what a family's file needs ---


def sequence_length(tower: nn.Module) -> int:
    """S, tokens of an image inside the encoder: the patches and, if there is one, the CLS token."""
    return side_length(tower) ** 2 + has_cls_token(tower)


def short_length(tower: nn.Module, config: VisionZipConfig) -> int:
    """Visual tokens of one encoder input (image, tile, frame) when zipped, or all of them if these are fewer."""
    return short_counts(tower, config).total


def short_counts(tower: nn.Module, config: VisionZipConfig) -> TokenCounts:
    """What those are: K and M, and whether CLS is among the K."""
    return token_counts(config, side_length(tower) ** 2, has_cls_token(tower))


def full_length(base: nn.Module, tower: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Visual tokens of one encoder input as the model is, by its rule for the first token of the sequence.

    ``"default"`` leaves the first one out, whether or not it is a CLS token, and ``"full"`` keeps it.
    """
    strategy = arguments.get("vision_feature_select_strategy") or base.config.vision_feature_select_strategy
    return sequence_length(tower) - (strategy == "default")


def check_pixels(pixels: Any, name: str, tower: nn.Module, leading: str) -> None:
    """Check pixels (``leading``…, 3, h, w), for example with ``"N"`` or ``"N, tiles"``, for the encoder's size.

    Raises:
        ValueError: they have another shape.
    """
    edge = tower.config.image_size
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    dims = leading.count(",") + 4
    if not isinstance(pixels, Tensor) or pixels.ndim != dims or tuple(pixels.shape[-3:]) != (3, edge, edge):
        raise ValueError(
            f"{name} must be ({leading}, 3, {edge}, {edge}) for this model, got {shape}: prepare the inputs with the "
            "model's own processor"
        )


def check_layer(base: nn.Module, vision_feature_layer: Any) -> None:
    """Refuse a layer given to a call: it is VisionZip's that is read.

    Raises:
        ValueError: it is not the model's own.
    """
    if vision_feature_layer is not None and vision_feature_layer != base.config.vision_feature_layer:
        raise ValueError(
            f"vision_feature_layer={vision_feature_layer!r} was given, but a zipped model reads the layer of its "
            "setting: call visionzip(model, layer=…), or unzip(model) first"
        )


# --- a call ---

NO_IDS = "a zipped model needs input_ids, not inputs_embeds, beside pixels: it shortens the placeholders in them"


def pixel_names(family: Family) -> list[str]:
    """The arguments that have images and videos."""
    return [modality.pixels for modality in family.modalities.values()]


def has_pixels(family: Family, arguments: Mapping[str, Any]) -> bool:
    """Whether a call is given images or videos, by their present names or former ones."""
    former = [modality.former_pixels for modality in family.modalities.values() if modality.former_pixels]
    return any(arguments.get(name) is not None for name in (*pixel_names(family), *former))


def check_values(family: Family, arguments: Mapping[str, Any]) -> None:
    """Check the pixels that a call is given: their values, which are looked at once for a call, not once a step.

    Raises:
        ValueError: some are NaN or infinite, or raw; the message names the image.
    """
    for name in pixel_names(family):
        if (pixels := arguments.get(name)) is not None:
            check_finite(pixels, [1] * len(pixels), name)


def renamed(family: Family, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with pixels under their present names."""
    for modality in family.modalities.values():
        if modality.former_pixels in arguments:
            pixels = arguments[modality.former_pixels]
            others = {name: value for name, value in arguments.items() if name != modality.former_pixels}
            arguments = others if pixels is None else others | {modality.pixels: pixels}
    return arguments


def visuals(zipped: Zipped, base: nn.Module, arguments: Mapping[str, Any]) -> list[Visual]:
    """What a call is given to see.

    Raises:
        ValueError: pixels have another shape than the model's, or the prompts have placeholders without pixels.
    """
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


def cached_length(arguments: Mapping[str, Any]) -> int:
    """Tokens in the cache that a call is given."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def hold(cache: Any, held: Held | None) -> None:
    """Note on a cache, if there is one, what it holds of its prompts, so that copies know it too; None if unknown."""
    if cache is not None:
        cache._visionzip = held


def held_by(arguments: Mapping[str, Any]) -> Held | None:
    """What :func:`hold` noted on the cache that a call is given, corrected if that was cut or is of other rows now."""
    cache, past = arguments.get("past_key_values"), cached_length(arguments)
    held: Held | None = getattr(cache, "_visionzip", None)
    if held is not None and len(held.columns) != len(arguments["input_ids"]):
        held = cache._visionzip = None
    elif held is not None and held.columns.shape[1] > past:
        held = cache._visionzip = held.cut(past)
    return held


def mask_misfit(arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with a mask (B, P + L), if its P positions before the prompts are not those of the cache."""
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


def pad_token(model: nn.Module) -> int | None:
    """The id that fills up rows; it is masked, so any will do that is no placeholder."""
    config = model.config
    pad = getattr(config, "pad_token_id", None)
    return getattr(config.get_text_config(), "pad_token_id", None) if pad is None else pad
