"""Any other class of transformers that takes ``mm_encoder_outputs``: tokens are chosen among those it returns itself.

VisionZip knows of such a class only what its methods tell: ``get_image_features`` returns the tokens of its images in
the order of their placeholders, and ``get_rope_index``, if there is one, their positions. So methods that read the
encoder's attention are refused, and before the encoder runs so is everything else that cannot be known from outside.
Each image of a prompt has one run of placeholders. ``docs/families.md`` says which classes work.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.integrations.huggingface import Arguments, Encoded, Modality, stock_features
from visionzip.integrations.prompts.runs import Run, stretches
from visionzip.integrations.seam.base import OutputFamily
from visionzip.integrations.seam.choice import choose_in_frames, flat_tokens, shown
from visionzip.methods import METHODS, check_setting, has_size_bias, method_of, token_counts

_KNOWN = {"projected", "pixels"}  # the parts that a method may read: the language model's tokens, and pixels
_SHORTENED = {"input_ids", "attention_mask", "position_ids", "labels", "token_type_ids", "mm_token_type_ids"}
_OTHER_FIELDS = {  # classes that read another field of their encoder's output than pooler_output
    "fuyu": "last_hidden_state",
    "llama4": "last_hidden_state",
    "granite4_vision": "deepstack_features of a layout of its own",
}


@dataclass(frozen=True)
class AnyModality(Modality):
    """Images of an unknown class, which gets its own output back with fewer tokens."""

    def stacks(self, encoded: Encoded) -> bool:
        """Say whether the class's own ``pooler_output`` was one tensor."""
        return isinstance(encoded.stock.pooler_output, Tensor)

    def output(self, encoded: Encoded) -> BaseModelOutputWithPooling:
        """Return the class's own output with the chosen tokens.

        Raises:
            ValueError: images keep different numbers of tokens, but the class takes one tensor.
        """
        tokens: Any = encoded.tokens
        if self.stacks(encoded):
            if len({len(own) for own in tokens}) > 1:
                raise ValueError(
                    f"images keep {', '.join(str(len(own)) for own in tokens)} tokens, but this class takes them as "
                    "one tensor: give images of one size in a call"
                )
            tokens = torch.stack(tokens)
        # A class that reads last_hidden_state instead fails without it; with it, the class would see all tokens.
        fields = dict(encoded.stock) | {"pooler_output": tokens, "last_hidden_state": None}
        if encoded.deepstack is not None:
            fields["deepstack_features"] = encoded.deepstack
        return type(encoded.stock)(**fields)


@dataclass(frozen=True)
class AnyFamily(OutputFamily):
    """The family of all classes that have no family of their own."""

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """Check the model as :meth:`Family.check` does, and that the method reads nothing but the encoder's tokens."""
        name = type(model).__name__
        if not hasattr(getattr(model, "model", None), "get_image_features"):
            raise TypeError(f"{name} has no base model with get_image_features as .model: it cannot be zipped")
        super().check(model, config)
        if not method_of(config).reads <= _KNOWN or has_size_bias(config):
            fitting = ", ".join(own.name for own in METHODS.values() if own.reads <= _KNOWN and own.keeps_patches)
            raise ValueError(
                f"method={config.method!r}{' with a size bias' * has_size_bias(config)} reads the attention of the "
                f"image encoder, which VisionZip does not know of {name}: use one of {fitting}, with keep "
                "(visionzip(model, keep=0.5, method='cen-prune'))"
            )
        if field := _OTHER_FIELDS.get(type(model).__module__.split(".")[-2]):
            raise TypeError(f"{name} reads {field} of its image encoder, not pooler_output: it cannot be zipped")
        if self.rotary and config.positions == "consecutive":
            raise ValueError(f"positions='consecutive' does not fit {name}, whose tokens have a row and a column")
        if not self.rotary and hasattr(model.model, "compute_3d_position_ids"):
            raise TypeError(f"{name} has positions of several axes, but no get_rope_index: it cannot be zipped")
        check_setting(config, model, 64, lays_out_patches=True)

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """Return a setting that keeps half of each image's tokens; the user has to name a method."""
        return VisionZipConfig(keep=0.5)

    def language_model(self, model: nn.Module) -> nn.Module:
        """Return the text backbone."""
        return model.get_decoder()

    def positions(self, base: nn.Module, arguments: Arguments) -> Tensor | None:
        """Compute the positions as the model does.

        Raises:
            ValueError: the positions do not have three axes.
        """
        positions = super().positions(base, arguments)
        if positions is not None and (positions.ndim != 3 or len(positions) != 3):
            raise ValueError(
                f"{type(base).__name__} has positions of shape {tuple(positions.shape)}, not of 3 axes: unzip(model)"
            )
        return positions


