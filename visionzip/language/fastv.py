"""FastV (ECCV 2024, arXiv 2403.06764): drop the visual tokens that get little attention in an early layer."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.language.pruning import Model, attach_pruning
from visionzip.language.selection import Keep
from visionzip.language.stages import Pruning


def fastv(model: Model, layer: int = 2, keep: Keep = 0.5) -> Model:
    """Let the layers from ``layer`` on see only the visual tokens to which the prompt's last token attends most.

    A visual token's score is the attention that the prompt's last token pays it in layer ``layer`` - 1, mean over
    heads; equal scores resolve to the lower index. Kept tokens stay in order and keep their position ids, and text is
    always kept. Tokens are chosen once, in the prefill: the KV caches of the layers before ``layer`` hold the whole
    prompt, and those of the other layers the shortened one. As the choice depends on the question, the next turn of a
    conversation has to come with the whole conversation, so that its own last token chooses anew. Text that follows
    the KV cache of a pruned prompt sees the tokens that this prompt kept.

    Args:
        model: a LLaVA model of this repository or of transformers, zipped or not, or a PEFT wrapper around one. It is
            changed in place; another call of ``fastv`` or ``sparsevlm`` replaces the pruning, and ``remove_pruning``
            removes it.
        layer: the first layer that sees fewer tokens, at least 1 (0 is the model's first layer); the paper's K.
        keep: how many visual tokens of a prompt are kept, for all its images together: a number, or a fraction (the
            paper's 1 - R). :func:`fastv_keep` computes the number for a budget that is an average over layers.

    Returns:
        The same object.

    Raises:
        TypeError: the model's family is not supported, or the model is a vision tower alone.
        ValueError: the model has no such layer, or ``keep`` is outside its limits.
    """
    if layer < 1:
        raise ValueError(f"layer={layer}: FastV scores tokens in the layer before, so layer must be at least 1")
    return attach_pruning(model, Pruning({layer - 1: keep}, queries=_last_token))


def fastv_keep(average: int, visual: int, layers: int, layer: int = 2) -> int:
    """Compute how many visual tokens FastV has to keep for a budget that is an average over all layers.

    For LLaVA-1.5-7B with 576 visual tokens and 32 layers, the budgets 192, 128 and 64 mean 166, 98 and 30 kept tokens
    (152, 82 and 11 with ``layer=3``). Some papers count the tokens after the cut instead: then the budget is ``keep``.

    Args:
        average: the budget, the mean number of visual tokens per layer.
        visual: the visual tokens of a prompt.
        layers: the number of layers of the language model.
        layer: the first layer that sees fewer tokens.

    Returns:
        The number of visual tokens to give as ``keep``.

    Raises:
        ValueError: there is no such layer, the layers before it alone exceed the budget, or the budget exceeds the
            visual tokens.
    """
    if not 1 <= layer < layers:
        raise ValueError(f"layer={layer} of {layers}: FastV can shorten the input of layers 1 to {layers - 1}")
    whole = layer * visual
    kept = (average * layers - whole) / (layers - layer)
    if not 0 <= kept <= visual:
        raise ValueError(
            f"an average of {average} visual tokens is impossible for FastV from layer {layer} of {layers}: it lies "
            f"between {whole / layers:.4g} (none kept) and {visual}. Count what is kept after the cut instead"
        )
    return round(kept)


def _last_token(embeds: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    """Mark a prompt's last token that is not padding: (L,) bool."""
    last = real.nonzero().max()
    return torch.zeros_like(real).index_fill(0, last[None], True)
