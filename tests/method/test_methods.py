"""The methods on tensors: each equals a slow, obvious reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import pixels
from visionzip import VisionZipConfig, visionzip
from visionzip.encoder import choose_tokens
from visionzip.methods import METHODS, EncoderRead, scope, token_counts
from visionzip.methods.agile import HIGHEST, MEAN_RANK, STEP, effective_rank
from visionzip.methods.controls import pooled_grid

CHOOSERS = ["random", "uniform", "cen-prune", "divprune", "scope", "agile", "norm", "visionzip-plus"]


# --- slow references: one image, plain loops over what the papers say ---


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.normalize(a, dim=0) @ F.normalize(b, dim=0))


def slow_farthest_first(x: Tensor, count: int, weight: list[float], first: int | None = None) -> list[int]:
    numbers = range(len(x))
    distance = [[1 - cosine(x[i], x[j]) for j in numbers] for i in numbers]
    loneliest = max(numbers, key=lambda i: min(distance[i][j] for j in numbers if j != i))
    chosen = [loneliest if first is None else first]
    while len(chosen) < count:
        rest = [i for i in numbers if i not in chosen]
        chosen.append(max(rest, key=lambda i: weight[i] * min(distance[i][s] for s in chosen)))
    return chosen


def slow_divprune(x: Tensor, a: Tensor, count: int) -> list[int]:
    return slow_farthest_first(x, count, [1.0] * len(x))


def slow_cen_prune(x: Tensor, a: Tensor, count: int) -> list[int]:
    numbers = range(len(x))
    g = [-sum(cosine(x[i], x[j]) for j in numbers if j != i) / (len(x) - 1) for i in numbers]
    weight = [(value - min(g)) / (max(g) - min(g)) for value in g]
    return slow_farthest_first(x - x.mean(dim=0), count, weight)


def slow_plus(x: Tensor, a: Tensor, count: int) -> list[int]:
    attention = a.tolist()
    weight = [(value / max(attention)) ** 0.25 for value in attention]
    return slow_farthest_first(x - x.mean(dim=0), count, weight, first=attention.index(max(attention)))


def slow_scope(x: Tensor, a: Tensor, count: int) -> list[int]:
    numbers = range(len(x))
    covered, chosen = [0.0] * len(x), []
    while len(chosen) < count:
        gain = {
            i: float(a[i]) * sum(max(0.0, cosine(x[i], x[j]) - covered[j]) for j in numbers)
            for i in numbers
            if i not in chosen
        }
        chosen.append(max(gain, key=lambda i: gain[i]))
        covered = [max(covered[j], cosine(x[chosen[-1]], x[j])) for j in numbers]
    return chosen


def slow_agile(x: Tensor, a: Tensor, count: int) -> list[int]:
    order = sorted(range(len(x)), key=lambda i: -float(a[i]))
    singular = torch.linalg.svdvals(x)
    share = singular / singular.sum()
    rank = math.exp(-float((share * share.clamp(min=1e-30).log()).sum()))
    chosen, dropped = [], []
    waiting = list(order)
    while waiting and len(chosen) < count:
        i = waiting.pop(0)
        chosen.append(i)
        threshold = min((order.index(i) + 1) * rank / (MEAN_RANK * len(x)) * STEP, HIGHEST)
        near = [j for j in waiting if 1 - cosine(x[i], x[j]) <= threshold]
        dropped += near
        waiting = [j for j in waiting if j not in near]
    return (chosen + sorted(dropped, key=order.index))[:count]


def slow_norm(x: Tensor, a: Tensor, count: int) -> list[int]:
    return sorted(range(len(x)), key=lambda i: -float(x[i].norm()))[:count]


SLOW = {
    "divprune": slow_divprune,
    "cen-prune": slow_cen_prune,
    "visionzip-plus": slow_plus,
    "scope": slow_scope,
    "agile": slow_agile,
    "norm": slow_norm,
}


def read_of(x: Tensor, a: Tensor, cls_token: bool = True) -> EncoderRead:
    """What an encoder would give of patches (B, N, D) with attention (B, N), whose projector changes nothing."""
    batch, patches, width = x.shape
    states = torch.cat([torch.full((batch, int(cls_token), width), 7.0), x], dim=1)
    side = math.isqrt(patches)
    return EncoderRead(states, cls_token, scores=a, keys=states, projected=x, pixels=x, grid=(side, side))


def chosen_of(name: str, read: EncoderRead, keep: int) -> Tensor:
    """Numbers of the patches that a method keeps, (B, K) in the order of the sequence."""
    compressed = choose_tokens(read, VisionZipConfig(keep=keep, method=name))
    rows = compressed.dominant_indices[..., None].expand(-1, -1, read.hidden_states.shape[-1])
    assert torch.equal(compressed.tokens, read.hidden_states.gather(1, rows))
    return compressed.dominant_indices - int(read.cls_token)


@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 16), cls_token=st.booleans())
def test_equals_the_slow_reference(name: str, seed: int, keep: int, cls_token: bool):
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(3, 16, 8, generator=generator) + 0.5, torch.rand(3, 16, generator=generator)
    expected = [sorted(SLOW[name](x[i], a[i], keep)) for i in range(3)]
    assert chosen_of(name, read_of(x, a, cls_token), keep).tolist() == expected


@pytest.mark.parametrize("name", CHOOSERS)
def test_hard_inputs(name: str):
    """Equal patches, zero norms, no attention: K different patches all the same, lower numbers first where all tie."""
    for x in (torch.ones(2, 16, 4), torch.zeros(2, 16, 4)):
        for keep in (1, 5, 15):
            chosen = chosen_of(name, read_of(x, torch.zeros(2, 16)), keep)
            assert all(len(set(row)) == keep for row in chosen.tolist())
            if name not in ("random", "uniform"):
                assert chosen.tolist() == [list(range(keep))] * 2


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pool"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers(name: str, value: float):
    """Still K different patches; who gets the tokens refuses them."""
    for broken in (slice(3, 7), slice(None)):
        x, a = torch.randn(2, 16, 4), torch.rand(2, 16)
        x[:, broken], a[:, broken] = value, value
        kept = choose_tokens(read_of(x, a), VisionZipConfig(keep=6, method=name)).kept
        assert all(len(set(row)) == 6 for row in kept.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_all_that_there_are(name: str):
    """A budget of all tokens and more keeps them as they are, in order, without CLS where the method takes none."""
    read = read_of(torch.randn(2, 16, 4), torch.rand(2, 16))
    for keep in (17, 40):
        compressed = choose_tokens(read, VisionZipConfig(keep=keep, method=name)) if name != "pool" else None
        counts = token_counts(VisionZipConfig(keep=keep, method=name), 16, True)
        if compressed is not None:
            assert torch.equal(compressed.tokens, read.hidden_states[:, 17 - counts.total :])


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_batch_is_its_images(name: str):
    x, a = torch.randn(5, 16, 8), torch.rand(5, 16)
    whole = chosen_of(name, read_of(x, a), 6)
    assert torch.equal(whole[2:3], chosen_of(name, read_of(x[2:3], a[2:3]), 6))
    assert torch.equal(whole.flip(0), chosen_of(name, read_of(x.flip(0), a.flip(0)), 6))


@pytest.mark.parametrize("name", ["scope", "agile", "norm", "visionzip-plus"])  # the others begin with one of a pair
def test_the_order_of_patches_does_not_matter(name: str):
    x, a = torch.randn(1, 16, 8), torch.rand(1, 16)
    order = torch.randperm(16)
    one, other = (chosen_of(name, read_of(*each), 6)[0] for each in ((x, a), (x[:, order], a[:, order])))
    assert sorted(order[other].tolist()) == one.tolist()


@pytest.mark.parametrize(
    "name", ["visionzip", "no-cls", "cen-prune", "divprune", "scope", "agile", "norm", "visionzip-plus", "uniform"]
)
def test_compiles_to_one_graph(name: str):
    read, config = read_of(torch.randn(2, 16, 8), torch.rand(2, 16)), VisionZipConfig(keep=5, method=name)
    counts = token_counts(config, 16, True)

    def choose(states: Tensor, scores: Tensor) -> Tensor:
        own = EncoderRead(states, True, scores=scores, keys=states, projected=states[:, 1:], grid=(4, 4))
        return METHODS[name].choose(own, counts, config).tokens

    torch.compiler.reset()  # the function is the same for all names, and its graphs are limited in number
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(read.hidden_states, read.scores), choose(read.hidden_states, read.scores))


@pytest.mark.parametrize("name", ["cen-prune", "agile", "scope"])
def test_a_compiled_step_is_one_subgraph(name: str):
    """However many tokens are chosen, so that 640 steps compile in seconds."""
    minima = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        minima.append(sum(node.target is torch.minimum for part in parts for node in part.graph.nodes))
        return graph

    read, config = read_of(torch.randn(2, 16, 8), torch.rand(2, 16)), VisionZipConfig(keep=12, method=name)
    choose, counts = METHODS[name].choose, token_counts(config, 16, True)
    compiled = torch.compile(choose, fullgraph=True, backend=count)(read, counts, config)
    assert torch.equal(compiled.kept, choose(read, counts, config).kept)
    assert minima == [1]


@pytest.mark.parametrize("copies", [1, 4])
def test_scope_looks_again_at_few_patches(copies: int, monkeypatch: pytest.MonkeyPatch):
    """As many as it takes: two at a time give the same choice as all of them, where patches are equal too."""
    monkeypatch.setattr(scope, "RENEWED", 2)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 16 // copies, 8, generator=generator).repeat(1, copies, 1)
        a = torch.rand(3, 16 // copies, generator=generator).repeat(1, copies)
        whole = read_of(x, a)
        lazily = chosen_of("scope", whole, 11)
        monkeypatch.setattr(scope, "_step_lazily", scope._step)
        assert torch.equal(lazily, chosen_of("scope", whole, 11))
        monkeypatch.undo()
        monkeypatch.setattr(scope, "RENEWED", 2)
        if copies == 1:
            assert lazily.tolist() == [sorted(slow_scope(x[i], a[i], 11)) for i in range(3)]


def test_effective_rank():
    """n equal directions have rank n; the singular values say the same as those of torch's SVD."""
    assert effective_rank(torch.eye(8)[None]).item() == pytest.approx(8, rel=1e-4)
    assert effective_rank(torch.ones(1, 8, 4)).item() == pytest.approx(1, abs=0.05)


