"""Language models the obvious way, to check fast ones by: one prompt, full attention matrices, no cache.

Everything is computed again from the prompt's embeddings and the tokens generated so far, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = list[dict[str, Any]]


def norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions of heads (H, L, Dh)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def windowed(config: Any, layer: int) -> bool:
    """Of a model with a sliding window: all layers, if it does not say which."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or kinds[layer] == "sliding_attention"


def layer_forward(
    layer: Any, config: Any, x: Tensor, positions: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One decoder layer on (L, D): its output, and its attention matrix (H, L, L).

    Of counts (L, L), each query counts each key so many times (0: it does not see it); None is causal.
    """
    attention, length = layer.self_attn, len(x)
    base = config.rope_parameters["rope_theta"]
    groups = config.num_attention_heads // config.num_key_value_heads
    h = norm(layer.input_layernorm, x)
    q, k, v = (
        torch.nn.functional.linear(h, projection.weight, projection.bias)
        .view(length, -1, attention.head_dim)
        .transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rotate(q, positions, base), rotate(k, positions, base)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    logits = q @ k.transpose(1, 2) / attention.head_dim**0.5
    counts = torch.ones(length, length).tril() if counts is None else counts
    if (window := getattr(config, "sliding_window", None)) and windowed(config, attention.layer_idx):
        counts = counts * torch.ones(length, length).triu(1 - window)
    weights = logits.exp() * counts
    weights = weights / weights.sum(-1, keepdim=True)
    x = x + (weights @ v).transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
    h = norm(layer.post_attention_layernorm, x)
    mlp = layer.mlp
    return x + (torch.nn.functional.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)) @ (
        mlp.down_proj.weight.T
    ), weights


def slow_sized(backbone: Any, embeds: Tensor, sizes: Tensor, places: Tensor, visible: Tensor) -> Tensor:
    """Hidden states of one prompt (L, D) whose tokens stand at places and count s times each in attention."""
    x = embeds
    for layer in backbone.layers:
        x, _ = layer_forward(layer, backbone.config, x, places, sizes * visible)
    return norm(backbone.norm, x)


def slow_forward(
    model: Any,
    prompt: Tensor,
    visual: Tensor,
    answer: list[int],
    prune: Callable[..., Any],
    positions: Sequence[int] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Logits of the next token, and the positions in the prompt that are kept after each cut (-1: a recycled token).

    Args:
        prompt: (L, D) embeddings.
        visual: (L,) bool.
        answer: token ids generated so far.
        prune: called after each layer with its number, its attention matrix (H, S, S) without the answer's tokens, the
            state of the prompt (a list of dictionaries with ``x``, ``visual``, ``place``, ``position``) and the
            prompt's embeddings and visual mask; returns the state for the next layer, None if nothing is pruned there.
        positions: of the prompt's L tokens, ascending; consecutive from 0 if None.
    """
    backbone, config = model.get_model(), model.config
    later = backbone.embed_tokens(torch.tensor(answer, dtype=torch.long))
    state = [
        {"x": x, "visual": bool(v), "place": place, "position": position}
        for place, (x, v, position) in enumerate(zip(prompt, visual, positions or range(len(prompt)), strict=True))
    ]
    kept = []
    for number, layer in enumerate(backbone.layers):
        start = state[-1]["position"] + 1
        now = torch.tensor([token["position"] for token in state] + [start + i for i in range(len(later))])
        x = torch.cat([torch.stack([token["x"] for token in state]), later])
        x, weights = layer_forward(layer, config, x, now)
        size = len(state)
        later = x[size:]
        state = [{**token, "x": row} for token, row in zip(state, x[:size], strict=True)]
        shorter = prune(number, weights[:, :size, :size], state, prompt, visual)
        if shorter is not None:
            state = shorter
            kept.append([token["place"] for token in state])
    last = later[-1] if answer else state[-1]["x"]
    return norm(backbone.norm, last) @ model.lm_head.weight.T, kept


def slow_fastv(layer: int, number: int) -> Callable[..., Any]:
    """What prunes as FastV, for :func:`slow_forward`."""

    def prune(index: int, weights: Tensor, state: State, prompt: Tensor, visual: Tensor) -> Any:
        if index != layer - 1 or sum(token["visual"] for token in state) <= number:
            return None
        scores = weights.mean(0)[-1]
        ranked = sorted((i for i, token in enumerate(state) if token["visual"]), key=lambda i: -scores[i].item())
        return [token for i, token in enumerate(state) if not token["visual"] or i in ranked[:number]]

    return prune


def slow_sparsevlm(layers: tuple[int, ...], numbers: tuple[int, ...]) -> Callable[..., Any]:
    """What prunes as SparseVLM, for :func:`slow_forward`."""

    def prune(index: int, weights: Tensor, state: State, prompt: Tensor, visual: Tensor) -> Any:
        if index not in layers:
            return None
        number = numbers[layers.index(index)]
        places = [i for i, token in enumerate(state) if token["visual"]]
        if len(places) <= number:
            return None
        raters = slow_raters(prompt, visual)
        rows = [i for i, token in enumerate(state) if token["place"] in raters]
        scores = weights.mean(0)[rows].mean(0)
        ranked = sorted(places, key=lambda i: -scores[i].item())
        chosen, dropped = ranked[:number], ranked[number:]
        better = sorted(dropped[: int(0.3 * len(dropped)) + 1])
        merged = slow_clusters([state[i]["x"] for i in better], (int(0.3 * len(dropped)) + 1) // 10 + 1)
        new = [{"x": x, "visual": True, "place": -1} for x in merged]
        last = places[-1]
        result = [token for i, token in enumerate(state) if i <= last and (not token["visual"] or i in chosen)]
        result += new + state[last + 1 :]
        return [{**token, "position": state[0]["position"] + i} for i, token in enumerate(result)]

    return prune


def slow_raters(prompt: Tensor, visual: Tensor) -> set[int]:
    """Places in the prompt of the text raters."""
    raw = [place for place, flag in enumerate(visual) if flag]
    text = range(raw[-1] + 1, len(prompt))
    share = torch.zeros(len(text))
    for place in raw:
        share += torch.stack([prompt[place] @ prompt[t] for t in text]).softmax(0) / len(raw)
    return {t for t, value in zip(text, share, strict=True) if value > share.mean()} or set(text)


def slow_clusters(tokens: list[Tensor], clusters: int) -> list[Tensor]:
    """Means of the clusters of density-peak clustering, in the order of their centres."""
    clusters = min(clusters, len(tokens))
    size = range(len(tokens))
    distance = [[(a - b).square().mean().sqrt().item() for b in tokens] for a in tokens]
    density = [torch.tensor(sorted(row)[:clusters]).square().mean().neg().exp().item() for row in distance]
    greatest = max(max(row) for row in distance)
    separation = []
    for i in size:
        denser = [distance[i][j] for j in size if density[j] > density[i] or (density[j] == density[i] and j < i)]
        separation.append(min(denser) if denser else greatest)
    centres = sorted(sorted(size, key=lambda i: -density[i] * separation[i])[:clusters])
    groups: dict[int, list[Tensor]] = {centre: [] for centre in centres}
    for i in size:
        nearest = i if i in groups else min(centres, key=lambda centre: distance[i][centre])
        groups[nearest].append(tokens[i])
    return [torch.stack(group).mean(0) for group in groups.values()]
