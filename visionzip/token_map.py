"""What a model's vision tower looks at, keeps and merges, patch by patch, for :mod:`visionzip.visualize` to draw."""

from __future__ import annotations

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
from visionzip.integrations import find_integration


class PatchRoles(NamedTuple):
    """What a zipped tower does with the N patches of one image.

    Attributes:
        dominant: (N,) bool, the patches that are kept as they are.
        groups: (N,) int64, slot 0..M-1 of the contextual token that a patch goes into; -1 for the dominant ones, and
            for all with M = 0, as the rest is dropped then.
        targets: (M,) int64, the patch that each contextual token's other patches join.
    """

    dominant: Tensor
    groups: Tensor
    targets: Tensor


@dataclass(frozen=True)
class TokenMap:
    """One image as the vision tower sees it. Patches are numbered row by row; all tensors are on the CPU.

    Attributes:
        image: (h, w, 3) float32 in 0..1: the pixels that became patches, after the processor has padded, cropped and
            resized (what is left over at the right and the bottom, where patches do not divide the image, is cut off).
        grid: (rows, columns) of patches, N in all, each of h / rows x w / columns pixels.
        attention: (L, N) float32, attention on each patch in each encoder layer, mean over heads: the CLS token's, or
            the mean of what all patches pay in encoders without one. What :func:`visionzip.attention.patch_scores`
            sums.
        layer: 0..L-1, the layer that decides.
        cls_token: whether the encoder has a CLS token, which is no patch and always kept.
        roles: what happens to each patch; None if the tower is not zipped.
        keeps_cls: whether the CLS token is one of the visual tokens of a zipped tower.
    """

    image: Tensor
    grid: tuple[int, int]
    attention: Tensor
    layer: int
    cls_token: bool
    roles: PatchRoles | None = None
    keeps_cls: bool = False

    @property
    def num_patches(self) -> int:
        """N."""
        return self.attention.shape[1]

    @property
    def num_top(self) -> int:
        """How many patches captions call the top ones: as many as are dominant; a tenth if none is."""
        kept = 0 if self.roles is None else int(self.roles.dominant.sum())
        return kept or max(1, self.num_patches // 10)

    def top_share(self, layer: int) -> float:
        """Share, 0 to 1, of a layer's attention on patches that its :attr:`num_top` highest ones hold."""
        scores = self.attention[layer]
        return float(scores.topk(self.num_top).values.sum() / scores.sum())


@torch.inference_mode()
def inspect_tokens(model: nn.Module, images: Tensor) -> list[TokenMap]:
    """Run a model's vision tower to its end and note the attention in every layer and what becomes of every patch.

    The scores come from the layers' own queries and keys, whatever the attention kernel. Layers whose weights the
    checkpoint lacks (a tower of LLaVA never uses its last one) are left out.

    Args:
        model: a model of a supported family, zipped or not, its vision tower, or a PEFT wrapper around one.
        images: (B, 3, h, w), as the model's image processor makes them. LLaVA-NeXT: tiles are images of their own;
            ``images[:, 0]`` are those that show the whole image.

    Returns:
        A :class:`TokenMap` of each image; with ``roles`` if the model is zipped.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: the images' shape is not the encoder's, or the model has no vision tower.
        OSError: the tower has no image processor, so the images cannot be shown.
    """
    target = unwrap(model)
    tower = find_integration(target).vision_tower(target)
    edge = tower.config.image_size
    if images.ndim != 4 or images.shape[0] == 0 or tuple(images.shape[1:]) != (3, edge, edge):
        raise ValueError(
            f"images must be (B, 3, {edge}, {edge}) with B >= 1, got {tuple(images.shape)}: prepare them with the "
            "model's image processor, and of LLaVA-NeXT's tiles (B, T, 3, h, w) give images[:, 0]"
        )
    attention = _attention_of_layers(tower, images)
    side = tower.num_patches_per_side
    pixels = _as_shown(images, tower.image_processor, side * tower.config.patch_size)
    layer = tower.visionzip_layers(tower.visionzip or VisionZipConfig()) - 1
    compress = partial(
        tower.compress, project=getattr(target, "_project", None) or getattr(target, "mm_projector", None)
    )
    roles = [None] * len(images) if tower.visionzip is None else _roles_of(compress(images), tower.cls_token)
    keeps_cls = tower.visionzip is not None and tower.counts.cls_token
    return [
        TokenMap(pixels[i], (side, side), attention[i], layer, tower.cls_token, roles[i], keeps_cls)
        for i in range(len(roles))
    ]


def _attention_of_layers(tower: Any, images: Tensor) -> Tensor:
    """(B, L, N), mean over heads, of the layers that have trained weights."""
    untrained = {int(key.split(".")[2]) for key in tower.untrained if key.startswith("encoder.layers.")}
    layers = [layer for index, layer in enumerate(tower.encoder.encoder.layers) if index not in untrained]

    def mean_over_heads(read: QueriesKeys) -> Tensor:
        return patch_scores(read, tower.cls_token) / read.queries.shape[1]

    with ExitStack() as stack:
        readers = [stack.enter_context(read_attention(layer.self_attn, mean_over_heads)) for layer in layers]
        # The encoder's own forward: the tower's stops at the layer that it needs.
        tower.encoder(images.to(device=tower.device, dtype=tower.dtype))
        return torch.stack([reader.result() for reader in readers], dim=1).cpu()


def _as_shown(images: Tensor, processor: Any, covered: int) -> Tensor:
    """Pixels (B, covered, covered, 3) in 0..1: the processor's normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (images.cpu().float() * std + mean).clamp(0, 1)
    return pixels[:, :, :covered, :covered].permute(0, 2, 3, 1)


def _roles_of(compressed: CompressedTokens, cls_token: bool) -> list[PatchRoles]:
    """Positions in the sequence as numbers of patches, for each image."""
    first = int(cls_token)
    groups = compressed.assignment.cpu()
    dominant = torch.zeros_like(groups, dtype=torch.bool).scatter(1, compressed.dominant_indices.cpu(), True)
    targets = compressed.target_indices.cpu() - first
    return [PatchRoles(*image) for image in zip(dominant[:, first:], groups[:, first:], targets, strict=True)]
