"""VisionZip behind transformers' seam against plain references: what is kept and merged, where it stands, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_plain import plain_select
from seam_models import FAMILIES, IMAGE, VIDEO, Family, Part, Picture, batch
from test_seam_families import GREEDY, answers, mixed
from torch import Tensor, nn

from visionzip import visionzip
from visionzip.attention import read_packed_attention
from visionzip.integrations import family_of
from visionzip.methods.visionzip import split

PACKED = [name for name, family in FAMILIES.items() if family.grids]
SQUARE = [name for name, family in FAMILIES.items() if not family.sizes]


# --- what is kept ---


def eager_scores(model: Any, inputs: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of one picture, (N,) attention received and (N, Dk) keys of its merged tokens, from the eager matrix of S x S."""
    encoder = model.model.visual
    seen: dict[str, Tensor] = {}
    block = encoder.blocks[-1]
    block.attn.qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    block.attn.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    encoder(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    heads = block.attn.num_heads
    queries, keys, _ = seen["qkv"].view(len(seen["qkv"]), 3, heads, -1).permute(1, 2, 0, 3)
    cos, sin = seen["position_embeddings"]

    def turn(values: Tensor) -> Tensor:
        half = values.shape[-1] // 2
        return values * cos + torch.cat([-values[..., half:], values[..., :half]], dim=-1) * sin

    matrix = (turn(queries) @ turn(keys).mT / queries.shape[-1] ** 0.5).softmax(dim=-1)  # (H, S, S)
    score = matrix.mean(dim=1).sum(dim=0).view(-1, 4).mean(dim=1)
    key = keys.mean(dim=0).view(rows * columns, 4, -1).mean(dim=1)
    if not hasattr(encoder, "fullatt_block_indexes"):
        return score, key
    # Windows of 2 x 2 tokens, row by row, each row by row: where in that order is each token of the picture?
    windows = [(y, x) for y in range(0, rows, 2) for x in range(0, columns, 2)]
    order = [
        row * columns + column
        for y, x in windows
        for row in range(y, min(y + 2, rows))
        for column in range(x, min(x + 2, columns))
    ]
    undo = torch.tensor(order).argsort()
    return score[undo], key[undo]


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rows, columns", [(3, 4), (4, 4), (5, 3)])
def test_kept_tokens_equal_the_plain_method(name: str, rows: int, columns: int):
    """Dominant and contextual tokens of eager attention, sorted by what they keep; deepstack features likewise."""
    family = FAMILIES[name]
    inputs = batch(family, [[Picture(7, rows, columns)]])
    plain = family.build("eager")
    output = plain.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    layers = [output.pooler_output[0], *(layer[0] for layer in getattr(output, "deepstack_features", None) or ())]
    dominant, contextual = split(max(1, round(0.6 * rows * columns)))
    kept, groups = plain_select(*eager_scores(plain, inputs, rows, columns), dominant, contextual)
    assert contextual >= 1

    def merged(tokens: Tensor) -> Tensor:
        found = {place: tokens[place] for place in kept}
        found |= {target: tokens[target] + (tokens[members].mean(0) if members else 0) for target, *members in groups}
        return torch.stack([found[place] for place in sorted(found)])

    model = visionzip(family.build(), keep=0.6)
    encoded = family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs)
    assert encoded.places[0].tolist() == sorted([*kept, *(target for target, *_ in groups)])
    for found, tokens in zip(
        [encoded.tokens[0], *(layer[0] for layer in encoded.deepstack or ())], layers, strict=True
    ):
        torch.testing.assert_close(found, merged(tokens), atol=1e-4, rtol=1e-4)
    assert len(encoded.deepstack or ()) == len(layers) - 1 == (2 if name.startswith("qwen3_vl") else 0)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert torch.equal(features[0], encoded.tokens[0])


