"""Record what a vision tower attends to, keeps and merges, patch by patch; :mod:`visionzip.visualize` draws it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionzip.apply import unwrap
from visionzip.attention import QueriesKeys, patch_scores, read_attention
from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.drawing.placement import Rectangle, patch_rectangles
from visionzip.encoder import compress_images, has_cls_token, hidden_states, layers_needed, side_length
from visionzip.integrations import find_integration
from visionzip.integrations.encoders import Encoder, Pooling
from visionzip.methods import Method, method_of, token_counts


class PatchRoles(NamedTuple):
    """What a zipped tower does with the N patches of one image.

    Attributes:
        dominant: (N,) bool, true for the patches that are kept unchanged.
        groups: (N,) int64, the contextual token (0 to M - 1) that a patch is merged into; -1 for dominant and for
            dropped patches.
        targets: (M,) int64, for each contextual token the patch that its other patches join.
        sizes: (N,) float32, for each patch that has a token, how many patches this stands for; 0 for other patches.
            None if the setting has no ``size_bias``.
    """

    dominant: Tensor
    groups: Tensor
    targets: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class TokenMap:
    """One image as the vision tower sees it. Patches are numbered row by row; all tensors are on the CPU.

    Attributes:
        image: (h, w, 3) float32, 0 to 1: the pixels that became patches, after the processor has padded, cropped and
            resized the image. A rest at the right and the bottom that fills no patch is cut off.
        grid: (rows, columns) of patches, N in all, each of h / rows x w / columns pixels.
        attention: (L, N) float32, the attention on each patch in each encoder layer: the mean over heads, where
            :func:`visionzip.attention.patch_scores` has the sum.
        layer: the scored layer, 0 to L - 1.
        cls_token: whether the encoder has a CLS token, which is no patch.
        roles: what happens to each patch; None if the tower is not zipped.
        keeps_cls: whether the CLS token is one of the visual tokens of a zipped tower.
        setting: the setting by which patches are kept and merged; None if the tower is not zipped.
        method: the method that the setting names; None if the tower is not zipped.
    """

    image: Tensor
    grid: tuple[int, int]
    attention: Tensor
    layer: int
    cls_token: bool
    roles: PatchRoles | None = None
    keeps_cls: bool = False
    setting: VisionZipConfig | None = None
    method: Method | None = None

    @property
    def num_patches(self) -> int:
        """N, the patches of the image."""
        return self.attention.shape[1]

    @property
    def zipped_roles(self) -> PatchRoles:
        """What happens to each patch.

        Raises:
            ValueError: the tower is not zipped.
        """
        if self.roles is None:
            raise ValueError(
                "this model was not zipped, so no patch is kept or merged: call visionzip(model, dominant=54, "
                "contextual=10) before inspect_tokens, or draw attention_map, attention_histogram or layer_panel"
            )
        return self.roles

    @property
    def num_kept(self) -> int:
        """The visual tokens that a zipped tower makes from the image: dominant ones, with CLS, and contextual ones."""
        roles = self.zipped_roles
        return self.keeps_cls + int(roles.dominant.sum()) + len(roles.targets)

    @property
    def num_top(self) -> int:
        """How many patches count as the top ones: as many as are dominant, or a tenth of all if none is."""
        kept = 0 if self.roles is None else int(self.roles.dominant.sum())
        return kept or max(1, self.num_patches // 10)

    @property
    def kept_share(self) -> float:
        """The share, 0 to 1, of the scored layer's attention on patches that the dominant patches get."""
        scores = self.attention[self.layer]
        return float(scores[self.zipped_roles.dominant].sum() / scores.sum())

    def top_share(self, layer: int) -> float:
        """Compute the share, 0 to 1, of a layer's attention on patches that its :attr:`num_top` highest patches get."""
        scores = self.attention[layer]
        return float(scores.topk(self.num_top).values.sum() / scores.sum())


