"""``picked_tokens``: a model answers from the patches that someone has picked, and is then what it was before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hf_models
import hf_video_models
import pytest
import seam_models
import torch
from PIL import Image
from seam_models import FAMILIES, Picture, batch
from torch import Tensor

from checkpoints import NEXT, pixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.picture import picture_data
from llava.serve.chat import ChatSession
from playground.drawing import Scene, Thing, render
from playground.scenes import rng_of
from visionzip import picked_tokens, unzip, visionzip
from visionzip.integrations import family_of
from visionzip.methods import METHODS
from visionzip.token_map import inspect_tokens

ROOT = Path(__file__).resolve().parents[2]
IMG = IMAGE_TOKEN_INDEX


def patches_of(model: Any, images: Tensor, processor: Any = None) -> list[list[int]]:
    """The patches that a zipped model keeps of each encoder input."""
    return [tokens.roles.dominant.nonzero().flatten().tolist() for tokens in inspect_tokens(model, images, processor)]


# --- the same patches give the same answers ---


@torch.no_grad()
@pytest.mark.parametrize("size_bias", [False, True])
def test_the_patches_of_dominant_only_in_llavas_layout(load: Any, size_bias: bool):
    model, images = load()[1], pixels(2)
    ids = torch.tensor([[1, 40, IMG, 41], [1, 50, IMG, 51]])
    visionzip(model, keep=5, method="dominant-only", size_bias=size_bias)
    expected = model(input_ids=ids, images=images).logits
    kept = patches_of(model, images)
    assert kept[0] != kept[1] and {len(row) for row in kept} == {4}
    with picked_tokens(model, kept, cls_token=True):
        assert torch.equal(model(input_ids=ids, images=images).logits, expected)
    with picked_tokens(model, kept[0][::-1], cls_token=True):  # one list for both, in any order
        found = model(input_ids=ids, images=images).logits
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], expected[1])
    with picked_tokens(model, kept):
        without_cls = model(input_ids=ids, images=images).logits
    assert without_cls.shape[1] == expected.shape[1] - 1


@torch.no_grad()
def test_the_patches_of_dominant_only_in_tiles(load: Any):
    """LLaVA-NeXT: a list for each tile, the whole image first."""
    _, model, _, _ = load(**NEXT)
    tiles, ids = pixels(3)[None], torch.tensor([[1, 40, IMG, 41]])
    visionzip(model, keep=5, method="dominant-only")
    sizes = [(112, 56)]
    expected = model(input_ids=ids, images=tiles, image_sizes=sizes).logits
    with picked_tokens(model, patches_of(model, tiles[0]), cls_token=True):
        assert torch.equal(model(input_ids=ids, images=tiles, image_sizes=sizes).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", hf_video_models.STOCK)
def test_the_patches_of_dominant_only_in_models_of_transformers(family: str):
    model, processor, inputs, images = hf_video_models.one_image_for(family)
    visionzip(model, keep=5, method="dominant-only")
    expected = model(**inputs).logits
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    before = copy.deepcopy(model.config.visionzip)
    with picked_tokens(model, patches_of(model, images, processor), cls_token=True):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4), answer)
    assert model.config.visionzip == before
    assert torch.equal(model(**inputs).logits, expected)


# --- what is picked decides ---


@pytest.fixture(scope="module")
def mini() -> tuple[Any, Any, Any]:
    return load_pretrained_model(str(ROOT / "checkpoints" / "llava-mini"), device="cpu")[:3]


def test_without_the_patches_of_an_object_the_model_does_not_see_it(mini: tuple[Any, Any, Any]):
    """A red circle: asked for, found; with its patches dropped, denied. The other object stays."""
    tokenizer, model, processor = mini
    things = (Thing("circle", "red", "large", 40.0, 40.0, 34), Thing("square", "blue", "large", 104.0, 100.0, 34))
    image = Image.fromarray(render(Scene("gray", "plain", things, 144), rng_of("test", 0, 0)))

    def ask(question: str) -> str:
        return ChatSession(model, tokenizer, processor, max_new_tokens=8).ask(question, [image]).text

    red, blue, number = "Is there a red circle?", "Is there a blue square?", "How many objects are there?"
    rects = picture_data(model, image, processor)["tiles"][0]["rects"]
    rest = [patch for patch, box in enumerate(rects) if max(box[:2]) >= 60 or min(box[2:]) <= 20]
    assert len(rest) == 144 - 16
    with picked_tokens(model, range(144)):
        everything = [ask(question) for question in (red, blue, number)]
    with picked_tokens(model, rest):
        without = [ask(question) for question in (red, blue, number)]
    assert everything == ["yes", "yes", "2"]
    assert without == ["no", "yes", "1"]
    assert ask(red) == "yes"


# --- nothing is left behind ---


def test_the_setting_of_before_is_back(load: Any):
    """None, or one; also after an error inside, and with another pick inside."""
    model, images = load()[1], pixels(1)
    tower, registry = model.get_vision_tower(), dict(METHODS)
    vanilla = model.encode_images(images)
    with picked_tokens(model, [3, 3, 1]):
        assert model.encode_images(images).shape[1] == 2
        with picked_tokens(model, [0]):
            assert model.encode_images(images).shape[1] == 1
        assert model.encode_images(images).shape[1] == 2
    assert not hasattr(model.config, "visionzip") and tower.visionzip is None
    assert torch.equal(model.encode_images(images), vanilla)

    visionzip(model, dominant=5, contextual=2)
    stored, setting, zipped = model.config.visionzip, tower.visionzip, model.encode_images(images)
    with pytest.raises(KeyError), picked_tokens(model, [3]):
        raise KeyError
    assert model.config.visionzip == stored and tower.visionzip == setting
    assert torch.equal(model.encode_images(images), zipped)
    assert registry == METHODS


def test_limits_of_the_setting_of_before_are_none_of_a_pick():
    """Of a share, and of a whole video: as many patches are kept as are picked."""
    model = visionzip(FAMILIES["qwen3_vl"].build(), keep=0.5, max_tokens=4, min_tokens=2, video_keep=0.2)
    inputs = batch(FAMILIES["qwen3_vl"], [["a", Picture(1), "b"]])
    stored = model.config.visionzip
    with picked_tokens(model, [1, 2, 3, 5, 8]):
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        assert [len(own) for own in features] == [5]
    assert model.config.visionzip == stored


def test_a_stored_setting_that_was_not_applied_yet_stays():
    """Of a model of transformers that was loaded with one."""
    model = hf_models.llava()
    model.config.visionzip = {"dominant": 5, "contextual": 2}
    hooks = len(model._forward_pre_hooks)
    with picked_tokens(model, [3]):
        assert "_visionzip" in vars(model)
    assert model.config.visionzip == {"dominant": 5, "contextual": 2}
    assert "_visionzip" not in vars(model) and len(model._forward_pre_hooks) == hooks


def test_two_sessions_take_turns_on_one_model(mini: tuple[Any, Any, Any]):
    """Each goes on with what it has picked, in its cache, whatever the other one has picked since."""
    tokenizer, model, processor = mini
    image = Image.fromarray(render(Scene("gray", "plain", (), 144), rng_of("test", 0, 0)))
    alone = []
    for patches in ([5, 7], [20, 30, 40]):
        session = ChatSession(model, tokenizer, processor, max_new_tokens=4, do_sample=False)
        with picked_tokens(model, patches):
            alone.append([session.ask("What is it?", [image]), session.ask("And then?")])
    sessions = [ChatSession(model, tokenizer, processor, max_new_tokens=4, do_sample=False) for _ in range(2)]
    mixed: list[list[Any]] = [[], []]
    for question, images in (("What is it?", [image]), ("And then?", [])):
        for place, patches in enumerate(([5, 7], [20, 30, 40])):
            with picked_tokens(model, patches):
                mixed[place].append(sessions[place].ask(question, images))
    for one, other in zip(alone, mixed, strict=True):
        told = [[(turn.text, turn.visual_tokens, turn.cached_tokens) for turn in turns] for turns in (one, other)]
        assert told[0] == told[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "gemma3"])
def test_merged_tokens_behind_the_seam(name: str):
    """Of today's families: a "patch" is one of the language model's tokens, of an image of any size."""
    family = seam_models.FAMILIES[name]
    model = family.build()
    image = seam_models.Picture(1, 3, 5) if family.sizes else seam_models.Picture(1)
    inputs = seam_models.batch(family, [["a", image, "what"]])
    visionzip(model, keep=5, method="dominant-only")
    setting, expected = model._visionzip.config, model(**inputs).logits
    encoded = family_of(model).modalities["image"].encode(model.model, setting, inputs)
    (kept,) = (places.tolist() for places in encoded.places)
    with picked_tokens(model, kept[::-1]):
        assert torch.equal(model(**inputs).logits, expected)
    with picked_tokens(model, [0, 1]):
        assert model(**inputs).logits.shape[1] == expected.shape[1] - 3
    with (
        picked_tokens(model, [5000]),
        pytest.raises(ValueError, match=r"patch 5000 is outside the grid of . x . patch"),
    ):
        model(**inputs)
    assert model._visionzip.config == setting and torch.equal(model(**inputs).logits, expected)
    unzip(model)
    with picked_tokens(model, [0, 1]):
        pass
    assert not hasattr(model, "_visionzip")


# --- what cannot be picked ---


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ([], "no patch is picked"),
        ([[1], []], "no patch is picked"),
        ([3, 16], r"patch 16 is outside the grid of 4 x 4 patches \(0 to 15\)"),
        ([-1], "patch -1 is outside the grid"),
        ([[1, 2], [3]], "1 to 2 patches are picked of 2 tiles or images: choose as many of each"),
    ],
)
@pytest.mark.parametrize("native", [False, True], ids=["in-tree", "transformers"])
def test_what_cannot_be_picked(load: Any, native: bool, patches: Any, message: str):
    """Said where it is picked, and the model stays as it is."""
    model = hf_models.llava() if native else load()[1]
    with pytest.raises(ValueError, match=message), picked_tokens(model, patches):
        pass
    assert not hasattr(model.config, "visionzip")


def test_numbers_that_are_none_and_lists_that_do_not_fit(load: Any):
    model = unzip(load()[1])
    with pytest.raises(TypeError, match=r"a picked patch is 1\.5, not its number"), picked_tokens(model, [1, 1.5]):
        pass
    with picked_tokens(model, [[1], [2], [3]]), pytest.raises(ValueError, match=r"of 3 encoder inputs, .* come as 2"):
        model.encode_images(pixels(2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "gemma4", "mistral3", "idefics3"])
def test_other_patches_of_each_of_several_images(name: str):
    """Behind the seam as many as one likes of each; None leaves an image to the setting of before."""
    family = seam_models.FAMILIES[name]
    model = family.build()
    images = [seam_models.Picture(seed, *size) for seed, size in enumerate([(4, 4), (4, 4), (4, 4)])]
    inputs = seam_models.batch(family, [["a", images[0], "b", images[1], "c", images[2], "what"]])
    visionzip(model, keep=0.5, method="uniform")
    modality, base = family_of(model).modalities["image"], model.model

    def tokens() -> list[list[float]]:
        return [own.flatten().tolist() for own in modality.encode(base, model._visionzip.config, inputs).tokens]

    before = tokens()
    with picked_tokens(model, [[3, 1], None, [0, 5, 6]]):
        mixed = tokens()
        assert model(**inputs).logits.isfinite().all()
    with picked_tokens(model, [3, 1]):
        assert tokens()[0] == mixed[0]
    with picked_tokens(model, [0, 5, 6]):
        assert tokens()[2] == mixed[2]
    assert mixed[1] == before[1] == tokens()[1]
    with (
        picked_tokens(model, [[3], [1]]),
        pytest.raises(ValueError, match="of 2 encoder inputs, but the images come as 3"),
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="no patch is picked"), picked_tokens(model, [[3], [], [1]]):
        pass


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma4"])
def test_lists_of_images_are_none_of_frames(name: str):
    """As many frames as images must not get the images' lists; a budget of a whole video leaves no frame to itself."""
    family = seam_models.FAMILIES[name]
    model, video = family.build(), seam_models.Picture(2, 4, 4, 2)
    alone = seam_models.batch(family, [["a", video, "b"]])
    both = seam_models.batch(family, [["a", seam_models.Picture(0), seam_models.Picture(1), video, "b"]])
    visionzip(model, keep=0.5, video_keep=0.2, method="uniform")
    with picked_tokens(model, [[1, 3], [0, 2]]), pytest.raises(ValueError, match="has both images and a video"):
        model(**both)
    with picked_tokens(model, [[1, 3], None]), pytest.raises(ValueError, match=r"video_keep=0\.2 chooses among all"):
        model(**alone)
    with picked_tokens(model, [[1, 3], [0, 2]]):
        assert len(family_of(model).modalities["video"].runs(model.model, model._visionzip.config, alone)) == 2
    with picked_tokens(model, [1, 3]):
        assert model(**both).logits.isfinite().all()