def test_uniform_is_evenly_spaced():
    read = read_of(torch.randn(2, 16, 4), torch.rand(2, 16))
    for tokens, expected in ((1, [8]), (4, [2, 6, 10, 14]), (3, [2, 8, 13])):
        assert chosen_of("uniform", read, tokens).tolist() == [expected, expected]


def test_random_depends_on_the_image_and_the_seed_only():
    x = torch.randn(400, 16, 4)
    chosen = {seed: choose_tokens(read_of(x, x[..., 0]), config(seed)).dominant_indices for seed in (0, 1)}
    assert not torch.equal(chosen[0], chosen[1])
    counts = chosen[0].flatten().bincount(minlength=17)[1:]
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, standard deviation below 9


def config(seed: int) -> VisionZipConfig:
    return VisionZipConfig(keep=4, method="random", seed=seed)


def test_pool_averages_cells_of_the_grid():
    read = read_of(torch.randn(2, 16, 4), torch.rand(2, 16))
    rows = read.patches.unflatten(1, (4, 4))
    cells = [rows[:, 2 * y : 2 * y + 2, x].mean(dim=1) for y in range(2) for x in range(4)]
    pooled = choose_tokens(read, VisionZipConfig(keep=8, method="pool"))
    torch.testing.assert_close(pooled.tokens, torch.stack(cells, dim=1))
    assert pooled.kept[0].tolist() == [5, 6, 7, 8, 13, 14, 15, 16]  # the lower patch of each cell, CLS counted
    assert pooled.assignment[0, 1:].unflatten(0, (4, 4)).tolist() == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_pooled_grids():
    grids = {16: (4, 4), 32: (4, 8), 48: (6, 8), 64: (8, 8), 128: (8, 16), 192: (12, 16), 7: (1, 7)}
    assert {tokens: pooled_grid(tokens, (24, 24)) for tokens in grids} == grids
    with pytest.raises(ValueError, match=r"tokens=26 cannot be pooled: its squarest grid is 2 x 13.*12 x 12 patches"):
        pooled_grid(26, (12, 12))


def test_no_cls_is_visionzip_without_its_first_token(load):
    model, images = load()[1], pixels(2)
    whole = visionzip(model, 5, 1).visual_tokens(images)
    without = visionzip(model, keep=5, method="no-cls").visual_tokens(images)  # 4 patches and a contextual token
    for mine, all_of_them in zip(without, whole, strict=True):
        torch.testing.assert_close(mine, all_of_them[1:])


def test_a_part_that_was_not_read_is_named():
    read = read_of(torch.randn(1, 4, 8), torch.rand(1, 4)).replace(scores=None)
    assert not read.has("scores") and read.has("keys")
    with pytest.raises(ValueError, match=r"read\.scores, which was not read .* reads=frozenset\(\{\"scores\"\}\)"):
        METHODS["visionzip-plus"].choose(read, token_counts(VisionZipConfig(keep=2), 4, True), VisionZipConfig(keep=2))