def token_data(tokens: TokenMap, region: Rectangle) -> dict[str, Any]:
    """Convert a :class:`TokenMap` to plain numbers and lists, for a page that draws them.

    Args:
        tokens: the map of one image or tile.
        region: (left, top, right, bottom), the rectangle of the original image that its pixels show, in pixels of that
            image (:mod:`visionzip.drawing.placement`).

    Returns:
        A dict that ``json`` takes. Lists by patch have N entries, row by row.

        - ``region``: [left, top, right, bottom]; ``grid``: [rows, columns]; ``rects``: the rectangle of each patch,
          which reaches outside the image if the processor padded it.
        - ``attention``: for each layer, the attention on each patch, mean over heads; ``score``: the scored layer's;
          ``rank``: 1 for the patch of highest score (equal scores by lower index) to N.
        - ``role``: for each patch ``"kept"``, ``"target"`` (of a contextual token), ``"merged"`` (into one) or
          ``"dropped"``; ``into``: the patch that stands for it, which is itself or its target; None if it is dropped.
        - ``groups``: for each contextual token a dict of its ``target``, its ``patches`` with the target among them,
          and their number, ``size``.
        - ``sizes``: for each patch how many patches its token stands for with ``size_bias``; 0 without a token, and
          None in place of the list without ``size_bias``.

        ``role``, ``into``, ``groups`` and ``sizes`` are None if the model is not zipped.
    """
    score = tokens.attention[tokens.layer]
    order = score.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, torch.arange(1, len(order) + 1))
    found = {
        "region": list(region),
        "grid": list(tokens.grid),
        "rects": [list(rectangle) for rectangle in patch_rectangles(region, tokens.grid)],
        "attention": [_rounded(layer) for layer in tokens.attention],
        "score": _rounded(score),
        "rank": rank.tolist(),
    }
    return found | (_role_data(tokens.roles) if tokens.roles else dict.fromkeys(("role", "into", "groups", "sizes")))


def _role_data(roles: PatchRoles) -> dict[str, Any]:
    targets = roles.targets.tolist()
    into: list[int | None] = [targets[slot] if slot >= 0 else None for slot in roles.groups.tolist()]
    names = []
    for patch, kept in enumerate(roles.dominant.tolist()):
        if kept:
            into[patch] = patch
        merged = "target" if into[patch] == patch else "merged"
        names.append("kept" if kept else "dropped" if into[patch] is None else merged)
    members = [(roles.groups == slot).nonzero().flatten().tolist() for slot in range(len(targets))]
    groups = [
        {"target": target, "patches": patches, "size": len(patches)}
        for target, patches in zip(targets, members, strict=True)
    ]
    sizes = None if roles.sizes is None else roles.sizes.tolist()
    return {"role": names, "into": into, "groups": groups, "sizes": sizes}


def _rounded(values: Tensor) -> list[float]:
    """Round to four significant digits: the page is sent 24 layers of 576 patches."""
    return [float(f"{value:.4g}") for value in values.tolist()]


@torch.inference_mode()
def inspect_tokens(model: nn.Module, images: Tensor, processor: Any = None, *, videos: bool = False) -> list[TokenMap]:
    """Run all layers of a model's image encoder, and record the attention in each and what becomes of every patch.

    The attention is computed from the layers' own queries and keys, whatever the attention kernel is. Layers whose
    weights the checkpoint lacks are left out: a LLaVA tower never uses its last layer.

    Args:
        model: a model of a supported family, zipped or not, a LLaVA vision tower, or a wrapper of PEFT or
            ``torch.compile`` around one. A method that reads patches behind the projector needs a whole model.
        images: (B, 3, h, w) from the model's image processor. Tiles (B, T, 3, h, w) count as images of their own: give
            ``images[:, 0]`` for those that show the whole image, or ``images.flatten(0, 1)`` for all.
        processor: the model's processor or image processor, whose normalisation is undone in the pictures. Models of
            transformers need it; LLaVA towers have their own.
        videos: whether these are videos from the processor, (B, frames, 3, h, w) or Video-LLaVA's (B, 3, frames, h, w).
            Frames count as images, one after the other. Where the model pools the patches of a frame before tokens are
            chosen, the pooled ones are meant by patches, and the attention is pooled alike.

    Returns:
        A :class:`TokenMap` of each image, with ``roles`` if the model is zipped.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: the images do not have the encoder's shape, the model has no vision tower, the method needs a
            projector and there is none, or no processor is known.
        OSError: the tower has no image processor, so the images cannot be shown.
    """
    target = unwrap(model)
    integration = find_integration(target)
    encoder = _encoder_for(integration.encoders(target), images, videos)
    pixels, over_time = encoder.inputs(images)
    tower = encoder.vision_model
    pixels = pixels.to(tower.dtype)  # as the model does: random choices follow from the pixels' values
    setting = encoder.setting or integration.default(target)
    layer = layers_needed(tower, setting.layer) - 1
    if layer >= encoder.trained:
        raise ValueError(f"layer={setting.layer} has no weights in this checkpoint: choose one before it")
    side, cls_token = side_length(tower), has_cls_token(tower)
    shown = _as_shown(pixels, _image_processor(encoder, processor, target), side * tower.config.patch_size)
    attention, choose = _attention_of_layers(encoder, pixels, over_time), partial(compress_images, tower)
    if encoder.pooling is not None:
        base, pooling = encoder.pooling
        attention, choose = pooling.pool(base, attention.mT).mT, partial(_pooled_choice, base, pooling)
        side = math.isqrt(attention.shape[2])
    roles: list[PatchRoles | None] = [None] * len(pixels)
    method, keeps_cls = None, False
    if encoder.setting is not None:
        method = method_of(setting)
        roles[:] = roles_of(choose(pixels, setting, encoder.project, **over_time), cls_token)
        keeps_cls = token_counts(setting, side**2, cls_token).cls_token
    return [
        TokenMap(shown[i], (side, side), attention[i], layer, cls_token, roles[i], keeps_cls, encoder.setting, method)
        for i in range(len(pixels))
    ]


