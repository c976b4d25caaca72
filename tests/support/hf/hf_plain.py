"""VisionZip on transformers' models in plain code: one image, one prompt, one token at a time. The tests' reference.

Attention matrices of the eager kernel, one loop per step of the method, no batch, no cache, no ``generate``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hf_models import EOS, IMAGE, VIDEO
from torch import Tensor, nn

# --- the method ---


def plain_encode(tower: nn.Module, pixels: Tensor, layer: int = -2) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, S, D) of an encoder layer, score (B, N) of each patch, keys (B, S, Dk), by eager attention."""
    eager = tower
    if tower.config._attn_implementation != "eager":  # a copy, which gets the gradients
        eager = copy.deepcopy(tower)
        eager.set_attn_implementation("eager")
    output = eager(pixels, output_attentions=True, output_hidden_states=True)
    index = layer % len(eager.encoder.layers)
    scored = eager.encoder.layers[index]
    attention = output.attentions[index]  # (B, H, S, S)
    cls_token = hasattr(tower.embeddings, "class_embedding")
    scores = attention[:, :, 0, 1:].sum(1) if cls_token else attention.mean(2).sum(1)
    keys = scored.self_attn.k_proj(scored.layer_norm1(output.hidden_states[index]))
    heads = scored.self_attn.num_heads
    return output.hidden_states[index + 1], scores, keys.unflatten(-1, (heads, -1)).mean(2)


def plain_select(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[list[int], list[list[int]]]:
    """Positions of the dominant tokens, and for each contextual token its target's and then its members' positions.

    Args:
        scores: (N,) of one image's patches.
        keys: (S, Dk); S is N + 1 with a CLS token.
    """
    first = len(keys) - len(scores)
    ranked = sorted(range(len(scores)), key=lambda patch: -scores[patch].item())
    kept = sorted([patch + first for patch in ranked[: dominant - first]] + [0] * first)
    rest = [position for position in range(len(keys)) if position not in kept]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    groups = {target: [target] for target in targets}
    for position in rest:
        if position not in groups:
            similar = torch.cosine_similarity(keys[position][None], keys[targets])
            groups[targets[similar.argmax()]].append(position)
    return kept, list(groups.values())


Zipped = tuple[Tensor, list[int]]
"""Dominant and contextual tokens (K + M, D) of an image, and the positions of the dominant ones."""


def plain_zip(hidden: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> list[Zipped]:
    """The tokens of each image, from what :func:`plain_encode` returns."""
    zipped = []
    for tokens, score, key in zip(hidden, scores, keys, strict=True):
        kept, groups = plain_select(score, key, dominant, contextual)
        merged = [tokens[target] + (tokens[members].mean(0) if members else 0) for target, *members in groups]
        zipped.append((torch.stack([tokens[position] for position in kept] + merged), kept))
    return zipped


def plain_tiles(tiles: list[Zipped], columns: int, side: int, contextual: int, cls_token: bool = True) -> Tensor:
    """One image's tiles in reading order, (T * (K + M), D).

    The whole image, the patches of all other tiles in raster order of the image, their CLS, their contextual tokens.
    """
    (whole, _), *others = tiles
    patches, cls, merged = [], [], []
    for number, (tokens, kept) in enumerate(others):
        for token, position in zip(tokens, kept, strict=False):
            if cls_token and position == 0:
                cls.append(token)
                continue
            y, x = divmod(position - int(cls_token), side)
            patches.append(((number // columns * side + y, number % columns * side + x), token))
        merged += tokens[len(kept) :]
    patches = [token for _, token in sorted(patches, key=lambda patch: patch[0])]
    assert len(merged) == contextual * len(others)
    return torch.cat([whole, torch.stack(patches + cls + merged)])


# --- what the language model makes of it ---

Run = tuple[int, Tensor]
"""Placeholders that the processor writes for an image or video, and the features (n, d) that take their place."""


def plain_rows(model: Any, inputs: Any, images: Sequence[Run] = (), videos: Sequence[Run] = ()) -> list[Tensor]:
    """Each row's embeddings (n, d) without its padding, with features in the place of each run of placeholders."""
    embed = model.get_input_embeddings()
    return [
        torch.cat([embed(ids) if features is None else features for ids, features in row])
        for row in _segments(inputs["input_ids"], inputs, images, videos)
    ]


def _segments(
    values: Tensor, inputs: Any, images: Sequence[Run], videos: Sequence[Run]
) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """Each row of ``values`` (B, S) without padding, cut into single tokens and runs with their features."""
    runs = {IMAGE: iter(images), VIDEO: iter(videos)}
    for row, ids, mask in zip(values, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        kept, tokens, parts = row[mask], ids[mask], []
        while len(tokens):
            count, features = next(runs[tokens[0].item()]) if tokens[0].item() in runs else (1, None)
            assert (tokens[:count] == tokens[0]).all()
            parts.append((kept[:count], features))
            kept, tokens = kept[count:], tokens[count:]
        yield parts


def plain_logits(model: Any, row: Tensor) -> Tensor:
    """Logits (n, V) of one row's embeddings (n, d)."""
    return model.lm_head(model.model.language_model(inputs_embeds=row[None]).last_hidden_state)[0]


def plain_loss(
    model: Any, inputs: Any, labels: Tensor, images: Sequence[Run] = (), videos: Sequence[Run] = ()
) -> Tensor:
    """Cross-entropy of the labelled tokens of text, each predicted from what stands before it in its row."""
    logits = [plain_logits(model, row)[:-1] for row in plain_rows(model, inputs, images, videos)]
    targets = []
    for row in _segments(labels, inputs, images, videos):
        parts = [own if features is None else own.new_full((len(features),), -100) for own, features in row]
        targets.append(torch.cat(parts)[1:])
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))


def plain_answers(model: Any, row: Tensor, length: int, beams: int = 1) -> list[list[int]]:
    """The best answers of some length to one row's embeddings by beam search (1: greedy), without a cache."""
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        grown = []
        for score, answer in found:
            said = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
            scores = plain_logits(model, torch.cat([row, said]))[-1].log_softmax(-1)
            scores[EOS] = -float("inf")  # min_new_tokens
            best = scores.topk(beams)
            grown += [(score + float(value), [*answer, int(token)]) for value, token in zip(*best, strict=True)]
        found = sorted(grown, reverse=True)[:beams]
    return [answer for _, answer in found]


def text_labels(inputs: Any) -> Tensor:
    """The tokens of text themselves, without those that are special."""
    return inputs["input_ids"].masked_fill(inputs["input_ids"] <= VIDEO, -100)


def check_answers(model: Any, inputs: Any, rows: Sequence[Tensor], beams: int) -> None:
    """Check that all beams of ``generate`` are those of :func:`plain_answers`, behind the user's own prompts."""
    prompt = inputs["input_ids"].repeat_interleave(beams, dim=0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "num_return_sequences": beams}
    output = model.generate(**inputs, **options)
    assert torch.equal(output[:, : prompt.shape[1]], prompt)
    expected = [answer for row in rows for answer in plain_answers(model, row, 4, beams)]
    assert output[:, prompt.shape[1] :].tolist() == expected


def without_the_last_token(inputs: Any) -> dict[str, Tensor]:
    """Prompts that were cut by one token, as a processor with too short a limit does."""
    return {**inputs, **{name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}}
