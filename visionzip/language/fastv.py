"""FastV (ECCV 2024, arXiv 2403.06764): visual tokens that get little attention early on are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.language.pruning import Model, attach_pruning
from visionzip.language.selection import Keep
from visionzip.language.stages import Pruning


def fastv(model: Model, layer: int = 2, keep: Keep = 0.5) -> Model:
    """Let the layers from ``layer`` on see only the visual tokens to which the prompt's last token attends most.

    The score is the attention of the prompt's last token in layer ``layer`` - 1, mean over heads; equal scores resolve
    to the lower index. What is kept stays in order and keeps its position ids; text is always kept. Choosing happens
    once, in the prefill: the KV cache of the layers before holds the whole prompt, that of the others the shortened
    one. The choice depends on the question, so that the next turn of a conversation is given whole again, and chosen
    anew by its own last token; what follows the KV cache of a pruned prompt sees what was kept then.

    Args:
        model: a LLaVA model, zipped or not, or a PEFT wrapper around one. In place; calling it or ``sparsevlm`` again
            replaces what is attached, and ``remove_pruning`` takes it off.
        layer: the first layer (0 is the model's first) that sees fewer, at least 1: the paper's K.
        keep: of each prompt's visual tokens, those of all its images together: a number, or a fraction (the paper's
            1 - R). :func:`fastv_keep` gives the number for a budget that is an average over layers.

    Returns:
        The same object.

    Raises:
        TypeError: the model is of no supported family, or only a vision tower.
        ValueError: the model has no such layer, or ``keep`` is outside its limits.
    """
    if layer < 1:
        raise ValueError(f"layer={layer}: FastV scores the layer before, so that the first it can shorten is 1")
    return attach_pruning(model, Pruning({layer - 1: keep}, queries=_last_token))


def fastv_keep(average: int, visual: int, layers: int, layer: int = 2) -> int:
    """How many visual tokens FastV keeps if their average over all layers is to be the budget.

    With LLaVA-1.5-7B's 576 tokens and 32 layers: 166, 98 and 30 for 192, 128 and 64 (152, 82 and 11 with layer 3). The
    other convention in the literature calls what is kept after the cut the budget: then it is ``keep`` itself.

    Args:
        average: the budget.
        visual: visual tokens of a prompt.
        layers: of the language model.
        layer: the first that sees fewer.

    Raises:
        ValueError: the layers before already see more than that on average, the budget is more than there are, or
            there is no such layer.
    """
    if not 1 <= layer < layers:
        raise ValueError(f"layer={layer} of {layers}: FastV can shorten what layers 1 to {layers - 1} see")
    whole = layer * visual
    kept = (average * layers - whole) / (layers - layer)
    if not 0 <= kept <= visual:
        raise ValueError(
            f"an average of {average} visual tokens cannot be had by FastV from layer {layer} of {layers}: it lies "
            f"between {whole / layers:.4g} (none kept) and {visual}. Count what is kept after the cut instead"
        )
    return round(kept)


def _last_token(embeds: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    last = real.nonzero().max()
    return torch.zeros_like(real).index_fill(0, last[None], True)
