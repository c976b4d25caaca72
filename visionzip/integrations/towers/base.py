"""Families whose images and frames go through a CLIP or SigLIP encoder of fixed size, as all LLaVAs do."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.encoder import compress_images, has_cls_token, layers_needed, side_length
from visionzip.integrations.encoders import Encoder
from visionzip.integrations.huggingface import Arguments, Encoded, Family, Modality, check_attributes
from visionzip.integrations.prompts.runs import Run
from visionzip.methods import TokenCounts, check_setting, token_counts, uncompressed


@dataclass(frozen=True)
class TowerFamily(Family):
    """A family with ``vision_tower`` and ``multi_modal_projector``.

    Attributes:
        towers: the attributes of the base model that hold image encoders.
        needs: other attributes of the base model that the family's functions use, dotted
            (``"config.spatial_pool_stride"``). ``visionzip(model)`` refuses a version of transformers that lacks one.
        tiles: whether images are cut into tiles, whose patches are laid out as one image.
        default: the setting if the user gives none; its layer is replaced by the one that the model's config names.
    """

    towers: tuple[str, ...] = ("vision_tower",)
    needs: tuple[str, ...] = ()
    tiles: bool = False
    default: VisionZipConfig = field(default_factory=VisionZipConfig)

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """Check the model as :meth:`Family.check` does, and that its projector takes one layer that can be read."""
        super().check(model, config)
        check_attributes(model.model, (*self.towers, "multi_modal_projector", "language_model", *self.needs))
        check_attributes(model.config, ("vision_feature_layer", "vision_feature_select_strategy"))
        feature_layer(model)
        for name in self.towers:
            _check_encoder(getattr(model.model, name), config)
        for name in self.towers:
            check_setting(config, model, side_length(getattr(model.model, name)), self.tiles)
        self._warn(model, config)

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """Return the family's setting, with the encoder layer on which the model's projector was trained."""
        check_attributes(model, ("config.vision_feature_layer",))
        layer = feature_layer(model)
        return dataclasses.replace(self.default, layer=layer if layer < 0 else layer - 1)

    def encoders(self, model: nn.Module) -> dict[str, Encoder]:
        """Return the encoders of images and of videos."""
        stored = getattr(model.config, "visionzip", None)
        setting = VisionZipConfig.from_dict(stored) if stored and hasattr(model, "_visionzip") else None
        found = {}
        for name, modality in self.modalities.items():
            tower = getattr(model.model, self.towers[0 if name == "image" else -1])
            inputs = partial(_encoder_inputs, tower, name == "video")
            layers = tower.config.num_hidden_layers
            pooling = (model.model, modality.pooling) if modality.pooling else None
            project = model.model.multi_modal_projector
            found[name] = Encoder(tower, setting, project, layers, pooling=pooling, inputs=inputs)
        return found

    def _warn(self, model: nn.Module, config: VisionZipConfig) -> None:
        for name in self.towers:
            tower = getattr(model.model, name)
            if wide := uncompressed(config, side_length(tower) ** 2, has_cls_token(tower)):
                _say(
                    f"{wide}, but the vision tower has {sequence_length(tower)}: nothing will be compressed. Use "
                    "smaller budgets."
                )
            trained = feature_layer(model) % (len(tower.encoder.layers) + 1)
            if layers_needed(tower, config.layer) != trained:
                _say(
                    f"VisionZip reads encoder layer {config.layer}, but this model was trained on the hidden states of "
                    f"layer {feature_layer(model)} (vision_feature_layer): expect poor answers unless the projector is "
                    "tuned."
                )
        for name, modality in self.modalities.items():
            patches = modality.pooling.patches(model.model) if modality.pooling else None
            cls_token = has_cls_token(getattr(model.model, self.towers[-1]))
            if patches is not None and (wide := uncompressed(config, patches, cls_token)):
                _say(
                    f"{wide}, but this model pools a frame to {patches + cls_token}: no {name} will be compressed. Use "
                    f"smaller budgets for {name}s."
                )


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=7)  # shown at the line of the user's visionzip(model)


def _encoder_inputs(tower: nn.Module, frames: bool, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    check_pixels(pixels, "images", tower, "B, frames" if frames else "B")
    return pixels.flatten(0, 1) if frames else pixels, {}


def feature_layer(model: nn.Module) -> int:
    """Read ``config.vision_feature_layer``, an index into the hidden states: -2 is encoder layer -2, 1 is layer 0.

    Raises:
        ValueError: the projector takes several hidden states, or the embeddings.
    """
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    if len(layers) != 1 or layers[0] == 0:
        raise ValueError(
            f"the projector of this {type(model).__name__} takes the hidden states {layers} (vision_feature_layer): "
            "VisionZip compresses the output of one encoder layer"
        )
    return layers[0]


def _check_encoder(tower: nn.Module, config: VisionZipConfig) -> None:
    def check(holder: Any, *names: str) -> Any:
        if missing := [name for name in names if not hasattr(holder, name)]:
            raise TypeError(
                f"VisionZip reads CLIP and SigLIP encoders: the vision tower {type(tower).__name__} of transformers "
                f"{transformers.__version__} is built differently ({type(holder).__name__} has no {', '.join(missing)})"
            )
        return getattr(holder, names[0])

    check(check(tower, "embeddings", "encoder", "config"), "patch_embedding")
    check(tower.config, "image_size", "patch_size", "num_hidden_layers")
    layers = check(tower.encoder, "layers")
    attention = check(layers[layers_needed(tower, config.layer) - 1], "self_attn")
    check(attention, "q_proj", "k_proj", "num_heads", "scale")


# --- what a family's functions need ---


def sequence_length(tower: nn.Module) -> int:
    """Count S, the tokens of an image inside the encoder: the patches and, if there is one, the CLS token."""
    return side_length(tower) ** 2 + has_cls_token(tower)


def short_counts(tower: nn.Module, config: VisionZipConfig) -> TokenCounts:
    """Count the tokens of one encoder input (image, tile or frame) that a setting keeps."""
    return token_counts(config, side_length(tower) ** 2, has_cls_token(tower))


def full_length(base: nn.Module, tower: nn.Module, arguments: Arguments) -> int:
    """Count the visual tokens of one encoder input in the uncompressed model, by its rule for the first token.

    The rule ``"default"`` leaves out the first token, whether or not it is a CLS token, and ``"full"`` keeps it.
    """
    strategy = arguments.get("vision_feature_select_strategy") or base.config.vision_feature_select_strategy
    return sequence_length(tower) - (strategy == "default")


def check_pixels(pixels: Any, name: str, tower: nn.Module, leading: str) -> None:
    """Check that pixels have the shape (``leading``, 3, h, w) of the encoder; leading is "N" or "N, tiles", say.

    Raises:
        ValueError: the pixels have another shape.
    """
    edge = tower.config.image_size
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    dims = leading.count(",") + 4
    if not isinstance(pixels, Tensor) or pixels.ndim != dims or tuple(pixels.shape[-3:]) != (3, edge, edge):
        raise ValueError(
            f"{name} must be ({leading}, 3, {edge}, {edge}) for this model, got {shape}: prepare the inputs with the "
            "model's own processor"
        )


def check_layer(base: nn.Module, arguments: Arguments) -> None:
    """Refuse another encoder layer in a call, as a zipped model reads the layer of its setting.

    Raises:
        ValueError: the call names another layer than the model's config.
    """
    layer = arguments.get("vision_feature_layer")
    if layer is not None and layer != base.config.vision_feature_layer:
        raise ValueError(
            f"vision_feature_layer={layer!r} was given, but a zipped model reads the layer of its setting: call "
            "visionzip(model, layer=…), or unzip(model) first"
        )


def patch_places(compressed: CompressedTokens, dropped: int) -> Tensor:
    """Find the places (B, T) of tokens among the placeholders of an encoder input.

    A CLS token that has no placeholder gets the place of the first patch.

    Args:
        compressed: the chosen tokens of B encoder inputs.
        dropped: how many tokens at the sequence's beginning have no placeholder (1 with ``"default"``).
    """
    return (compressed.kept - dropped).clamp(min=0)


def joined(tokens: Tensor, compressed: CompressedTokens, frames: int, full: int, dropped: int) -> Encoded:
    """Join the chosen tokens of each video, frame after frame; an image is a video of one frame.

    Args:
        tokens: (N * frames, T, hidden_size), the tokens behind the projector.
        compressed: the same tokens before it, and where they come from.
        frames: how many frames a video has.
        full: how many placeholders a frame has in the uncompressed prompt.
        dropped: how many tokens at the sequence's beginning have no placeholder.
    """
    offsets = full * torch.arange(len(tokens), device=compressed.kept.device).remainder(frames)[:, None]
    places = patch_places(compressed, dropped) + offsets

    def by_video(values: Tensor) -> list[Tensor]:
        return list(values.unflatten(0, (-1, frames)).flatten(1, 2))

    sizes = None if compressed.sizes is None else by_video(compressed.sizes)
    return Encoded(by_video(tokens), by_video(places), sizes)


def plain_modality(pixels: str, tower: str, *, frames: bool = False, every: bool = False, **options: Any) -> Modality:
    """Define images, or videos whose frames are compressed one by one without pooling.

    Args:
        pixels: the argument that has the pixels, (N, 3, h, w) or (N, frames, 3, h, w).
        tower: the attribute of the base model that holds the encoder.
        frames: whether they are videos.
        every: whether the model has a placeholder for every token, whatever its rule for the first token is.
        **options: other attributes of :class:`Modality`.
    """
    shape: dict[str, Any] = {"pixels": pixels, "tower": tower, "frames": frames, "every": every}
    return Modality(pixels, partial(_plain_runs, **shape), partial(_plain_encode, **shape), **options)


def _plain_shape(
    base: nn.Module, arguments: Arguments, pixels: str, tower: str, frames: bool, every: bool
) -> tuple[Tensor, nn.Module, int, int]:
    """Check the pixels; return them, the encoder, the frames of a video, and the placeholders of a frame."""
    values, encoder = arguments[pixels], getattr(base, tower)
    check_layer(base, arguments)
    check_pixels(values, pixels, encoder, "N, frames" if frames else "N")
    full = sequence_length(encoder) if every else full_length(base, encoder, arguments)
    return values, encoder, values.shape[1] if frames else 1, full


def _plain_runs(base: nn.Module, config: VisionZipConfig, arguments: Arguments, **shape: Any) -> list[Run]:
    values, encoder, frames, full = _plain_shape(base, arguments, **shape)
    return [Run(frames * full, frames * short_counts(encoder, config).total)] * len(values)


def _plain_encode(base: nn.Module, config: VisionZipConfig, arguments: Arguments, **shape: Any) -> Encoded:
    values, encoder, frames, full = _plain_shape(base, arguments, **shape)
    images = values.flatten(0, 1) if shape["frames"] else values
    compressed = compress_images(encoder, images, config, base.multi_modal_projector)
    features = base.multi_modal_projector(compressed.tokens)
    encoded = joined(features, compressed, frames, full, sequence_length(encoder) - full)
    return encoded._replace(hidden=compressed.tokens)