def _pooled_choice(
    base: nn.Module, pooling: Pooling, frames: Tensor, setting: VisionZipConfig, _: Any
) -> CompressedTokens:
    return pooling.choose(base, frames, setting)[1]


def _encoder_for(encoders: dict[str, Encoder], images: Tensor, videos: bool) -> Encoder:
    """Find the encoder of these images, or of these videos."""
    if videos and "video" in encoders:
        return encoders["video"]
    if videos:
        raise ValueError("this model has no encoder of videos: give their frames as images")
    encoder = encoders["image"]
    edge = encoder.vision_model.config.image_size
    if images.ndim != 4 or images.shape[0] == 0 or tuple(images.shape[1:]) != (3, edge, edge):
        raise ValueError(
            f"images must be (B, 3, {edge}, {edge}) with B >= 1, got {tuple(images.shape)}: prepare them with the "
            "model's image processor, and of LLaVA-NeXT's tiles (B, T, 3, h, w) give images[:, 0]. Of videos say "
            "videos=True"
        )
    return encoder


def _image_processor(encoder: Encoder, processor: Any, model: nn.Module) -> Any:
    if processor is not None:
        return getattr(processor, "image_processor", processor)
    if encoder.processor is None:
        raise ValueError(
            f"{type(model).__name__} of transformers does not hold its image processor, whose normalisation has to be "
            "undone to show the images: give processor=AutoProcessor.from_pretrained(…)"
        )
    return encoder.processor()


def _attention_of_layers(encoder: Encoder, pixels: Tensor, over_time: dict[str, Any]) -> Tensor:
    """Record the attention (B, L, N) on patches, mean over heads, in the layers that have trained weights."""
    tower, cls_token = encoder.vision_model, has_cls_token(encoder.vision_model)

    def mean_over_heads(read: QueriesKeys) -> Tensor:
        return patch_scores(read, cls_token) / read.queries.shape[1]

    with ExitStack() as stack:
        layers = tower.encoder.layers[: encoder.trained]
        readers = [stack.enter_context(read_attention(layer.self_attn, mean_over_heads)) for layer in layers]
        hidden_states(tower, pixels, encoder.trained, **over_time)
        return torch.stack([reader.result() for reader in readers], dim=1).cpu()


def _as_shown(images: Tensor, processor: Any, covered: int) -> Tensor:
    """Undo the processor's normalisation: pixels (B, covered, covered, 3), 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (images.cpu().float() * std + mean).clamp(0, 1)
    return pixels[:, :, :covered, :covered].permute(0, 2, 3, 1)


def roles_of(compressed: CompressedTokens, cls_token: bool) -> list[PatchRoles]:
    """Convert positions in the sequence to numbers of patches, for each image."""
    first = int(cls_token)
    groups = compressed.assignment.cpu()
    dominant = torch.zeros_like(groups, dtype=torch.bool).scatter(1, compressed.dominant_indices.cpu(), True)
    targets = compressed.target_indices.cpu() - first
    sizes: list[Tensor | None] = [None] * len(groups)
    if compressed.sizes is not None:
        sizes = list(torch.zeros(groups.shape).scatter(1, compressed.kept.cpu(), compressed.sizes.cpu())[:, first:])
    return [PatchRoles(*image) for image in zip(dominant[:, first:], groups[:, first:], targets, sizes, strict=True)]
