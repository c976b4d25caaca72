"""SparseVLM (ICML 2025, arXiv 2410.04417, version 1.5): drop visual tokens layer by layer, rated by the question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionzip.language.pruning import Model, attach_pruning
from visionzip.language.selection import Keep
from visionzip.language.stages import Pruning

LAYERS = (2, 6, 15)
# Tokens that the released code keeps after LAYERS, recycled ones not counted, by its budgets: averages over the 32
# layers of LLaVA-1.5-7B, of 576 visual tokens. (2 x 576 + 4 a + 10 b + 16 c) / 32 gives 191, 126, 94 and 62.
COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


def sparsevlm(
    model: Model, keep: Sequence[Keep] = COUNTS[64], layers: Sequence[int] = LAYERS, recycle: bool = True
) -> Model:
    """Drop visual tokens after some layers, by the attention that the question's visual words pay them.

    The text raters are chosen before the first layer: the tokens after the last image that are more similar to the
    image than the average (see :func:`text_raters`). In each of ``layers``, a visual token's score is the raters'
    attention, mean over heads and raters, and the next layer sees the ``keep`` tokens of highest score. The better ones
    of the dropped tokens are recycled: merged into a few (see :func:`recycled`), which follow the kept visual tokens.
    The shortened prompt gets consecutive positions, which the answer's tokens continue. Nothing is random.

    The released code's fixed numbers take the place of the paper's rank rule, whose scale was never published; its
    version 2 keeps positions and recycles nothing. As with ``fastv``, tokens are chosen once per prompt, each layer's
    KV cache holds the tokens that this layer has seen, and the next turn comes with the whole conversation.

    Args:
        model: a LLaVA model of this repository or of transformers, zipped or not, or a PEFT wrapper around one. In
            place; calling it or ``fastv`` again replaces what is attached, and ``remove_pruning`` takes it off.
        keep: for each of ``layers``, a number of visual tokens, or a fraction of the prompt's, recycled ones not
            counted. :data:`COUNTS` has the published numbers; default: those for 64.
        layers: the scored ones, ascending (0 is the model's first).
        recycle: merge the better ones of those that are dropped.

    Returns:
        The same object.

    Raises:
        TypeError: the model is of no supported family, or only a vision tower.
        ValueError: the layers are not ascending, the model lacks one, or ``keep`` does not fit them.
    """
    if len(keep) != len(layers) or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"keep={tuple(keep)} and layers={tuple(layers)}: give ascending layers, and what to keep after each of them"
        )
    pruning = Pruning(dict(zip(layers, keep, strict=True)), text_raters, recycled if recycle else None, renumber=True)
    return attach_pruning(model, pruning)


def text_raters(embeds: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    """Choose the text tokens of one prompt that are more similar to its visual tokens than the average.

    Similarity is the softmax, over the text after the last image, of the plain dot product with a visual token; mean
    over the visual tokens. Where all are alike, or there is one text token only, all are raters.

    Args:
        embeds: (L, D), the first layer's input.
        visual: (L,) bool.
        real: (L,) bool, false for padding.

    Returns:
        (L,) bool; false everywhere without visual tokens.

    Source: the paper's section on text raters.
    """
    raters = torch.zeros_like(visual)
    if not visual.any():
        return raters
    after = torch.arange(len(visual), device=visual.device) > visual.nonzero().max()
    text = (after & real).nonzero().flatten()
    if len(text) == 0:
        raise ValueError(
            "SparseVLM needs text after the last image, to rate visual tokens by; the prompt has none: end it with "
            "the question, or with the conversation template"
        )
    with torch.autocast(embeds.device.type, enabled=False):
        similarity = (embeds[visual].float() @ embeds[text].float().T).softmax(dim=-1).mean(dim=0)
    above = similarity > similarity.mean()
    return raters.index_fill(0, text[above] if above.any() else text, True)


def num_recycled(dropped: int) -> int:
    """Count the tokens that recycling makes: one for every 10 of the better 30 %, and one more; 0 of none dropped."""
    return (int(0.3 * dropped) + 1) // 10 + 1 if dropped else 0


def single_layer_keep(tokens: int, visual: int) -> int:
    """Compute how many visual tokens to keep, so that they and the recycled ones are T behind a single pruning layer.

    With 576: 180, 114 and 48 for 192, 128 and 64.

    Args:
        tokens: T.
        visual: visual tokens of a prompt.

    Returns:
        The largest number that does not exceed T with its recycled tokens.

    Raises:
        ValueError: T is more than there are, or fewer than recycling makes.
    """
    if not num_recycled(visual) <= tokens <= visual:
        raise ValueError(
            f"SparseVLM cannot make {tokens} of {visual} visual tokens: give {num_recycled(visual)} to {visual}"
        )
    return max(keep for keep in range(visual + 1) if keep + num_recycled(visual - keep) <= tokens)


def recycled(dropped: Tensor, scores: Tensor) -> Tensor:
    """Merge the better 30 % of the dropped tokens into a tenth as many, by density-peak clustering.

    A token's density is exp(-mean of the squared distances to its k nearest, itself included), k the number of
    clusters; its separation is the distance to the nearest denser token. Centres are the tokens with the highest
    product of both; each token joins the nearest centre (L2), and each cluster becomes its mean. The released code adds
    a little noise to the densities; here equal ones resolve to the lower index.

    Args:
        dropped: (n, D), in the order of the sequence.
        scores: (n,), the raters' attention.

    Returns:
        (m, D) in the order of the centres in the sequence; m of :func:`num_recycled`.

    Source: the paper's section on token recycling; the released code where they differ (L2, mean).
    """
    clusters = num_recycled(len(dropped))
    better = scores.argsort(descending=True, stable=True)[: int(0.3 * len(dropped)) + 1].sort().values
    tokens = dropped[better.to(dropped.device)].float()
    clusters = min(clusters, len(tokens))
    with torch.autocast(tokens.device.type, enabled=False):
        # exact: the shortcut by matrix products makes equal tokens differ
        distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = (-distance.topk(clusters, largest=False).values.square().mean(dim=1)).exp()
    place = torch.arange(len(tokens), device=tokens.device)
    earlier = (density[None] == density[:, None]) & (place[None] < place[:, None])
    denser = (density[None] > density[:, None]) | earlier  # (n, n): is the second denser than the first
    separation = distance.masked_fill(~denser, torch.inf).amin(dim=1)
    separation = separation.where(denser.any(dim=1), distance.max())
    centres = (density * separation).argsort(descending=True, stable=True)[:clusters].sort().values
    member = distance[:, centres].argmin(dim=1)
    member[centres] = torch.arange(clusters, device=tokens.device)  # a centre may lie on another
    sums = torch.zeros_like(tokens[:clusters]).index_add_(0, member, tokens)
    return (sums / member.bincount(minlength=clusters)[:, None]).to(dropped.dtype)
