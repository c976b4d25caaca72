"""What the vLLM plugin needs to know of Qwen-VL; nothing here needs vLLM. The engine itself: test_engine_qwen.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seam_models import FAMILIES, Picture, batch

from visionzip import VisionZipConfig, visionzip
from visionzip.integrations import family_of
from visionzip.methods import METHODS
from visionzip.serving.places import PLACES, Placed, prompt_positions, split_places, with_places
from visionzip.serving.setting import check_engine, images_at_once, served_setting


def config(family: str = "qwen3_vl", **values: Any) -> Any:
    """A model's config, as vLLM has it after ``--hf-overrides``."""
    made = FAMILIES[family].config()
    made.visionzip = values or None
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_come_back_from_embeddings(dtype: torch.dtype):
    """Of images with more than 256 rows too, which bfloat16 cannot count; a chunk of the prompt has some of them."""
    columns, places = 300, torch.tensor([0, 299, 300, 77_777, 300 * 1000 + 257])
    tokens = torch.randn(5, 8).to(dtype)
    rows = with_places(tokens, places, columns)
    assert rows.shape == (5, 8 + PLACES) and rows.dtype == dtype
    for chunk in (slice(0, 5), slice(2, 4)):
        found, row_column = split_places(rows[chunk])
        assert torch.equal(found, tokens[chunk])
        assert row_column.tolist() == [list(divmod(place, columns)) for place in places[chunk].tolist()]


def test_positions_of_a_short_prompt_are_the_uncompressed_ones():
    """Text before, between and behind two images is where transformers' own function has it in the long prompt."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    inputs = batch(family, [["ab", Picture(0, 2, 3), "cde", Picture(1, 4, 2), "f"]])
    long = family_of(model).positions(model.model, inputs)[:, 0]
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    one, two = starts(is_image)
    kept = 2
    images = [Placed(one, kept, 2, 3), Placed(two - 6 + kept, kept, 4, 2)]
    found, delta = prompt_positions(len(is_image) - 6 - 8 + 2 * kept, images)
    columns = torch.ones_like(is_image)
    columns[one + kept : one + 6] = columns[two + kept : two + 8] = False
    short = long[:, columns]
    is_text = ~is_image[columns]
    assert torch.equal(found[:, is_text], short[:, is_text])
    assert torch.equal(found[0], short[0])  # the first axis of an image's tokens, to which rows and columns are added
    assert delta == int(long.max()) + 1 - found.shape[1]


def starts(flags: torch.Tensor) -> list[int]:
    """Where stretches of True begin."""
    return [at for at, flag in enumerate(flags.tolist()) if flag and not flags[at - 1]]


def test_a_prompt_that_ends_with_an_image_counts_on_behind_the_whole_image():
    positions, delta = prompt_positions(4, [Placed(1, 3, 5, 7)])
    assert positions.tolist() == [[0, 1, 1, 1]] * 3
    assert 4 + delta == 8
    assert prompt_positions(3, [])[1] == 0


def test_a_setting_is_completed_as_in_visionzip():
    """The last layer that sees the whole image, and half of the tokens unless it says otherwise."""
    assert served_setting(config()) is None
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        made = visionzip(FAMILIES[name].build())
        stored = made.config.visionzip
        assert served_setting(config(name, seed=0)) == VisionZipConfig.from_dict(stored)
        assert served_setting(config(name, **stored)) == VisionZipConfig.from_dict(stored)
    assert served_setting(config(dominant=5, contextual=1)).tokens(99) == 6
    for method in METHODS.values():
        if method.keeps_patches:
            assert served_setting(config(keep=9, method=method.name, size_bias=False)).keep == 9


@pytest.mark.parametrize(
    "values, said",
    [
        ({"keep": 6, "positions": "consecutive"}, "have a row and a column: leave it out"),
        ({"keep": 6, "method": "visionzip-plus"}, 'size_bias=true .*add "size_bias": false'),
        ({"keep": 6, "layer": -2}, "layer=-2 .*use one of -3, -1, or leave it out"),
        ({"keep": 0.5, "video_keep": 0.1}, "video_keep=0.1 cannot be served"),
        ({"keep": 4, "method": "pool"}, "averages areas"),
        ({"keep": 6, "dominant": 3}, "keep=6 beside dominant"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        served_setting(config("qwen2_5_vl", **values))


def engine(**values: Any) -> Any:
    """The part of vLLM's config that matters here."""
    given = {"pipeline_parallel_size": 1, "use_ubatching": False, "video_pruning_rate": None, "enable_mm_embeds": False}
    given = SimpleNamespace(**given, compile_mm_encoder=False, speculative_config=None)
    vars(given).update(values)
    return SimpleNamespace(
        parallel_config=given,
        model_config=SimpleNamespace(multimodal_config=given),
        compilation_config=given,
        speculative_config=given.speculative_config,
    )


@pytest.mark.parametrize(
    "values, option",
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"compile_mm_encoder": True}, "compile_mm_encoder"),
        ({"use_ubatching": True}, "--enable-dbo"),
    ],
)
def test_an_engine_that_would_lose_positions_is_refused(values: dict[str, Any], option: str):
    check_engine(engine())
    with pytest.raises(ValueError, match=f"cannot be served with {option}.*start without"):
        check_engine(engine(**values))


def test_images_of_any_size_go_through_the_encoder_within_its_budget():
    assert images_at_once(100, [60, 40, 1, 99, 500, 20]) == [2, 2, 1, 1]
    assert images_at_once(100, []) == []
