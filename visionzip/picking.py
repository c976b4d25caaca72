"""Let a model see only the patches that a person has picked, for a while: ``picked_tokens(model, patches)``."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from visionzip.apply import unwrap
from visionzip.config import VisionZipConfig
from visionzip.encoder import has_cls_token
from visionzip.integrations import Integration, family_of, find_integration
from visionzip.integrations.seam.base import SeamFamily
from visionzip.methods import METHODS, has_size_bias, positions_of
from visionzip.methods.picked import Patches, picked, picked_rows

if TYPE_CHECKING:
    from visionzip.integrations.huggingface import Family

_numbers = itertools.count(1)  # each pick has a name of its own, as two models may have one at the same time


@contextmanager
def picked_tokens(
    model: nn.Module, patches: Patches | Sequence[Sequence[int] | None], cls_token: bool = False
) -> Iterator[None]:
    """Let a model see only the patches that are picked, during the ``with`` block.

    Inside the block the model is zipped with these patches, with the encoder layer and the positions of its own
    setting, so that ``generate``, a chat or :func:`visionzip.token_map.inspect_tokens` runs as with any other method.
    After the block, even after an exception, the model has its former setting again, or none. A model has one pick at a
    time, so threads have to take turns.

    Args:
        model: a model that :func:`visionzip.visionzip` takes.
        patches: the patches' numbers, row by row from 0 (row * columns + column), in any order: one list, whose patches
            are kept of every encoder input (image, tile, frame), or one list for each encoder input, equally long.
            LLaVA-NeXT's inputs are the whole image, then the tiles row by row. In families that choose among merged
            tokens, these count as patches; there, lists may also differ in length, and None leaves an image to the
            setting that the model has.
        cls_token: whether to keep the CLS token too, if the encoder has one.

    Raises:
        TypeError: the model's family is not supported, or a patch's number is no integer.
        ValueError: no patch is picked, a patch is outside the grid, or the lists differ in length. A run of the model
            raises it if there are as many lists as neither 1 nor the encoder inputs.
    """
    target = unwrap(model)
    integration = find_integration(target)
    before, has_cls, seam = _setting(integration, target)
    own = before or integration.default(target)
    positions = "original" if seam and seam.rotary else positions_of(own)
    own = replace(own, positions=positions, size_bias=has_size_bias(own))
    stored = getattr(getattr(target, "config", None), "visionzip", None)
    names: list[str] = []
    try:
        if isinstance(seam, SeamFamily) and _lists(patches) > 1:
            rows = cast("Sequence[Sequence[int] | None]", patches)
            parts = tuple(own if row is None else _register(names, own, row, False, True) for row in rows)
            config = _register(names, own, [0], False, True, parts)
        else:
            one = cast("Patches", patches)
            config = _register(names, own, one, cls_token and has_cls, seam is not None)
        _attach(integration, target, config)
        try:
            yield
        finally:
            if before is None:
                integration.detach(target)
            else:
                _attach(integration, target, before)
            if stored is not None:  # a model may have been loaded with a setting and not zipped yet
                target.config.visionzip = stored
    finally:
        for name in names:
            del METHODS[name]


def _lists(patches: Any) -> int:
    """Count the encoder inputs that have a list, or None, of their own; 0 for one plain list."""
    return 0 if any(hasattr(entry, "__index__") for entry in patches) else len(patches)


def _register(
    names: list[str],
    own: VisionZipConfig,
    patches: Patches,
    cls_token: bool,
    any_size: bool,
    parts: tuple[VisionZipConfig, ...] = (),
) -> VisionZipConfig:
    """Register a method for picks, note its name, and return a setting with it."""
    name = f"picked-{next(_numbers)}"
    keep = len(picked_rows(patches)[0]) + cls_token
    counts: dict[str, Any] = {"keep": keep, "max_tokens": None, "min_tokens": 1, "video_keep": None}
    method = replace(picked(patches, cls_token), parts=parts)
    # Where images have any size, only the running model knows the grid, and checks it.
    METHODS[name] = replace(method, check=lambda tokens, grid: None) if any_size else method
    names.append(name)
    return replace(own, method=name, **counts)


def _setting(integration: Integration, model: nn.Module) -> tuple[VisionZipConfig | None, bool, Family | None]:
    """A model's setting, whether its encoder has a CLS token, and its family if it is behind transformers' seam."""
    try:
        encoder = integration.encoders(model)["image"]
    except ValueError:  # an encoder of another kind, of which only the merged tokens are known
        zipped = getattr(model, "_visionzip", None)
        return zipped and zipped.config, False, family_of(model)
    return encoder.setting, has_cls_token(encoder.vision_model), None


def _attach(integration: Integration, model: nn.Module, config: VisionZipConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # picking all patches is no mistake, and the setting was there
        integration.attach(model, config)
