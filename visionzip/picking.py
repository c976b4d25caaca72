"""``picked_tokens(model, patches)``: for a while a model sees the patches that someone has picked, and no others."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from visionzip.apply import unwrap
from visionzip.config import Positions, VisionZipConfig
from visionzip.encoder import has_cls_token
from visionzip.integrations import Integration, family_of, find_integration
from visionzip.methods import METHODS, has_size_bias, positions_of
from visionzip.methods.picked import Patches, picked, picked_rows

_numbers = itertools.count(1)  # two models may have picked tokens at once


@contextmanager
def picked_tokens(model: nn.Module, patches: Patches, cls_token: bool = False) -> Iterator[None]:
    """Let a model see only the patches that are picked, during the ``with`` block.

    Inside it the model is zipped with them: ``generate``, a chat or :func:`visionzip.token_map.inspect_tokens` runs as
    with any other method, at the encoder layer and with the positions of the model's setting. Behind it, also after an
    exception, the model has its setting of before, or none. One model cannot have two picks at once, so threads take
    turns.

    Args:
        model: as :func:`visionzip.visionzip` takes it.
        patches: their numbers, row by row from 0 (row * columns + column), in any order: to be kept of each encoder
            input (image, tile, frame), behind transformers' seam of its merged tokens; or a list of them for each
            encoder input in order (of LLaVA-NeXT the whole image, then the tiles row by row), equally long.
        cls_token: keep the CLS token too, where the encoder has one.

    Raises:
        TypeError: the model is of no supported family, or a number is no integer.
        ValueError: no patch is picked, one is outside the grid, or the lists differ in length; where the model runs,
            also that there are not as many lists as encoder inputs.
    """
    target = unwrap(model)
    integration = find_integration(target)
    before, has_cls, positions = _setting(integration, target)
    own = before or integration.default(target)
    keep = len(picked_rows(patches)[0]) + (cls_token and has_cls)
    name = f"picked-{next(_numbers)}"
    positions = positions or positions_of(own)
    counts = {"keep": keep, "max_tokens": None, "min_tokens": 1, "video_keep": None}
    config = replace(own, method=name, **counts, positions=positions, size_bias=has_size_bias(own))
    stored = getattr(getattr(target, "config", None), "visionzip", None)
    METHODS[name] = picked(patches, cls_token)
    try:
        _attach(integration, target, config)
        try:
            yield
        finally:
            if before is None:
                integration.detach(target)
            else:
                _attach(integration, target, before)
            if stored is not None:  # also of a model that was loaded with a setting, and not zipped yet
                target.config.visionzip = stored
    finally:
        del METHODS[name]


def _setting(integration: Integration, model: nn.Module) -> tuple[VisionZipConfig | None, bool, Positions | None]:
    """A model's setting, whether its encoder has a CLS token, and the only positions it can have, if there are such."""
    zipped = getattr(model, "_visionzip", None)
    try:
        encoder = integration.encoders(model)["image"]
    except ValueError:  # behind transformers' seam: tokens are chosen among what an encoder of any kind returns
        return zipped and zipped.config, False, "original" if family_of(model).rotary else None
    return encoder.setting, has_cls_token(encoder.vision_model), None


def _attach(integration: Integration, model: nn.Module, config: VisionZipConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all patches may be picked; and the setting is the user's own
        integration.attach(model, config)
