"""What happens to each patch, for every method and family: as tensors, and as plain data for a page."""

from __future__ import annotations

import json
from typing import Any

import hf_models
import hf_video_models
import pytest
import torch

from checkpoints import CLIP, NEXT, picture, pixels
from llava.model.stock.transformers_llava import TransformersLlava
from llava.picture import picture_data
from visionzip import unzip, visionzip
from visionzip.encoder import hidden_states
from visionzip.methods import METHODS
from visionzip.token_map import TokenMap, inspect_tokens, token_data
from visionzip.visualize import overview, token_overlay

methods = pytest.mark.parametrize("method", METHODS)


def kept_by(tokens: TokenMap) -> list[int]:
    """The patches at which a model has visual tokens: dominant ones, then the targets of contextual ones."""
    return tokens.roles.dominant.nonzero().flatten().tolist() + tokens.roles.targets.tolist()


# --- every method, every family ---


@methods
def test_every_method_in_llavas_layout(load: Any, method: str):
    model, images = load()[1], pixels(2)
    visionzip(model, keep=4, method=method)
    compressed = model.get_vision_tower().compress(images, model._project)
    for index, tokens in enumerate(inspect_tokens(model, images)):
        expected = compressed.kept[index].tolist()
        assert [0] * tokens.keeps_cls + [1 + patch for patch in kept_by(tokens)] == expected
        assert tokens.num_kept == 4
        assert torch.equal(tokens.roles.groups, compressed.assignment[index, 1:])
    overview([tokens])


@methods
@torch.no_grad()
def test_every_method_in_models_of_transformers(method: str):
    """The tokens that the model passes on are the encoder's at these patches, or a mean of several of them."""
    model, processor = hf_models.llava(), hf_models.llava_processor()
    visionzip(model, keep=4, method=method)
    images = processor(images=hf_models.IMAGES[:2], text=["<image><image>"], return_tensors="pt")["pixel_values"]
    passed = model.model.get_image_features(images).last_hidden_state
    states = hidden_states(model.model.vision_tower, images, CLIP["num_hidden_layers"] - 1)
    for index, tokens in enumerate(inspect_tokens(model, images, processor)):
        kept = [0] * tokens.keeps_cls + [1 + patch for patch in tokens.roles.dominant.nonzero().flatten().tolist()]
        assert torch.equal(passed[index, : len(kept)], states[index, kept])
        assert tokens.num_kept == passed.shape[1] == 4


@torch.no_grad()
@pytest.mark.parametrize("family", hf_video_models.STOCK)
def test_every_family_of_transformers(family: str):
    """All tiles of an image: their dominant patches are what the model passes on first."""
    model, processor, inputs, images = hf_video_models.one_image_for(family)
    visionzip(model, dominant=5, contextual=2)
    features = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    features = features if "pixel_values" in features else {"pixel_values": images}
    passed = model.model.get_image_features(**features).last_hidden_state
    maps = inspect_tokens(model, images, processor)
    tower = getattr(model.model, "image_tower", None) or model.model.vision_tower
    states = hidden_states(tower, images, maps[0].layer + 1)
    first = int(maps[0].cls_token)
    assert len(maps) == len(passed) == (1 if family in ("llava", "video_llava") else len(images))
    for index, tokens in enumerate(maps):
        kept = [0] * first + [first + patch for patch in tokens.roles.dominant.nonzero().flatten().tolist()]
        assert torch.equal(passed[index, :5], states[index, kept])
        highest = tokens.attention[tokens.layer].topk(5 - first).indices.sort().values
        assert kept[first:] == (highest + first).tolist()
    unzip(model)
    vanilla = inspect_tokens(model, images, processor)
    assert vanilla[0].roles is None and torch.equal(vanilla[0].attention, maps[0].attention)


def test_a_model_of_transformers_in_llavas_commands():
    """Has its image processor, and its projector for methods that choose by what is behind it."""
    model = TransformersLlava(hf_models.llava())
    processor = hf_models.llava_processor().image_processor
    model.get_vision_tower().image_processor = processor
    visionzip(model, keep=4, method="norm")
    (found,) = inspect_tokens(model, pixels(1))
    (native,) = inspect_tokens(model.native, pixels(1), processor)
    assert kept_by(found) == kept_by(native)
    assert picture_data(model, picture(0), processor)["tokens"] == [17, 4]


