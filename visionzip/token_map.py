"""What a model's vision tower looks at, keeps and merges, patch by patch, for :mod:`visionzip.visualize` to draw."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionzip.apply import unwrap
from visionzip.attention import QueriesKeys, patch_scores, read_attention
from visionzip.compress import CompressedTokens
from visionzip.config import VisionZipConfig
from visionzip.encoder import compress_images, has_cls_token, hidden_states, layers_needed, side_length
from visionzip.integrations import find_integration
from visionzip.integrations.encoders import Encoder
from visionzip.methods import Method, method_of, token_counts
from visionzip.placement import Rectangle, patch_rectangles


class PatchRoles(NamedTuple):
    """What a zipped tower does with the N patches of one image.

    Attributes:
        dominant: (N,) bool, the patches that are kept as they are.
        groups: (N,) int64, slot 0..M-1 of the contextual token that a patch goes into; -1 for the dominant ones, and
            those that are dropped.
        targets: (M,) int64, the patch that each contextual token's other patches join.
        sizes: (N,) float32, patches that the token at each patch stands for, by the setting's ``size_bias``; 0 where no
            token is. None without ``size_bias``.
    """

    dominant: Tensor
    groups: Tensor
    targets: Tensor
    sizes: Tensor | None = None


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
        setting: by which patches are kept and merged; None if the tower is not zipped.
        method: the one that the setting names.
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
        """N."""
        return self.attention.shape[1]

    @property
    def num_kept(self) -> int:
        """Visual tokens that a zipped tower makes of the image: CLS, if it keeps that, dominant and contextual ones."""
        return self.keeps_cls + int(self.roles.dominant.sum()) + len(self.roles.targets)

    @property
    def num_top(self) -> int:
        """How many patches captions call the top ones: as many as are dominant; a tenth if none is."""
        kept = 0 if self.roles is None else int(self.roles.dominant.sum())
        return kept or max(1, self.num_patches // 10)

    @property
    def kept_share(self) -> float:
        """Share, 0 to 1, of the deciding layer's attention on patches that the dominant ones hold."""
        scores = self.attention[self.layer]
        return float(scores[self.roles.dominant].sum() / scores.sum())

    def top_share(self, layer: int) -> float:
        """Share, 0 to 1, of a layer's attention on patches that its :attr:`num_top` highest ones hold."""
        scores = self.attention[layer]
        return float(scores.topk(self.num_top).values.sum() / scores.sum())