def any_family(model: nn.Module) -> AnyFamily | None:
    """Return the family of a model that takes ``mm_encoder_outputs``; None if the model does not take them."""
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        return None
    return _ROTARY if hasattr(getattr(model, "model", None), "get_rope_index") else _PLAIN


def _runs(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> list[Run]:
    _refuse(base, config, arguments)
    ids = arguments["input_ids"]
    found = [length for row in (ids == base.config.image_token_id).cpu() for _, length in stretches(row)]
    lengths = _lengths(found, arguments)
    return [Run(full, token_counts(config, full, False).total) for full in lengths]


def _refuse(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> None:
    """Refuse arguments that VisionZip would have to know more about.

    Raises:
        ValueError: there is such an argument.
    """
    ids = arguments["input_ids"]
    if heard := [name for name in arguments if name.startswith("input_features") and arguments[name] is not None]:
        raise ValueError(f"{heard[0]} was given: prompts with sound are not compressed, unzip(model) first")
    taken = {*_SHORTENED, *inspect.signature(type(base).get_image_features).parameters}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.shape[-2:] == ids.shape and name not in taken:
            raise ValueError(
                f"{name} {tuple(value.shape)} has an entry for every token of the prompts, which VisionZip does not "
                "know how to shorten: leave it out, or unzip(model) first"
            )


def _lengths(found: list[int], arguments: Arguments) -> list[int]:
    """Count the placeholders of each image, from their stretches in the prompts and the processor's arguments.

    Raises:
        ValueError: the images cannot be told apart.
    """
    total, tried = sum(found), []
    for weights in _weights(arguments):
        tried.append(len(weights))
        if len(weights) == len(found):
            return found
        if len(weights) > len(found) and found:
            lengths = [weight * total // sum(weights) for weight in weights]
            if all(weight * total % sum(weights) == 0 for weight in weights):
                return lengths  # find_runs checks that they fill the stretches
    raise ValueError(
        f"the prompts have {len(found)} runs of image placeholders for {' or '.join(map(str, tried)) or 'unknown'} "
        "images: of this class VisionZip knows images of one run each, not such as are cut into rows or have parts of "
        "unequal length. unzip(model) first, or use a class that docs/families.md names"
    )


def _weights(arguments: Arguments) -> list[list[int]]:
    """List, for each way to count images, how long they are relative to each other."""
    ways = []
    for name in ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes"):
        if (grid := arguments.get(name)) is not None:
            ways.append([int(own.prod()) for own in torch.as_tensor(grid)])
    if (places := arguments.get("image_position_ids")) is not None:  # the positions of patches; -1 fills up
        ways.append((places != -1).all(dim=-1).sum(dim=-1).tolist())
    pixels = arguments["pixel_values"]
    if not ways and isinstance(pixels, Tensor) and pixels.ndim >= 4:
        ways.append([1] * len(pixels))
        if pixels.ndim == 5:
            ways.append([1] * int(shown(pixels).sum()))
    return ways


def _encode(base: nn.Module, config: VisionZipConfig, arguments: Arguments) -> Encoded:
    names = inspect.signature(type(base).get_image_features).parameters
    taken = {name: arguments[name] for name in names if arguments.get(name) is not None}
    output = stock_features(base, "image", taken | {"return_dict": True})
    layers = [flat_tokens(output.pooler_output), *map(flat_tokens, getattr(output, "deepstack_features", None) or ())]
    tokens = output.pooler_output
    made = [len(tokens)] if isinstance(tokens, Tensor) and tokens.ndim == 2 else [len(own) for own in tokens]
    lengths = [run.full for run in _runs(base, config, arguments)] if "input_ids" in arguments else made
    fits = all(len(layer) == sum(lengths) for layer in layers)
    if not fits or (len(made) == len(lengths) and made != lengths):
        raise ValueError(
            f"the prompts have images of {lengths} placeholders where {type(base).__name__} makes {made} tokens: do "
            "not truncate prompts, give images in the order of the prompts, and use the model's own processor"
        )
    seen = _pixels(arguments["pixel_values"], lengths)
    chosen = choose_in_frames(layers, [(1, length) for length in lengths], None, None, seen, [config] * len(lengths))
    tokens, *deepstack = chosen.layers
    return Encoded(tokens, chosen.places, None, None, deepstack or None, output)


def _pixels(pixels: Any, lengths: list[int]) -> Tensor:
    """Return pixels by image or by token, from which ``random`` draws; or else the lengths in their place."""
    if isinstance(pixels, Tensor) and len(pixels) == len(lengths):
        return pixels
    if isinstance(pixels, Tensor) and len(pixels) % sum(lengths) == 0:
        return pixels.flatten(1)
    return torch.as_tensor(lengths)[:, None]


_IMAGE = {"image": AnyModality("pixel_values", _runs, _encode)}
_PLAIN = AnyFamily(_IMAGE)
_ROTARY = AnyFamily(_IMAGE, rotary=True)
