"""Controls: the plainest ways to a budget of T visual tokens per image, and the ablation without the CLS token.

A method that chooses tokens by attention has to beat T patches at random, T evenly spaced ones and T averages. Each
control is a hook on one model's vision tower or projector, and :func:`remove_control` takes it off again: no class is
modified, and the model answers as before. Attaching another control replaces the one that is there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionzip.apply import unwrap
from visionzip.baselines.language import refuse_transformers
from visionzip.integrations import find_integration

Model = TypeVar("Model", bound=nn.Module)

_HANDLE = "_visionzip_control"  # attribute of the tower: the hook that is attached


def random_tokens(model: Model, tokens: int, seed: int = 0) -> Model:
    """Keep T patches of each image at random, in raster order.

    The choice follows from the seed and the image's own pixels, so that it does not depend on the batch, and questions
    about one image see the same patches.

    Args:
        model: a LLaVA model that is not zipped and reads each image as one tile.
        tokens: T, visual tokens per image.
        seed: 0 or more; others choose other patches.

    Returns:
        The same object.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: ``tokens`` is outside 1 to the number of patches, the seed is negative, or the model is zipped,
            reads grids of tiles, passes its CLS token on, or looks closer at patches (Mini-Gemini).
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: use 0 or more")
    start = zlib.crc32(seed.to_bytes(8, "little"))

    def keep(features: Tensor, images: Tensor) -> Tensor:
        indices = [_choice(image, start, features.shape[1], tokens) for image in images]
        return _gather(features, torch.stack(indices).to(features.device))

    return _attach(model, tokens, keep)


def uniform_tokens(model: Model, tokens: int) -> Model:
    """Keep T evenly spaced patches in raster order: of T equal stretches of the sequence, the middle of each.

    Arguments, result and errors are those of :func:`random_tokens`.
    """

    def keep(features: Tensor, images: Tensor) -> Tensor:
        slots = torch.arange(tokens, device=features.device)
        indices = (2 * slots + 1) * features.shape[1] // (2 * tokens)
        return _gather(features, indices.expand(len(features), -1))

    return _attach(model, tokens, keep)


def average_pool(model: Model, tokens: int) -> Model:
    """Average the grid of patches down to T cells, by adaptive pooling; see :func:`pooled_grid`.

    Arguments, result and errors are those of :func:`random_tokens`; ValueError too if no such grid has T cells.
    """
    side = _checked_tower(model, tokens).num_patches_per_side
    grid = pooled_grid(tokens, side)

    def keep(features: Tensor, images: Tensor) -> Tensor:
        cells = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2)

    return _attach(model, tokens, keep)


def pooled_grid(tokens: int, side: int) -> tuple[int, int]:
    """Rows and columns of T cells, as close to a square as T allows (16: 4 x 4, 32: 4 x 8, 48: 6 x 8).

    Args:
        tokens: T.
        side: patches along an edge of the image, which rows and columns cannot exceed.

    Raises:
        ValueError: T has no two factors of at most ``side``.
    """
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    if tokens // rows > side:
        raise ValueError(
            f"tokens={tokens} cannot be pooled: its squarest grid is {rows} x {tokens // rows}, but the image has "
            f"{side} x {side} patches. Use a number with two factors of at most {side}"
        )
    return rows, tokens // rows


def drop_cls_token(model: Model) -> Model:
    """Take the CLS token out of a zipped model's visual tokens: K - 1 patches and M contextual tokens remain.

    An ablation: LLaVA never saw that token in training, VisionZip passes it on.

    Args:
        model: a zipped LLaVA model that reads each image as one tile.

    Returns:
        The same object. Call :func:`remove_control` before ``unzip``.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: the model is not zipped, reads grids of tiles, or has no CLS token.
    """
    target = unwrap(model)
    refuse_transformers(target)
    tower = find_integration(target).vision_tower(target)
    _refuse_tiles(target)
    if tower.visionzip is None or not tower.cls_token:
        what = "is not zipped: call visionzip(model, ...) first" if tower.cls_token else "has no CLS token"
        raise ValueError(f"there is no CLS token to drop: the vision tower {what}")

    def drop(projector: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if tower.visionzip is None:
            raise RuntimeError("the model was unzipped under drop_cls_token: call remove_control(model) before unzip")
        return (args[0][:, 1:], *args[1:])

    _replace(tower, target.get_model().mm_projector.register_forward_pre_hook(drop))
    return model


def remove_control(model: Model) -> Model:
    """Undo whichever function of this module was called last; without any, nothing happens.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: the model has no vision tower.
    """
    target = unwrap(model)
    _replace(find_integration(target).vision_tower(target), None)
    return model


def _attach(model: Model, tokens: int, keep: Callable[[Tensor, Tensor], Tensor]) -> Model:
    """Let ``keep`` make T tokens (B, T, D) of the tower's patches (B, N, D) and its images (B, 3, h, w)."""
    tower = _checked_tower(model, tokens)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if tower.visionzip is not None:
            raise RuntimeError("the model was zipped under a control: call remove_control(model) before visionzip")
        if isinstance(output, list):  # a list of images gives a list of (1, N, D)
            return [keep(features, image[None]) for features, image in zip(output, args[0], strict=True)]
        return keep(output, args[0])

    _replace(tower, tower.register_forward_hook(hook))
    return model


def _checked_tower(model: nn.Module, tokens: int) -> Any:
    target = unwrap(model)
    refuse_transformers(target)
    tower = find_integration(target).vision_tower(target)
    if tower.visionzip is not None:
        raise ValueError("the model is zipped, so a control would see compressed tokens: call unzip(model) first")
    _refuse_tiles(target)
    if hasattr(target, "get_vision_tower_aux"):
        raise ValueError(
            f"{type(target).__name__} looks closer at patches behind its vision tower, but controls drop some there "
            "and do not say which: use a model without patch info mining (LLaVA-1.5)"
        )
    if tower.cls_token and tower.select_feature != "patch":
        raise ValueError(
            f"mm_vision_select_feature={tower.select_feature!r} passes the CLS token on, but controls choose among "
            "patches: use a model with 'patch'"
        )
    patches = tower.num_patches_per_side**2
    if not 1 <= tokens <= patches:
        raise ValueError(f"tokens={tokens} is outside 1 to {patches}, the patches of an image: use fewer")
    return tower


def _refuse_tiles(model: nn.Module) -> None:
    if getattr(model, "takes_videos", False):
        raise ValueError(
            f"{type(model).__name__} reads videos, whose frames controls do not lay out: use a model that takes images "
            "only (LLaVA-1.5)"
        )
    aspect = getattr(model.config, "image_aspect_ratio", None)
    if str(aspect).startswith("anyres"):
        raise ValueError(
            f"image_aspect_ratio={aspect!r} cuts images into grids of tiles, which controls do not lay out: use a "
            "model that reads an image as one tile (LLaVA-1.5)"
        )


def _replace(tower: nn.Module, handle: RemovableHandle | None) -> None:
    if (previous := tower.__dict__.pop(_HANDLE, None)) is not None:
        previous.remove()
    if handle is not None:
        setattr(tower, _HANDLE, handle)


def _choice(image: Tensor, start: int, patches: int, tokens: int) -> Tensor:
    pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    # A checksum of 32 bits: the CPU generator ignores the upper half of a longer seed.
    generator = torch.Generator().manual_seed(zlib.crc32(pixels, start))
    return torch.randperm(patches, generator=generator)[:tokens].sort().values


def _gather(features: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, T, D) of features (B, N, D) at indices (B, T)."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))
