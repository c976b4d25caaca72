"""SparseVLM (ICML 2025, arXiv 2410.04417, version 1.5): drop visual tokens layer by layer, rated by the question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionzip.language.pruning import Model, attach_pruning
from visionzip.language.selection import Keep
from visionzip.language.stages import Pruning

LAYERS = (2, 6, 15)
# How many tokens the released code keeps after each of LAYERS, recycled ones not counted. The key is its budget, the
# average over the 32 layers of LLaVA-1.5-7B: (2 x 576 + 4 a + 10 b + 16 c) / 32 gives 191, 126, 94 and 62.
COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


def sparsevlm(
    model: Model, keep: Sequence[Keep] = COUNTS[64], layers: Sequence[int] = LAYERS, recycle: bool = True
) -> Model:
    """Drop visual tokens after some layers, by the attention that the question's visual words pay them.

    1. Before the first layer the text raters are chosen: the tokens after the last image that are more similar to the
       image than the average (:func:`text_raters`).
    2. In each of ``layers``, a visual token's score is the attention of the raters, mean over heads and raters. The
       next layer sees the ``keep`` visual tokens of highest score.
    3. The better ones of the dropped tokens are recycled: they are merged into a few tokens (:func:`recycled`), which
       follow the kept visual tokens.

    The shortened prompt gets consecutive positions, and the answer's tokens continue them. Nothing is random.

    The numbers in :data:`COUNTS` are the released code's. The paper has a rule by matrix rank instead, but its scale
    was never published. Version 2 of the code, which keeps positions and recycles nothing, is not implemented. As with
    ``fastv``, tokens are chosen once per prompt, each layer's KV cache holds the tokens that this layer has seen, and
    the next turn has to come with the whole conversation.

    Args:
        model: a LLaVA model of this repository or of transformers, zipped or not, or a PEFT wrapper around one. It is
            changed in place; another call of ``sparsevlm`` or ``fastv`` replaces the pruning, and ``remove_pruning``
            removes it.
        keep: how many visual tokens are kept after each of ``layers``, recycled ones not counted: numbers, or fractions
            of the prompt's visual tokens. :data:`COUNTS` has the published numbers; the default is those for 64.
        layers: the scored layers, ascending (0 is the model's first).
        recycle: whether the better ones of the dropped tokens are merged; otherwise all dropped tokens are lost.

    Returns:
        The same object.

    Raises:
        TypeError: the model's family is not supported, or the model is a vision tower alone.
        ValueError: the layers are not ascending, the model lacks one of them, or ``keep`` does not fit them.
    """
    if len(keep) != len(layers) or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"keep={tuple(keep)} and layers={tuple(layers)}: give ascending layers, and what to keep after each of them"
        )
    pruning = Pruning(dict(zip(layers, keep, strict=True)), text_raters, recycled if recycle else None, renumber=True)
    return attach_pruning(model, pruning)


def text_raters(embeds: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    """Choose the text tokens of one prompt that are more similar to its visual tokens than the average.

    With v_1 … v_V the visual tokens, the similarity of text token t after the last image is the mean over the visual
    tokens v of ``softmax_t(v . t)``, the softmax over all text tokens after the last image. If no text token is above
    the mean similarity, because all are alike or there is only one, all of them are raters.

    Args:
        embeds: (L, D), the first layer's input.
        visual: (L,) bool, true for visual tokens.
        real: (L,) bool, false for padding.

    Returns:
        (L,) bool, true for the raters; false everywhere if there are no visual tokens.

    Raises:
        ValueError: no text follows the last image.

    Source: the paper's section on text raters.
    """
    raters = torch.zeros_like(visual)
    if not visual.any():
        return raters
    after = torch.arange(len(visual), device=visual.device) > visual.nonzero().max()
    text = (after & real).nonzero().flatten()
    if len(text) == 0:
        raise ValueError(
            "SparseVLM rates visual tokens by the text after the last image, and this prompt has none: end it with "
            "the question, or with the conversation template"
        )
    with torch.autocast(embeds.device.type, enabled=False):
        similarity = (embeds[visual].float() @ embeds[text].float().T).softmax(dim=-1).mean(dim=0)
    above = similarity > similarity.mean()
    return raters.index_fill(0, text[above] if above.any() else text, True)


def num_recycled(dropped: int) -> int:
    """Count the tokens into which recycling merges: one for every 10 of the better 30 %, and one more; of none, 0."""
    return (int(0.3 * dropped) + 1) // 10 + 1 if dropped else 0


def single_layer_keep(tokens: int, visual: int) -> int:
    """Compute how many visual tokens to keep after a single pruning layer so that T remain with the recycled ones.

    Of 576 visual tokens, 180, 114 and 48 are kept for 192, 128 and 64.

    Args:
        tokens: T, the visual tokens that the later layers may see.
        visual: the visual tokens of a prompt.

    Returns:
        The largest number that, with its recycled tokens, does not exceed T.

    Raises:
        ValueError: T is more than there are visual tokens, or fewer than the recycled ones alone.
    """
    if not num_recycled(visual) <= tokens <= visual:
        raise ValueError(
            f"SparseVLM cannot make {tokens} of {visual} visual tokens: give {num_recycled(visual)} to {visual}"
        )
    return max(keep for keep in range(visual + 1) if keep + num_recycled(visual - keep) <= tokens)


def recycled(dropped: Tensor, scores: Tensor) -> Tensor:
    """Merge the better 30 % of the dropped tokens into a tenth as many, by density-peak clustering.

    With k clusters, a token's density is ``exp(-mean of its k smallest squared distances)``, its distance 0 to itself
    included, and its separation is the distance to the nearest denser token. The k tokens whose product of density and
    separation is highest are the centres. Each token joins the nearest centre (L2), and each cluster becomes its mean.
    The released code adds a little noise to the densities; here equal densities resolve to the lower index.

    Args:
        dropped: (n, D), the dropped tokens in the order of the sequence.
        scores: (n,), the raters' attention on them.

    Returns:
        (m, D), the merged tokens in the order of their centres in the sequence; :func:`num_recycled` computes m.

    Source: the paper's section on token recycling; the released code where they differ (L2, mean).
    """
    clusters = num_recycled(len(dropped))
    better = scores.argsort(descending=True, stable=True)[: int(0.3 * len(dropped)) + 1].sort().values
    tokens = dropped[better.to(dropped.device)].float()
    clusters = min(clusters, len(tokens))
    with torch.autocast(tokens.device.type, enabled=False):
        # The shortcut by matrix products is inexact: equal tokens would have a distance.
        distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = (-distance.topk(clusters, largest=False).values.square().mean(dim=1)).exp()
    place = torch.arange(len(tokens), device=tokens.device)
    earlier = (density[None] == density[:, None]) & (place[None] < place[:, None])
    denser = (density[None] > density[:, None]) | earlier  # (n, n): whether the column's token is denser than the row's
    separation = distance.masked_fill(~denser, torch.inf).amin(dim=1)
    separation = separation.where(denser.any(dim=1), distance.max())
    centres = (density * separation).argsort(descending=True, stable=True)[:clusters].sort().values
    member = distance[:, centres].argmin(dim=1)
    member[centres] = torch.arange(clusters, device=tokens.device)  # even if another centre is equal to it
    sums = torch.zeros_like(tokens[:clusters]).index_add_(0, member, tokens)
    return (sums / member.bincount(minlength=clusters)[:, None]).to(dropped.dtype)