def test_random_patches_are_those_of_the_model_in_half_precision(load: Any):
    """They follow from the pixels, in the type that the model sees."""
    model, images = load()[1].to(torch.bfloat16), pixels(2)
    visionzip(model, keep=4, method="random")
    expected = model.get_vision_tower().compress(images.bfloat16()).kept - 1
    assert [kept_by(tokens) for tokens in inspect_tokens(model, images)] == expected.tolist()


# --- videos ---


def test_frames_of_videos(make_video_checkpoint: Any):
    """Video-LLaVA's frames attend to each other: each is an image of its own, as the model sees it among the others."""
    from llava.model.builder import load_pretrained_model  # noqa: PLC0415 - takes seconds, which other tests do not need

    model = load_pretrained_model(str(make_video_checkpoint()), device="cpu")[1]
    video = pixels(8).transpose(0, 1)[None]
    visionzip(model, dominant=5, contextual=2)
    compressed = model.get_video_tower().compress(video)
    maps = inspect_tokens(model, video, videos=True)
    assert [[0] + [1 + patch for patch in kept_by(tokens)] for tokens in maps] == compressed.kept.tolist()
    alone = inspect_tokens(model, video[:, :, :1], videos=True)
    assert not torch.equal(alone[0].attention, maps[0].attention)


@torch.no_grad()
def test_frames_of_videos_in_models_of_transformers():
    model, processor = (make() for make in hf_video_models.STOCK["video_llava"])
    video = pixels(3)[None]
    visionzip(model, dominant=5, contextual=2)
    passed = model.model.get_video_features(video).last_hidden_state
    states = hidden_states(model.model.video_tower, video[0], CLIP["num_hidden_layers"] - 1)
    maps = inspect_tokens(model, video, processor, videos=True)
    for index, tokens in enumerate(maps):
        kept = [0] + [1 + patch for patch in tokens.roles.dominant.nonzero().flatten().tolist()]
        assert torch.equal(passed[index, :5], states[index, kept])
    assert len(maps) == 3


