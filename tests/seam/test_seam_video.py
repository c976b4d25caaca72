"""A budget of a whole video: ``video_keep``, chosen among the tokens of all frames at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_plain import plain_select
from seam_models import FAMILIES, VIDEO, Part, Picture, batch
from test_seam_families import GREEDY, answers
from torch import Tensor

from visionzip import VisionZipConfig, unzip, visionzip
from visionzip.attention import read_packed_attention
from visionzip.methods.visionzip import split

NAMES = [name for name, family in FAMILIES.items() if family.videos]
each = pytest.mark.parametrize("name", NAMES)
FILM = Picture(4, 2, 3, frames=4)
ROWS: list[list[Part]] = [
    ["see ", FILM, " or ", Picture(5, 2, 2)],
    ["a", Picture(6, 3, 2, frames=2), "b", Picture(7, 2, 2, frames=3), "c"],
    ["no video"],
]


def scores_of(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """(n,) and (n, Dk) of a video's merged tokens, each frame scored alone."""
    encoder = model.model.visual
    with read_packed_attention(encoder.blocks[-1].attn) as found:
        encoder(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    scores, keys = (values.unflatten(0, (-1, 4)).mean(dim=1) for values in found[0])
    return scores, keys


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("method", ["norm", "visionzip"])
def test_tokens_are_chosen_among_all_frames(name: str, method: str):
    """By hand: the best of 24 tokens, wherever they are; timestamps and everything else of the prompt stay."""
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, [["see ", FILM, "?"]])
    given = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")}
    tokens = torch.cat(list(model.model.get_video_features(**given, return_dict=True).pooler_output))
    dominant, contextual = split(8) if method == "visionzip" else (8, 0)
    scores, keys = scores_of(model, inputs) if method == "visionzip" else (tokens.norm(dim=-1), tokens)
    kept, groups = plain_select(scores, keys, dominant, contextual or 1)
    found = {place: tokens[place] for place in kept}
    for target, *members in groups if contextual else []:
        found[target] = tokens[target] + (tokens[members].mean(0) if members else 0)
    stock = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=given["video_grid_thw"]
    )[0]

    visionzip(model, keep=0.5, video_keep=8, method=method)
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(**inputs)
    ids = inputs["input_ids"][0]
    columns = (ids == VIDEO).nonzero().flatten()
    stays = ids != VIDEO
    stays[columns[sorted(found)]] = True
    assert torch.equal(seen[0]["position_ids"][-3:, 0], stock[:, 0, stays])
    embeds = model.get_input_embeddings()(ids)
    embeds[columns[sorted(found)]] = torch.stack([found[place] for place in sorted(found)])
    torch.testing.assert_close(seen[0]["inputs_embeds"][0], embeds[stays], atol=1e-4, rtol=1e-4)
    counts = [sum(place // FILM.tokens == frame for place in found) for frame in range(FILM.frames)]
    assert len({*counts}) > 1  # unequal shares, which a choice frame by frame never gives


@torch.no_grad()
def test_a_frame_may_keep_nothing():
    """Two tokens of four frames: the text around the other frames stays, and so do the deepstack features' places."""
    family = FAMILIES["qwen3_vl"]
    model, inputs = visionzip(family.build(), video_keep=2), batch(family, [["see ", FILM, "?"]])
    given = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")}
    features = model.get_video_features(**given)
    assert sorted(len(own) for own in features.pooler_output)[:2] == [0, 0]
    assert [list(map(len, layer)) for layer in features.deepstack_features] == [
        list(map(len, features.pooler_output))
    ] * 2
    logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] - 24 + 2 and torch.isfinite(logits).all()


@each
@torch.no_grad()
def test_all_tokens_give_the_stock_model_bit_for_bit(name: str):
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, ROWS)
    stock = [model(**inputs).logits, answers(model, inputs)]
    visionzip(model, keep=1.0, video_keep=1.0)
    assert torch.equal(model(**inputs).logits, stock[0]) and torch.equal(answers(model, inputs), stock[1])
    unzip(model)
    assert torch.equal(model(**inputs).logits, stock[0])


@each
@torch.no_grad()
def test_batches_caches_and_beams(name: str):
    """A batch equals its rows alone, cached decoding is recomputation, and a video has the tokens that it should."""
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.5, video_keep=0.3), batch(family, ROWS)
    said, logits = answers(model, inputs), model(**inputs).logits
    for row, parts in enumerate(ROWS):
        alone = batch(family, [parts])
        dropped = sum(
            part.tokens * part.frames - round(0.3 * part.tokens * part.frames) if part.frames else part.tokens // 2
            for part in parts
            if isinstance(part, Picture)
        )
        expected = model(**alone).logits[0]
        assert len(expected) == alone["input_ids"].shape[1] - dropped
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(answers(model, alone)[0], said[row])
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(answers(model, inputs, **options), answers(model, inputs, **options, use_cache=False))
    assert torch.equal(answers(model, inputs, cache_implementation="static"), said)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_second_turn_on_a_kept_cache(name: str, rows: int):
    """Given as the whole conversation with all its videos, or as new tokens: as without a cache."""
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), video_keep=0.3), batch(family, ROWS[:rows])
    turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    more = torch.tensor([[20, 21, 22]]).expand(rows, -1)
    whole = {**inputs, "input_ids": torch.cat([turn.sequences, more], dim=1)}
    for key in ("attention_mask", "mm_token_type_ids"):
        whole[key] = F.pad(inputs[key], (0, 8), value=int(key == "attention_mask"))
    expected = answers(model, whole)
    held = turn.past_key_values._visionzip.columns  # of the prompt; behind it is the answer but its last token
    mask = F.pad((held >= 0).long(), (0, 4 + 4), value=1)
    new = {"input_ids": whole["input_ids"][:, -4:], "attention_mask": mask}
    for given in (whole, new):
        cache = copy.deepcopy(turn.past_key_values)
        assert torch.equal(answers(model, given | {"past_key_values": cache}), expected)


def test_what_does_not_fit():
    """Families without videos, and those that choose frame by frame."""
    for wrong, message in ((0, "video_keep=0 is below 1"), (1.5, "outside 0 to 1: .* share of the tokens of a video")):
        with pytest.raises(ValueError, match=message):
            VisionZipConfig(video_keep=wrong)
    for name in ("internvl", "glm4v"):
        with pytest.raises(ValueError, match=r"video_keep=0\.2 is for Qwen-VL's families and Gemma 4: this "):
            visionzip(FAMILIES[name].build(), video_keep=0.2)
    model = visionzip(FAMILIES["qwen3_vl"].build(), video_keep=0.2)
    assert model.config.visionzip == {"layer": -1, "merge": "released", "keep": 0.5, "video_keep": 0.2}