def token_data(tokens: TokenMap, region: Rectangle) -> dict[str, Any]:
    """Say what a :class:`TokenMap` holds in plain numbers and lists, for a page; nothing is drawn.

    Args:
        tokens: of one image or tile.
        region: (left, top, right, bottom), what of the original image its pixels show, in pixels of that image
            (:mod:`visionzip.placement`).

    Returns:
        A dict that ``json`` takes. Patches are numbered row by row from 0, N in all:

        - ``region`` [left, top, right, bottom]; ``grid`` [rows, columns]; ``rects``: of each patch, as the region; they
          reach outside of the image where the processor padded it;
        - ``attention``: of each layer, of each patch, mean over heads; ``score``: that of the layer that decides;
          ``rank``: 1 for the patch of highest score (of equal ones the first), to N;
        - ``role`` of each patch: ``"kept"``; ``"target"``, of a contextual token; ``"merged"`` into one; ``"dropped"``.
          ``into``: the patch that stands for it, itself or its target, None if it is dropped;
        - ``groups``: of each contextual token its ``target``, ``patches`` (the target among them) and ``size``, their
          number;
        - ``sizes``: of each patch what its token stands for with ``size_bias``, 0 without a token; None without bias.

        The last four are None if the model is not zipped.
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
    into = [targets[slot] if slot >= 0 else None for slot in roles.groups.tolist()]
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
    """Four digits that count: 24 layers of 576 patches are to be sent."""
    return [float(f"{value:.4g}") for value in values.tolist()]


@torch.inference_mode()
def inspect_tokens(model: nn.Module, images: Tensor, processor: Any = None) -> list[TokenMap]:
    """Run a model's image encoder to its end and note the attention in every layer and what becomes of every patch.

    The scores come from the layers' own queries and keys, whatever the attention kernel. Layers whose weights the
    checkpoint lacks (a tower of LLaVA never uses its last one) are left out.

    Args:
        model: a model of a supported family, zipped or not, a vision tower of LLaVA's, or a wrapper of PEFT or
            ``torch.compile`` around one. Methods that choose by patches behind the projector need a model.
        images: (B, 3, h, w), as the model's image processor makes them. Tiles (B, T, 3, h, w) are images of their own:
            ``images[:, 0]`` are those that show the whole image, ``images.flatten(0, 1)`` all. Of Video-LLaVA also
            videos, as its processor makes them; their frames are images of their own here, one after the other. (Other
            families of videos pool a frame before they choose among its tokens, which no patch is then.)
        processor: the model's processor or image processor, whose normalisation is undone in the pictures. Needed for
            transformers' own models; others have theirs.

    Returns:
        A :class:`TokenMap` of each image; with ``roles`` if the model is zipped.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: the images' shape is not the encoder's, the model has no vision tower, the method needs a projector
            and there is none, or no processor is known.
        OSError: the tower has no image processor, so the images cannot be shown.
    """
    target = unwrap(model)
    integration = find_integration(target)
    encoder = _encoder_for(integration.encoders(target), images)
    pixels, over_time = encoder.inputs(images)
    tower = encoder.vision_model
    pixels = pixels.to(tower.dtype)  # as the model does: methods that draw at random go by the values
    setting = encoder.setting or integration.default(target)
    layer = layers_needed(tower, setting.layer) - 1
    if layer >= encoder.trained:
        raise ValueError(f"layer={setting.layer} has no weights in this checkpoint: choose one before it")
    side, cls_token = side_length(tower), has_cls_token(tower)
    shown = _as_shown(pixels, _image_processor(encoder, processor, target), side * tower.config.patch_size)
    attention = _attention_of_layers(encoder, pixels, over_time)
    roles, method, keeps_cls = [None] * len(pixels), None, False
    if encoder.setting is not None:
        method = method_of(setting)
        roles = roles_of(compress_images(tower, pixels, setting, encoder.project, **over_time), cls_token)
        keeps_cls = token_counts(setting, side**2, cls_token).cls_token
    return [
        TokenMap(shown[i], (side, side), attention[i], layer, cls_token, roles[i], keeps_cls, encoder.setting, method)
        for i in range(len(pixels))
    ]


def _encoder_for(encoders: dict[str, Encoder], images: Tensor) -> Encoder:
    """The encoder that these images go through, or, of five dimensions, these videos."""
    if "video" in encoders and images.ndim == 5:
        return encoders["video"]
    encoder = encoders["image"]
    edge = encoder.vision_model.config.image_size
    if images.ndim != 4 or images.shape[0] == 0 or tuple(images.shape[1:]) != (3, edge, edge):
        raise ValueError(
            f"images must be (B, 3, {edge}, {edge}) with B >= 1, got {tuple(images.shape)}: prepare them with the "
            "model's image processor, and of LLaVA-NeXT's tiles (B, T, 3, h, w) give images[:, 0]. Frames of a video "
            "are images too, but only Video-LLaVA chooses among their patches; other families pool them before"
        )
    return encoder


def _image_processor(encoder: Encoder, processor: Any, model: nn.Module) -> Any:
    if processor is not None:
        return getattr(processor, "image_processor", processor)
    if encoder.processor is None:
        raise ValueError(
            f"{type(model).__name__} of transformers does not hold its image processor, without which images cannot be "
            "shown as they were: give processor=AutoProcessor.from_pretrained(…)"
        )
    return encoder.processor()


def _attention_of_layers(encoder: Encoder, pixels: Tensor, over_time: dict[str, Any]) -> Tensor:
    """(B, L, N), mean over heads, of the layers that have trained weights."""
    tower, cls_token = encoder.vision_model, has_cls_token(encoder.vision_model)

    def mean_over_heads(read: QueriesKeys) -> Tensor:
        return patch_scores(read, cls_token) / read.queries.shape[1]

    with ExitStack() as stack:
        layers = tower.encoder.layers[: encoder.trained]
        readers = [stack.enter_context(read_attention(layer.self_attn, mean_over_heads)) for layer in layers]
        hidden_states(tower, pixels, encoder.trained, **over_time)
        return torch.stack([reader.result() for reader in readers], dim=1).cpu()


def _as_shown(images: Tensor, processor: Any, covered: int) -> Tensor:
    """Pixels (B, covered, covered, 3) in 0..1: the processor's normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (images.cpu().float() * std + mean).clamp(0, 1)
    return pixels[:, :, :covered, :covered].permute(0, 2, 3, 1)


def roles_of(compressed: CompressedTokens, cls_token: bool) -> list[PatchRoles]:
    """Positions in the sequence as numbers of patches, for each image."""
    first = int(cls_token)
    groups = compressed.assignment.cpu()
    dominant = torch.zeros_like(groups, dtype=torch.bool).scatter(1, compressed.dominant_indices.cpu(), True)
    targets = compressed.target_indices.cpu() - first
    sizes: list[Tensor | None] = [None] * len(groups)
    if compressed.sizes is not None:
        sizes = list(torch.zeros(groups.shape).scatter(1, compressed.kept.cpu(), compressed.sizes.cpu())[:, first:])
    return [PatchRoles(*image) for image in zip(dominant[:, first:], groups[:, first:], targets, sizes, strict=True)]