@torch.no_grad()
@pytest.mark.parametrize(("family", "cls_token"), [("onevision", False), ("next_video", True)])
def test_frames_that_are_pooled(family: str, cls_token: bool):
    """Their patches are what 2 x 2 of the encoder's are pooled to; attention is pooled as the scores are."""
    model, processor = (make() for make in hf_video_models.STOCK[family])
    video = pixels(3)[None]
    visionzip(model, dominant=2 + cls_token, contextual=1)
    places = (
        model._visionzip.family.modalities["video"]
        .encode(model.model, model._visionzip.config, {"pixel_values_videos": video})
        .places[0]
    )
    maps = inspect_tokens(model, video, processor, videos=True)
    assert [tokens.grid for tokens in maps] == [(2, 2)] * 3
    kept = [tokens.roles.dominant | (torch.arange(4) == tokens.roles.targets[0]) for tokens in maps]
    of_frame = places[: len(places) // 3 * 3].view(3, -1)[:, int(cls_token) :] % 4
    assert [own.nonzero().flatten().tolist() for own in kept] == of_frame.sort().values.tolist()
    with pytest.raises(ValueError, match=r"got \(1, 3, 3, 56, 56\).* Of videos say videos=True"):
        inspect_tokens(model, video, processor)  # they may be tiles


def test_a_model_without_videos():
    model, processor = (make() for make in hf_video_models.STOCK["llava"])
    with pytest.raises(ValueError, match="this model has no encoder of videos: give their frames as images"):
        inspect_tokens(model, pixels(3)[None], processor, videos=True)


# --- sizes, and plain data ---


def test_sizes(load: Any):
    """With size bias each token stands for some patches, and all together for all of them; the overlay says so."""
    model = visionzip(load()[1], dominant=5, contextual=2, size_bias=True)
    (tokens,) = inspect_tokens(model, pixels(1))
    sizes = tokens.roles.sizes
    assert sorted(sizes.nonzero().flatten().tolist()) == sorted(kept_by(tokens))
    assert sizes.sum() == 16
    axes = token_overlay([tokens]).axes[0]
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {divmod(patch, 4): f"{sizes[patch]:g}" for patch in kept_by(tokens)}
    assert "numbers: patches stood for" in axes.get_xlabel()
    assert token_data(tokens, (0, 0, 56, 56))["sizes"] == sizes.tolist()


def test_plain_data(load: Any):
    """What a page is given of an image; it goes through JSON as it is."""
    _, model, processor, _ = load()
    visionzip(model, dominant=5, contextual=2)
    data = picture_data(model, picture(0, (112, 56)), processor)
    assert json.loads(json.dumps(data)) == data
    assert {name: value for name, value in data.items() if name != "tiles"} == {
        "size": [112, 56],
        "frames": None,
        "method": "visionzip",
        "setting": "dominant=5 + contextual=2",
        "patches": 16,
        "cls_token": True,
        "keeps_cls": True,
        "tokens": [17, 7],
        "layers": 4,
        "layer": 2,
        "pairable": True,
        "pickable": True,
    }
    (tile,) = data["tiles"]
    assert tile["region"] == [0, -28, 112, 84] and tile["grid"] == [4, 4]  # padded to a square
    assert tile["rects"][5] == [28, 0, 56, 28]
    assert [len(layer) for layer in tile["attention"]] == [16] * 4
    assert tile["score"] == tile["attention"][2]
    assert sorted(tile["rank"]) == list(range(1, 17)) and tile["rank"][tile["score"].index(max(tile["score"]))] == 1
    for patch, (role, into) in enumerate(zip(tile["role"], tile["into"], strict=True)):
        groups = [group for group in tile["groups"] if patch in group["patches"]]
        assert (role == "kept") == (tile["rank"][patch] <= 4) == (not groups)
        assert into == (groups[0]["target"] if groups else patch)
        assert (role == "target") == (bool(groups) and into == patch)
    assert [group["size"] for group in tile["groups"]] == [len(group["patches"]) for group in tile["groups"]]
    assert sum(group["size"] for group in tile["groups"]) == 12 and tile["sizes"] is None


def test_plain_data_of_tiles_and_of_what_is_dropped(load: Any):
    _, model, processor, _ = load(**NEXT)
    visionzip(model, keep=4, method="uniform")
    data = picture_data(model, picture(0, (112, 112)), processor)
    assert data["tokens"] == [5 * 17, 5 * 4] and not data["keeps_cls"]
    assert [tile["region"] for tile in data["tiles"]] == [
        [0, 0, 112, 112],
        [0, 0, 56, 56],
        [56, 0, 112, 56],
        [0, 56, 56, 112],
        [56, 56, 112, 112],
    ]
    tile = data["tiles"][1]
    assert tile["role"].count("dropped") == 12 and tile["groups"] == []
    assert [patch for patch in tile["into"] if patch is not None] == [2, 6, 10, 14]


def test_plain_data_of_a_model_that_is_not_zipped(load: Any):
    _, model, processor, _ = load()
    data = picture_data(model, picture(0), processor)
    assert data["method"] is None and data["setting"] is None and data["tokens"] == [17, 17]
    assert [data["tiles"][0][name] for name in ("role", "into", "groups", "sizes")] == [None] * 4


# --- what cannot be looked at ---


def test_what_is_missing_is_said(load: Any):
    native = hf_models.llava()
    with pytest.raises(ValueError, match=r"does not hold its image processor.*processor=AutoProcessor"):
        inspect_tokens(native, pixels(1))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 56, 56\) with B >= 1, got \(1, 3, 28, 28\)"):
        inspect_tokens(native, torch.zeros(1, 3, 28, 28), hf_models.llava_processor())
    model = visionzip(load()[1], keep=4, method="norm")
    with pytest.raises(ValueError, match="a vision tower alone has no projector: apply visionzip to the whole model"):
        inspect_tokens(model.get_vision_tower(), pixels(1))


def test_what_is_kept_of_a_model_that_is_not_zipped(load: Any):
    (tokens,) = inspect_tokens(load()[1], pixels(1))
    with pytest.raises(ValueError, match=r"this model was not zipped, so no patch is kept .* before inspect_tokens"):
        _ = tokens.num_kept
    with pytest.raises(ValueError, match="this model was not zipped"):
        _ = tokens.kept_share