@torch.no_grad()
@pytest.mark.parametrize("name", SQUARE)
def test_kept_tokens_of_pictures_of_one_size_equal_the_plain_method(name: str):
    """Attention of CLS, or received, and keys, averaged over the 2 x 2 patches of each token."""
    family = FAMILIES[name]
    inputs = batch(family, [[Picture(7)]])
    plain = family.build("eager")
    encoder = plain.model.vision_model if hasattr(plain.model, "vision_model") else plain.model.vision_tower
    block = (encoder.encoder.layer if name == "internvl" else encoder.encoder.layers)[-1]
    attention, seen = block.attention if name == "internvl" else block.self_attn, {}
    parts = ("q_norm", "k_norm") if name == "internvl" else ("q_proj", "k_proj")
    for part in parts:
        getattr(attention, part).register_forward_hook(lambda m, a, output, part=part: seen.update({part: output[0]}))
    whole = plain.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    queries, keys = (seen[part].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for part in parts)
    matrix = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(dim=-1)
    patch_scores = matrix[:, 0, 1:].sum(dim=0) if name == "internvl" else matrix.mean(dim=1).sum(dim=0)
    patch_keys = keys.mean(dim=0)[-64:]
    cells = [[(2 * y + j) * 8 + 2 * x + i for j in range(2) for i in range(2)] for y in range(4) for x in range(4)]
    scores, cell_keys = (
        torch.stack([values[cell].mean(dim=0) for cell in cells]) for values in (patch_scores, patch_keys)
    )
    kept, groups = plain_select(scores, cell_keys, *split(8))
    found = {place: whole[place] for place in kept}
    found |= {target: whole[target] + (whole[members].mean(0) if members else 0) for target, *members in groups}
    model = visionzip(family.build())
    encoded = family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs)
    assert encoded.places[0].tolist() == sorted(found)
    expected = torch.stack([found[place] for place in sorted(found)])
    torch.testing.assert_close(encoded.tokens[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SQUARE)
def test_a_token_is_made_of_the_patches_that_its_score_is(name: str):
    """The cell of 2 x 2 patches through which a token of the language model depends most on the encoder's output."""
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, [[Picture(7)]])
    encoder = model.model.vision_model if hasattr(model.model, "vision_model") else model.model.vision_tower
    states: list[Tensor] = []

    def leaf(module: nn.Module, args: tuple, output: Any) -> Any:
        states.append(output.last_hidden_state.detach().requires_grad_())
        output.last_hidden_state = states[-1]
        return output

    encoder.register_forward_hook(leaf)
    with torch.enable_grad():
        tokens = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        for token in (0, 1, 6, 15):
            (gradient,) = torch.autograd.grad(tokens[token].square().sum(), states[-1], retain_graph=True)
            reached = gradient[0].abs().sum(dim=-1)[-64:].nonzero().flatten().tolist()
            y, x = divmod(token, 4)
            assert reached == [(2 * y + j) * 8 + 2 * x + i for j in range(2) for i in range(2)]


