"""One set of weights as LLaVA's own model and, through ``visionzip convert``, as transformers': the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import Pair, load_pair, native_pixels, native_prompts, pictures
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from checkpoints import NEXT, SIGLIP, edit_config, picture
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from recorded import Case, cases
from visionzip import unzip, visionzip

IMG = IMAGE_TOKEN_INDEX
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
RECORD = {"output_logits": True, "return_dict_in_generate": True}
ZIPPED = {"dominant": 5, "contextual": 2}
MODELS = {
    "1.5": {},
    "1.5-siglip": {"vision": SIGLIP},
    "1.5-qwen": {"model_type": "llava_qwen"},
    "next": NEXT,
    "next-siglip": {"vision": SIGLIP, **NEXT},
    "next-mistral": {"model_type": "llava_mistral", **NEXT},
}


@pytest.fixture
def pair(make_checkpoint, tmp_path: Path) -> Callable[..., Pair]:
    def make(**options: Any) -> Pair:
        return load_pair(make_checkpoint(**options), tmp_path / "native")

    return make


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def both(request: pytest.FixtureRequest, pair) -> Pair:
    return pair(**request.param)


@pytest.fixture(params=[False, True], ids=["vanilla", "zipped"])
def either(request: pytest.FixtureRequest, both: Pair) -> Pair:
    """Every model, zipped and not."""
    return both.zipped(**ZIPPED) if request.param else both


def vanilla_runs(pair: Pair, images: Any, sizes: Any) -> list[int]:
    setting = pair.own.get_vision_tower().visionzip
    unzip(pair.own)
    runs = [len(tokens) for tokens in pair.own.visual_tokens(images, sizes)]
    return runs if setting is None else (visionzip(pair.own, setting.dominant, setting.contextual), runs)[1]


def answers(pair: Pair, input_ids: Tensor, mask: Tensor | None, images: Any, sizes: Any, **options: Any) -> Any:
    """What both generate: sequences without the prompts, and the logits of each step, of LLaVA's vocabulary."""
    own = pair.own.generate(
        input_ids, attention_mask=mask, images=images, image_sizes=sizes, **GREEDY | RECORD | options
    )
    prompts = native_prompts(pair.native, input_ids, mask, vanilla_runs(pair, images, sizes))
    native = pair.native.generate(**prompts, **native_pixels(pair.native, images, sizes), **GREEDY | RECORD | options)
    vocabulary = pair.own.config.vocab_size
    logits = torch.stack(native.logits)[..., :vocabulary]
    return own.sequences, torch.stack(own.logits), native.sequences[:, prompts["input_ids"].shape[1] :], logits


PROMPTS = {
    "one_image": [[1, IMG, 13, 40, 41]],
    "several_images": [[1, 50, IMG, 51, IMG, IMG, 53]],
    "batch": [[1, IMG, 13, 40, 41], [1, 50, IMG, 51, IMG, 52, 53, 54], [1, 60, 61]],
}


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
def test_answers(rows: list[list[int]], either: Pair):
    """First logits to 1e-4 of their scale and the same greedy tokens, whatever the prompts."""
    lengths = [torch.ones(len(row), dtype=torch.long) for row in rows]
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
    mask = pad_sequence(lengths, batch_first=True, padding_side="left")
    images, sizes = pictures(either, (90, 60), (40, 120), (100, 100))
    count = sum(row.count(IMG) for row in rows)
    own, own_logits, native, native_logits = answers(either, input_ids, mask, images[:count], sizes[:count])
    torch.testing.assert_close(native_logits[0], own_logits[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(native, own)


def test_visual_tokens(either: Pair):
    images, sizes = pictures(either, (90, 60), (40, 120), (100, 100))
    expected = either.own.visual_tokens(images, sizes)
    with torch.no_grad():
        actual = either.native.model.get_image_features(**native_pixels(either.native, images, sizes)).pooler_output
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, NEXT, {"vision": SIGLIP, **NEXT}], ids=["1.5", "next", "next-siglip"])
def test_the_stock_processor_and_the_stored_setting(options: dict[str, Any], copied, tmp_path: Path):
    """What a user has after ``convert``: one call each, and the answer of LLaVA's own functions."""
    source = copied(**options)
    edit_config(source, visionzip=ZIPPED)
    pair = load_pair(source, tmp_path / "native")  # LLaVA's own comes zipped
    visionzip(pair.native)
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    tokenizer = load_pretrained_model(str(source), device="cpu")[0]
    size, prompt = (90, 60), "USER: <image>\nWhat is there? ASSISTANT:"
    images, sizes = pictures(pair, size)
    expected = pair.own.generate(
        tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None], images=images, image_sizes=sizes, **GREEDY
    )
    inputs = processor(images=picture(0, size), text=prompt, return_tensors="pt")
    out = pair.native.generate(**inputs, **GREEDY)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


def test_sizes_that_the_two_unpad_differently(make_checkpoint, tmp_path: Path):
    """LLaVA rounds 2.9999999999999996 patches down, transformers to 3: other tokens without compression, none with it.

    With CLIP-L/336 and LLaVA-NeXT's resolutions that are 36 of the 1.9 million sizes up to 1400 pixels (748 x 352, …).
    """
    pair = load_pair(make_checkpoint(**NEXT), tmp_path / "native")
    images, sizes = pictures(pair, (47, 188))
    with torch.no_grad():
        native = pair.native.get_image_features(**native_pixels(pair.native, images, sizes)).pooler_output
    run = len(native[0])
    assert (len(pair.own.visual_tokens(images, sizes)[0]), run) == (16 + 12 * 3, 16 + 12 * 5)
    pair.zipped(**ZIPPED)
    input_ids = torch.tensor([[1, IMG, 13, 40, 41]])
    expected = pair.own.generate(input_ids, images=images, image_sizes=sizes, **GREEDY)
    prompts = native_prompts(pair.native, input_ids, None, [run])
    out = pair.native.generate(**prompts, **native_pixels(pair.native, images, sizes), **GREEDY)
    assert torch.equal(out[:, prompts["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("name", cases("e2e"))
def test_recorded_answers(name: str, recorded_checkpoint, tmp_path: Path):
    """The released method's, through ``convert`` and transformers."""
    case = Case.read(name)
    pair = load_pair(recorded_checkpoint(case.model, case.config_overrides), tmp_path / "native")
    images, sizes = list(case.images()), case.image_sizes
    inputs = {
        **native_prompts(
            pair.native, case.data["input_ids"], case.data.get("attention_mask"), vanilla_runs(pair, images, sizes)
        ),
        **native_pixels(pair.native, images, sizes),
    }
    for mode in ("vanilla", "zip", "vanilla"):  # vanilla again: unzip restores it
        if mode == "zip":
            visionzip(pair.native, case.visionzip["dominant_arg"], case.visionzip["contextual_arg"])
        else:
            unzip(pair.native)
        out = pair.native.generate(**inputs, max_new_tokens=case.max_new_tokens, do_sample=False, **RECORD)
        expected = case.data[f"{mode}_first_logits"]
        assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], case.data[f"{mode}_generated_ids"])
        torch.testing.assert_close(out.logits[0][:, : expected.shape[1]], expected, atol=2e-3, rtol=0)
