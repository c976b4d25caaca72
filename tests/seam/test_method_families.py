"""Any method on any family: the setting that names it, and one stage that puts it on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import hf_models
import hf_video_models
import pytest
import seam_models
import torch
from mini_gemini import pixels as large_pixels
from torch import Tensor

from checkpoints import NEXT, SIGLIP, pixels
from llava.methods import METHODS as TIMED_METHODS
from llava.model.builder import load_pretrained_model
from visionzip import VisionZipConfig, unzip, visionzip
from visionzip.compress import CompressedTokens
from visionzip.encoder import compress_images
from visionzip.methods import METHODS, EncoderRead, Method, TokenCounts, kept_patches

# --- the setting ---


def test_keep_is_the_papers_split(load):
    model = load()[1]
    assert visionzip(model, keep=8).config.visionzip == visionzip(model, 7, 1).config.visionzip
    assert visionzip(model, keep=0.25).config.visionzip == {"layer": -2, "merge": "released", "keep": 0.25}
    assert len(model.visual_tokens(pixels(1))[0]) == 4


def test_the_setting_names_the_method_and_is_stored(load, tmp_path):
    model, images = visionzip(load()[1], keep=6, method="random", seed=3), pixels(1)
    stored = model.config.visionzip
    assert stored == {"layer": -2, "merge": "released", "method": "random", "keep": 6, "seed": 3}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.visionzip == stored
    assert torch.equal(again.visual_tokens(images)[0], model.visual_tokens(images)[0])
    old = {"dominant": 5, "contextual": 2, "layer": -2, "merge": "released"}
    assert VisionZipConfig.from_dict(old).to_dict() == old


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "norm"}, "method='norm' needs keep"),
        ({"keep": 6, "method": "normm"}, "did you mean 'norm'"),
        ({"keep": 6, "dominant": 5}, "give one or the other"),
        ({"keep": 0}, "keep=0 is below 1"),
        ({"keep": 1.5}, "keep=1.5 is outside 0 to 1"),
        ({"keep": math.nan}, "keep=nan is outside 0 to 1"),
        ({"keep": 4, "method": "random", "seed": -1}, "seed=-1 is outside 0 to"),
        ({"keep": 7, "method": "pool"}, "tokens=7 cannot be pooled"),
    ],
)
def test_refused(load, arguments: dict[str, Any], message: str):
    model = load()[1]
    with pytest.raises(ValueError, match=message):
        visionzip(model, **arguments)
    assert getattr(model.config, "visionzip", None) is None


def test_a_tower_alone_has_no_projector(load):
    tower = visionzip(load()[1].get_vision_tower(), keep=4, method="divprune")
    with pytest.raises(ValueError, match="a vision tower alone has no projector"):
        tower(pixels(1))


# --- every family, through the registry ---


@pytest.fixture
def toy() -> Iterator[str]:
    """A method in ten lines: the patches of smallest norm."""

    def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
        values = -read.projected.float().norm(dim=-1)
        return kept_patches(read, values.topk(counts.dominant).indices)

    METHODS["toy"] = Method("toy", "patches of smallest norm", choose, frozenset({"projected"}))
    yield "toy"
    del METHODS["toy"]


def in_tree(load: Callable[..., Any], **options: Any) -> tuple[Any, Callable[[Any], list[Tensor]]]:
    tiles = (torch.randn(1, 5, 3, 56, 56), [(112, 112)]) if options == NEXT else (pixels(1), None)
    return load(**options)[1], lambda model: model.visual_tokens(*tiles)


def families(load: Callable[..., Any], load_mgm: Callable[..., Any]) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    sizes = torch.tensor([[112, 112]])
    frames = torch.randn(1, 2, 3, 56, 56)
    video = {"pixel_values_videos": frames}
    return {
        "LLaVA-1.5": in_tree(load),
        "SigLIP": in_tree(load, vision=SIGLIP),
        "LLaVA-NeXT": in_tree(load, **NEXT),
        "Mini-Gemini": (load_mgm(), lambda model: model.visual_tokens(large_pixels())),
        "transformers LLaVA": (hf_models.llava(), lambda m: m.model.get_image_features(pixels(1)).pooler_output),
        "transformers LLaVA-NeXT": (
            hf_models.llava_next(),
            lambda m: m.model.get_image_features(torch.randn(1, 5, 3, 56, 56), sizes).pooler_output,
        ),
        **{
            f"transformers {name}": (
                hf_video_models.build(name),
                lambda m: m.model.get_video_features(**video).pooler_output,
            )
            for name in hf_video_models.FAMILIES
        },
    }


def test_a_toy_method_runs_on_every_family(toy: str, load, load_mgm):
    expected = {"LLaVA-NeXT": 5 * 3, "transformers LLaVA-NeXT": 5 * 3, "transformers onevision": 2 * 3 + 1}
    videos = {"transformers next_video": 2 * 3, "transformers video_llava": 2 * 3}
    for name, (model, see) in families(load, load_mgm).items():
        for method in (toy, "divprune", "random", "visionzip"):
            tokens = see(visionzip(model, keep=3, method=method))
            length = sum(each.shape[:-1].numel() for each in tokens)
            assert length == (expected | videos).get(name, 3), (name, method)
        unzip(model)


@torch.no_grad()
@pytest.mark.parametrize("name", list(seam_models.FAMILIES))
def test_a_toy_method_runs_on_todays_families(toy: str, name: str):
    """It gets the tokens of the language model, and keeps those of smallest norm."""
    family = seam_models.FAMILIES[name]
    model = visionzip(family.build(), keep=3, method=toy)
    inputs = seam_models.batch(
        family, [["a", seam_models.Picture(1, 3, 4) if family.grids else seam_models.Picture(1)]]
    )
    text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    assert model(**inputs).logits.shape[1] == text + 3


def test_videos_in_tree(toy: str, make_video_checkpoint):
    model = load_pretrained_model(str(make_video_checkpoint()), None, "video-llava")[1]
    tokens = visionzip(model, keep=3, method=toy).visual_tokens([torch.randn(3, 2, 56, 56)])
    assert [len(frame) for frame in tokens] == [3, 3]
    assert torch.isfinite(torch.cat(tokens)).all()


def test_averages_do_not_join_tiles(load):
    for model in (load(**NEXT)[1], hf_models.llava_next()):
        with pytest.raises(ValueError, match=r"method='pool' averages areas, but this Llava.*use one of visionzip"):
            visionzip(model, keep=4, method="pool")


def test_tiles_are_read_in_raster_order_whether_or_not_cls_is_kept(load):
    """Patches stand row by row across the tiles: their positions count the encoder's CLS token, which is not kept."""
    grid, keep, side = (2, 2), 8, 4
    tiles = torch.randn(1, 5, 3, 56, 56)
    for model in (load(**NEXT)[1], hf_models.llava_next()):
        zipped = visionzip(model, keep=keep, method="uniform")
        if hasattr(model, "get_vision_tower"):
            joined = zipped.visual_tokens(tiles, [(112, 112)])[0]
            each = zipped.encode_images(tiles[0])
        else:
            joined = model.model.get_image_features(tiles, torch.tensor([[112, 112]])).pooler_output[0]
            compressed = compress_images(model.model.vision_tower, tiles[0], VisionZipConfig(keep=8, method="uniform"))
            each = model.model.multi_modal_projector(compressed.tokens)
        places = [(2 * slot + 1) * side**2 // (2 * keep) for slot in range(keep)]
        order = sorted(
            (
                (tile // grid[0] * side + patch // side, tile % grid[0] * side + patch % side, tile + 1, slot)
                for tile in range(4)
                for slot, patch in enumerate(places)
            )
        )
        expected = torch.cat([each[0], torch.stack([each[tile, slot] for _, _, tile, slot in order])])
        torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-5)


def test_only_what_merges_or_keeps_cls_is_split():
    """A table shows K and M of VisionZip and its ablations; other methods have T tokens of one kind."""
    shown = [name for name, method in TIMED_METHODS.items() if method.split is not None]
    assert shown == ["visionzip", "dominant-only", "contextual-only", "no-cls"]