@torch.no_grad()
def test_patches_are_scored_within_their_own_picture():
    """Of two packed pictures; a batch of frames likewise."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    pictures = [Picture(1, 3, 4), Picture(2, 2, 2)]
    both = batch(family, [list(pictures)])

    def read(inputs: Any) -> tuple[Tensor, Tensor]:
        with read_packed_attention(model.model.visual.blocks[-1].attn) as found:
            model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        return found[0]

    alone = [read(batch(family, [[own]])) for own in pictures]
    for found, expected in zip(read(both), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert not model.model.visual.blocks[-1].attn._forward_pre_hooks


# --- where it stands ---


def kept_columns(model: Any, family: Family, parts: list[Part], inputs: Any) -> list[int]:
    """Columns of a prompt (without padding) that a zipped model keeps, frame by frame."""
    places: dict[int, list[int]] = {}
    for token, name in ((IMAGE, "image"), (VIDEO, "video")):
        modality = family_of(model).modalities.get(name)
        if modality and modality.pixels in inputs:
            encoded = modality.encode(model.model, model._visionzip.config, inputs)
            runs = modality.runs(model.model, model._visionzip.config, inputs)
            kept, start = [], 0
            for own, run in zip(encoded.places, runs, strict=True):
                kept += [start + place for place in own.tolist()]
                start += run.full
            places[token] = kept
    ids = inputs["input_ids"][0].tolist()
    found, counts = [], {IMAGE: 0, VIDEO: 0}
    for column, token in enumerate(ids):
        if token not in counts:
            found.append(column)
            continue
        if counts[token] in places[token]:
            found.append(column)
        counts[token] += 1
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_patches_and_text_keep_their_positions(name: str, side: str):
    """The stock model's (t, h, w) of the whole prompt at what is kept; the next token follows the whole prompt's."""
    family = FAMILIES[name]
    model, plain = visionzip(family.build(), keep=0.4), family.build()
    rows = mixed(family)
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(**batch(family, rows, side))
    deltas = model.model.rope_deltas
    model.generate(**batch(family, rows, side), **GREEDY)
    for row, parts in enumerate(rows):
        alone = batch(family, [parts])
        grids = {key: value for key, value in alone.items() if key.endswith("grid_thw")}
        expected, _ = plain.model.get_rope_index(alone["input_ids"], alone["mm_token_type_ids"], **grids)
        columns = kept_columns(model, family, parts, alone)
        for call in seen[:2]:
            own = call["position_ids"][:, row, call["attention_mask"][row].bool()]
            assert torch.equal(own, expected[:, 0, columns])
        following = int(expected.max()) + 1
        assert seen[2]["position_ids"][:, row].flatten().tolist() == [following] * 3
        assert int(deltas[row]) == following - len(columns)


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl", "gemma3", "smolvlm"])
def test_original_positions_and_a_size_bias_where_there_is_one_axis(name: str):
    family = FAMILIES[name]
    rows = mixed(family)
    setting = {"keep": 0.4, "positions": "original"}
    plus = visionzip(family.build(), **setting, size_bias=True)
    inputs = batch(family, rows)
    seen: list[dict[str, Any]] = []
    family_of(plus).language_model(plus).register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True, prepend=True
    )
    cached, anew = (answers(plus, inputs, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, anew)
    for row, parts in enumerate(rows):
        alone = batch(family, [parts])
        columns = kept_columns(plus, family, parts, alone) if "pixel_values" in alone else None
        if columns:
            assert seen[0]["position_ids"][row][-len(columns) :].tolist() == columns
            pictures = sum(isinstance(part, Picture) for part in parts)
            assert seen[0]["token_sizes"][row].sum() == seen[0]["token_sizes"].shape[1] + pictures * (16 - 6)
    biased = plus(**inputs).logits
    assert not torch.allclose(biased, visionzip(plus, **setting)(**inputs).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_size_bias_with_three_axes(name: str):
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.4, size_bias=True), batch(family, mixed(family))
    with_bias = answers(model, inputs)
    assert torch.equal(with_bias, answers(model, inputs, use_cache=False))
    logits = model(**inputs).logits
    assert not torch.allclose(logits, visionzip(model, keep=0.4, size_bias=False)(**inputs).logits, atol=1e-3)


@torch.no_grad()
def test_two_conversations_do_not_disturb_each_other():
    """Positions are noted on each cache; the stock model keeps one delta for all."""
    family = FAMILIES["qwen3_vl"]
    model = visionzip(family.build(), keep=0.4)
    first, second = (batch(family, [["a", Picture(1, *size), "b"]]) for size in ((6, 2), (2, 5)))
    turns = [model.generate(**inputs, **GREEDY, return_dict_in_generate=True) for inputs in (first, second)]
    for inputs, turn in zip((first, second), turns, strict=True):
        more = torch.tensor([[20, 21, 22]])
        ids = torch.cat([turn.sequences[:, -1:], more], dim=1)
        mask = torch.ones(1, turn.past_key_values.get_seq_length() + 4, dtype=torch.long)
        new = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
        whole = {**inputs, "input_ids": torch.cat([turn.sequences, more], dim=1)}
        for key in ("attention_mask", "mm_token_type_ids"):
            whole[key] = F.pad(inputs[key], (0, 8), value=int(key == "attention_mask"))
        assert torch.equal(model.generate(**new, **GREEDY)[:, -5:], answers(model, whole))


@torch.no_grad()
def test_a_share_with_a_most_and_a_least():
    """Of each image: a large one is cut to the cap, a small one keeps what it needs; the setting is stored."""
    family = FAMILIES["qwen3_vl"]
    model = visionzip(family.build(), keep=0.5, max_tokens=5, min_tokens=3)
    inputs = batch(family, [["a", Picture(1, 6, 4), "b", Picture(2, 3, 3), Picture(3, 2, 2), "c"]])
    runs = family_of(model).modalities["image"].runs(model.model, model._visionzip.config, inputs)
    assert [(run.full, run.short) for run in runs] == [(24, 5), (9, 4), (4, 3)]
    whole = inputs["input_ids"].shape[1]
    assert model(**inputs).logits.shape[1] == whole - (24 + 9 + 4) + (5 + 4 + 3)
    assert model.config.visionzip | {"max_tokens": 5, "min_tokens": 3} == model.config.visionzip
    assert "max_tokens" not in visionzip(family.build()).config.visionzip
    assert visionzip(family.build(), max_tokens=5).config.visionzip["keep"] == 0.5
