"""FastV (ECCV 2024, arXiv 2403.06764): drop visual tokens that get little attention in an early layer."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.language.pruning import Model, attach_pruning
from visionzip.language.selection import Keep
from visionzip.language.stages import Pruning


def fastv(model: Model, layer: int = 2, keep: Keep = 0.5) -> Model:
    """Let the layers from ``layer`` on see only the visual tokens to which the prompt's last token attends most.

    The score is the attention of the prompt's last token in layer ``layer`` - 1, mean over heads; equal scores resolve
    to the lower index. Kept tokens stay in order and keep their position ids; text is always kept. Tokens are chosen
    once, in the prefill: the KV caches of the layers before ``layer`` hold the whole prompt, those of the others the
    shortened one. As the choice depends on the question, give the next turn of a conversation with the whole
    conversation: its own last token chooses anew. Text behind the KV cache of a pruned prompt sees the tokens that this
    prompt kept.

    Args:
        model: a LLaVA model of this repository or of transformers, zipped or not, or a PEFT wrapper around one. In
            place; calling it or ``sparsevlm`` again replaces what is attached, and ``remove_pruning`` takes it off.
        layer: the first layer (0 is the model's first) that sees fewer, at least 1: the paper's K.
        keep: how many visual tokens of a prompt are kept, of all its images together: a number, or a fraction (the
            paper's 1 - R). :func:`fastv_keep` gives the number for a budget that is an average over layers.

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
    """Compute the visual tokens that FastV keeps from their average over all layers.

    With LLaVA-1.5-7B's 576 tokens and 32 layers: 166, 98 and 30 for 192, 128 and 64 (152, 82 and 11 with layer 3). The
    literature's other convention counts the tokens after the cut: then the budget is ``keep`` itself.

    Args:
        average: the budget, visual tokens per layer.
        visual: visual tokens of a prompt.
        layers: how many the language model has.
        layer: the first that sees fewer.

    Returns:
        A number of visual tokens, for ``keep``.

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
    """Mark the last token (L,) of a prompt that is not padding."""
    last = real.nonzero().max()
    return torch.zeros_like(real).index_fill(0, last[None], True)
