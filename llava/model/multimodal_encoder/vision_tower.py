"""The vision tower: an image encoder that stops at the layer LLaVA reads, with VisionZip's compression stage in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llava.model.checkpoints.files import load_weights, weight_files
from llava.model.checkpoints.loading import gathered, no_load_report
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.multimodal_encoder.tower_files import read_image_processor, resolve_tower_path
from visionzip import CompressedTokens, VisionZipConfig
from visionzip.encoder import compress_images, hidden_states, layers_needed, side_length
from visionzip.methods import TokenCounts, token_counts


class VisionEncoder(nn.Module):
    """Holds transformers' encoder under the name ``vision_model``.

    LLaVA's checkpoints have that name in their keys (``model.vision_tower.vision_tower.vision_model.…``), while
    transformers 5 keeps the encoder flat.
    """

    def __init__(self, vision_model: PreTrainedModel) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole encoder, as transformers' class does (the tower itself stops earlier)."""
        return self.vision_model(*args, **kwargs)


class VisionTower(nn.Module):
    """Base of the towers, with LLaVA's attribute names; a subclass names transformers' classes.

    Args:
        vision_tower: hub name or folder of the encoder (``config.mm_vision_tower``); a relative folder may also lie
            inside the checkpoint's.
        args: the model's config: ``mm_vision_select_layer``, ``mm_vision_select_feature`` (``"patch"`` drops the CLS
            token, ``"cls_patch"`` keeps it), and, if stored, ``mm_vision_config`` and ``visionzip``.
        delay_load: build the encoder without weights; :meth:`load_model` loads them, or a checkpoint brings its own.

    Attributes:
        visionzip: the compression stage's setting; None leaves the tower as LLaVA has it.
        is_loaded: whether the encoder has trained weights.
        untrained: names of encoder weights that are random, as no file has them (of layers behind the last one used).
    """

    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PretrainedConfig]]
    processor_class: ClassVar[type]
    cls_token: ClassVar[bool]
    # Fields of the model's config: where the encoder's is stored, and which tokens are selected (else the default).
    config_key: ClassVar[str] = "mm_vision_config"
    feature_key: ClassVar[str] = "mm_vision_select_feature"
    default_feature: ClassVar[str] = "patch"
    key_mapping: ClassVar[dict[str, str] | None] = None  # of the encoder's own weights, where transformers has none
    encoder_prefix: ClassVar[str] = "vision_tower.vision_model."  # of the encoder's weights in the tower

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.vision_tower_name = resolve_tower_path(vision_tower, args)
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, self.feature_key, self.default_feature)
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"{self.feature_key}={self.select_feature!r} is unknown: use 'patch' or 'cls_patch'")
        stored = getattr(args, self.config_key, None)
        config = self.config_class(**stored) if stored else self.config_class.from_pretrained(self.vision_tower_name)
        # The tower runs the attention kernel that was asked for the language model.
        config._attn_implementation = getattr(args, "_attn_implementation", None)
        self._set_encoder(self.model_class(config).requires_grad_(False))
        setting = getattr(args, "visionzip", None)
        self.visionzip = VisionZipConfig.from_dict(setting) if setting else None
        self._image_processor: Any = None
        self._checkpoint = getattr(args, "_name_or_path", "")
        self.is_loaded = False
        self.untrained: frozenset[str] = frozenset()
        if not delay_load:
            self.load_model()

    def load_model(self) -> None:
        """Load the encoder's own weights from ``vision_tower_name``, in place; nothing happens if it has some.

        Raises:
            OSError: there are no weights.
            ValueError: a weight that the tower uses is missing there, or has another shape.
        """
        if self.is_loaded:
            return
        weights = self.read_weights()
        with gathered(self.encoder.parameters()):
            self.encoder.load_state_dict(weights, strict=False)
        self.untrained = frozenset(self.encoder.state_dict().keys() - weights.keys())
        self.is_loaded = True

    def read_weights(self) -> dict[str, Tensor]:
        """The encoder's own weights by name, on the CPU, as ``vision_tower_name`` has them.

        Raises:
            OSError: there are none.
            ValueError: a weight that the tower uses is missing there, or has another shape.
        """
        if Path(self.vision_tower_name).is_dir():
            for file in weight_files(self.vision_tower_name):
                load_weights(file, "meta")  # says which file is damaged
        with no_load_report():
            source, info = self.model_class.from_pretrained(
                self.vision_tower_name,
                config=self.config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                key_mapping=self.key_mapping,
            )
        absent = info["missing_keys"] | {entry[0] for entry in info["mismatched_keys"]}
        if needed := sorted(key for key in absent if self.needs(key)):
            raise ValueError(
                f"the vision tower {self.vision_tower_name!r} lacks {len(needed)} weights, or has them in another "
                f"shape, such as {', '.join(needed[:3])}: the folder is incomplete or holds another model. Download it "
                "again, or set mm_vision_tower in the checkpoint's config.json to the right one"
            )
        with gathered(source.parameters()):
            weights = source.state_dict()
            return {key: value.to("cpu", copy=True) for key, value in weights.items() if key not in absent}

    def _set_encoder(self, encoder: PreTrainedModel) -> None:
        """Hold the encoder under the name that it has in checkpoints."""
        self.vision_tower = VisionEncoder(encoder)

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, a transformers model."""
        return self.vision_tower.vision_model

    @property
    def image_processor(self) -> Any:
        """The encoder's image processor; read from the checkpoint if it is there, else from the tower's.

        Raises:
            OSError: neither can be read.
        """
        if self._image_processor is None:
            self._image_processor = read_image_processor(self, self._checkpoint)
        return self._image_processor

    @image_processor.setter
    def image_processor(self, processor: Any) -> None:
        self._image_processor = processor

    def default_processor(self) -> Any:
        """The processor that encoders of this class are trained with, at this encoder's resolution."""
        edge = self.config.image_size
        return self.processor_class(size={"height": edge, "width": edge})

    def feature_layers(self, select_layer: int) -> int:
        """How many encoder layers produce ``hidden_states[select_layer]``.

        Raises:
            ValueError: the encoder has no such hidden state.
        """
        states = self.config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise ValueError(
                f"mm_vision_select_layer={select_layer} is outside the vision tower's {states} hidden states "
                f"(-{states} to {states - 1})"
            )
        return select_layer % states

    def visionzip_layers(self, setting: VisionZipConfig) -> int:
        """How many encoder layers VisionZip needs: up to and including the scored one.

        Raises:
            ValueError: the encoder has no such layer, or its weights are random, as the checkpoint lacks them.
        """
        layers = layers_needed(self.encoder, setting.layer)
        if any(key.startswith(f"encoder.layers.{layers - 1}.") for key in self.untrained):
            raise ValueError(f"layer={setting.layer} has no weights in this checkpoint: choose one before it")
        return layers

    def needs(self, key: str) -> bool:
        """Whether the tower ever uses the encoder weight of this name (it stops before the last layer)."""
        if key.startswith(("post_layernorm.", "head.")):
            return False
        prefix, _, rest = key.partition("encoder.layers.")
        layers = self.feature_layers(self.select_layer)
        if self.visionzip is not None:
            layers = max(layers, self.visionzip_layers(self.visionzip))
        return bool(prefix) or not rest or int(rest.split(".")[0]) < layers

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Visual tokens before the projector.

        Args:
            images: (B, 3, h, w), or a list of (3, h, w).

        Returns:
            (B, N, D) in the images' type: all patches, or K + M tokens when zipped; a list of (1, N, D) for a list.

        Raises:
            ValueError: the batch is empty, or the images' size is not the encoder's.
        """
        if isinstance(images, list):
            return [self.forward(image[None]) for image in images]
        if self.visionzip is not None:
            return self.compress(images).tokens.to(images.dtype)
        pixels, over_time = self.encoder_inputs(images)
        features = hidden_states(self.encoder, pixels, self.feature_layers(self.select_layer), **over_time)
        if self.cls_token and self.select_feature == "patch":
            features = features[:, 1:]
        return features.to(images.dtype)

    def encode(self, images: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> EncodedImage:
        """Visual tokens of images (B, 3, h, w), with B in the place of an image's tiles T.

        ``project`` is as in :meth:`compress`.
        """
        if self.visionzip is None:
            return EncodedImage(self(images))  # as a call, so that a user's hooks are run
        compressed = self.compress(images, project)
        return EncodedImage(compressed.tokens, compressed.kept, compressed.sizes)

    @torch.compiler.disable  # hooks that come and go cannot be traced; a compiled model runs this part as it is
    def compress(self, images: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> CompressedTokens:
        """Visual tokens of a zipped tower, with what was kept and merged.

        Args:
            images: (B, 3, h, w).
            project: the model's projector, for methods that choose by what is behind it.

        Raises:
            RuntimeError: the tower is not zipped.
            ValueError: as :meth:`forward`.
        """
        setting = self.visionzip
        if setting is None:
            raise RuntimeError("this vision tower is not zipped: call visionzip(model, dominant=54, contextual=10)")
        self.visionzip_layers(setting)
        pixels, over_time = self.encoder_inputs(images)
        return compress_images(self.encoder, pixels, setting, project, **over_time)

    @property
    def counts(self) -> TokenCounts | None:
        """K and M of an image, tile or frame, and whether CLS is among the K; None if the tower is not zipped."""
        setting = self.visionzip
        return None if setting is None else token_counts(setting, self.num_patches_per_side**2, self.cls_token)

    def encoder_inputs(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Checked pixels (B, 3, h, w), and what each layer of the encoder is given besides."""
        edge = self.config.image_size
        if images.ndim != 4 or images.shape[0] == 0 or tuple(images.shape[1:]) != (3, edge, edge):
            raise ValueError(
                f"the vision tower takes images of shape (B, 3, {edge}, {edge}) with B >= 1, got "
                f"{tuple(images.shape)}: prepare them with llava.mm_utils.process_images"
            )
        return images, {}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the encoder's weights."""
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are."""
        return self.encoder.device

    @property
    def config(self) -> PretrainedConfig:
        """The encoder's config."""
        return self.encoder.config

    @property
    def hidden_size(self) -> int:
        """Width of the visual tokens before the projector."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one edge of the image."""
        return side_length(self.encoder)

    @property
    def num_patches(self) -> int:
        """Visual tokens of an image when not zipped."""
        return self.num_patches_per_side**2 + int(self.cls_token and self.select_feature == "cls_patch")

    @property
    def sequence_length(self) -> int:
        """S, tokens inside the encoder: the patches and, if there is one, the CLS token."""
        return self.num_patches_per_side**2 + int(self.cls_token)
