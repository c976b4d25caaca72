"""The recorded tensors of the released method, through the public API and from original-format folders.

A subset lies in ``tests/golden``; where the whole set is at hand (``../shared/golden``) all of it runs. Its FORMAT.md
says what the fields are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from checkpoints import write_tokenizer, write_tower
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import (
    expand2square,
    get_anyres_image_grid_shape,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import unpad_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.tokenizer import load_tokenizer
from recorded import ROOT, Case, cases
from visionzip import compress_tokens, unzip, visionzip
from visionzip.attention import cls_attention, merge_keys, patch_scores, read_attention

TOLERANCE = {"atol": 1e-4, "rtol": 0}
PILLOW = int(PIL.__version__.partition(".")[0])


def facts(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"facts_{name}.json").read_text())


@pytest.fixture
def load(recorded_checkpoint):
    """Model of a case, with the case's config and, if it has one, its VisionZip setting."""

    def make(case: Case) -> Any:
        folder = recorded_checkpoint(case.model, case.config_overrides)
        _, model, _, _ = load_pretrained_model(str(folder), device="cpu", torch_dtype=torch.float32)
        return zipped(model, case.visionzip) if case.visionzip else model

    return make


def zipped(model: Any, setting: dict[str, int]) -> Any:
    return visionzip(model, dominant=setting["dominant_arg"], contextual=setting["contextual_arg"])


def test_there_are_recorded_cases():
    assert cases("tower") and cases("arch") and cases("e2e") and len(cases("facts")) >= 4


@pytest.mark.parametrize("name", cases("tower"))
def test_tensor_core(name: str):
    case = Case.read(name)
    shared = load_file(ROOT / case.shared)
    result = compress_tokens(
        shared["hidden_states_m2"],
        shared["cls_attention_m2"].sum(1)[:, 1:],
        shared["metric"],
        case.dominant_arg,
        case.contextual_arg,
    )
    assert torch.equal(result.dominant_indices, case.data["dominant_idx_sorted"])
    assert torch.equal(result.target_indices, case.data["contextual_target_idx"])
    assert torch.equal(result.assignment, case.data["contextual_assign"].long())
    torch.testing.assert_close(result.tokens, case.data["tokens"], **TOLERANCE)


@pytest.mark.parametrize("name", cases("tower"))
def test_tower(name: str, tmp_path: Path):
    case = Case.read(name)
    shared = load_file(ROOT / case.shared)
    recorded = json.loads((ROOT / case.model).read_text())
    write_tower(tmp_path, recorded["config"], load_file(ROOT / recorded["weights"]))
    tower = CLIPVisionTower(str(tmp_path), SimpleNamespace(mm_vision_select_layer=-2))
    pixels = case.pixels((shared | case.data)["pixel_compact"])

    visionzip(tower, dominant=case.dominant_arg, contextual=case.contextual_arg)
    with torch.no_grad(), read_attention(tower.encoder.encoder.layers[-2].self_attn) as reader:
        result = tower.compress(pixels)
    read = reader.result()
    torch.testing.assert_close(cls_attention(read), shared["cls_attention_m2"], atol=1e-5, rtol=0)
    torch.testing.assert_close(merge_keys(read), shared["metric"], **TOLERANCE)
    score_order = patch_scores(read, cls_token=True).argsort(dim=1, descending=True) + 1
    assert torch.equal(score_order[:, : case.topk], case.data["dominant_idx_score_order"][:, 1:])
    assert torch.equal(result.dominant_indices, case.data["dominant_idx_sorted"])
    torch.testing.assert_close(tower(pixels), case.data["tokens"], **TOLERANCE)

    unzip(tower)
    torch.testing.assert_close(tower(pixels), shared["hidden_states_m2"][:, 1:], **TOLERANCE)


@pytest.mark.parametrize("name", cases("arch"))
def test_prompts_and_images(name: str, load):
    case = Case.read(name)
    model = load(case)
    data = case.data
    with torch.no_grad():
        _, positions, mask, past, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            data["input_ids"],
            None,
            data.get("attention_mask"),
            None,
            data.get("labels"),
            case.images(),
            case.image_sizes,
        )
    returned = {"position_ids": positions, "attention_mask": mask, "labels": labels}
    for key, value in returned.items():
        assert (value is None) == (key in case.outputs_none), key
        if value is not None:
            assert torch.equal(value, data[f"out_{key}"]), key
    assert past is None
    torch.testing.assert_close(embeds, data["inputs_embeds"], **TOLERANCE)
    if case.visionzip:
        pixels = case.pixels(data["pixel_compact"])
        assert torch.equal(model.get_vision_tower().compress(pixels).dominant_indices, data["dominant_idx_sorted"])


@pytest.mark.parametrize("name", cases("e2e"))
def test_greedy_decoding(name: str, load):
    case = Case.read(name)
    model = load(SimpleNamespace(**{**vars(case), "visionzip": None}))
    inputs = {
        "images": case.images(),
        "image_sizes": case.image_sizes,
        "attention_mask": case.data.get("attention_mask"),
    }
    for mode in ("vanilla", "zip", "vanilla"):  # vanilla again: unzip restores it
        model = zipped(model, case.visionzip) if mode == "zip" else unzip(model)
        out = model.generate(
            case.data["input_ids"],
            **inputs,
            max_new_tokens=case.max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, case.data[f"{mode}_generated_ids"])
        torch.testing.assert_close(out.logits[0], case.data[f"{mode}_first_logits"], atol=2e-3, rtol=0)


def test_anyres_sizes():
    recorded = facts("anyres_sizes")
    tile, side = recorded["tile"], recorded["patches_per_side"]
    pinpoints = recorded["grid_pinpoints_wh"]
    for row in recorded["rows"]:
        size = tuple(row["size"])
        assert list(select_best_resolution(size, pinpoints)) == row["best_resolution"], size
        assert list(select_best_resolution(size, recorded["alt_pinpoints_wh"])) == row["alt_best_resolution"], size
        columns, rows = get_anyres_image_grid_shape(size, str(pinpoints), tile)
        assert [columns, rows] == row["grid_wh"]
        assert columns * rows + 1 == row["tiles_including_base"]
        height, width = unpad_image(torch.zeros(1, rows * side, columns * side), size).shape[1:]
        assert [height, width] == row["unpadded_grid_hw"], size
        assert height * width == row["unpad_tokens_without_newline"]
        assert height * (width + 1) == row["unpad_tokens_with_newline"] == row["total_vanilla_tokens"] - side**2


def formula_image(row: dict[str, Any]) -> Image.Image:
    a, b, k, m = row["formula_params"]
    width, height = row["size"]
    y, x, c = np.ogrid[:height, :width, :3]
    return Image.fromarray(((a * x + b * y + k * c + ((x // 7) * (y // 5)) % m) % 256).astype(np.uint8))


@pytest.mark.parametrize("row", facts("pixels")["rows"], ids=lambda row: row["name"])
def test_pixels(row: dict[str, Any]):
    recorded = facts("pixels")
    tensors = load_file(ROOT / recorded["tensors"])
    size = recorded["processor"]["crop"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image = formula_image(row)

    def digest(picture: Image.Image) -> str:
        return hashlib.sha256(picture.tobytes()).hexdigest()

    assert digest(image) == row["input_sha256"]
    square = expand2square(image, tuple(row["expand2square_fill"]))
    assert digest(square) == row["expand2square_sha256"]
    assert (square is image) == row["expand2square_is_same_object"]
    resolution = select_best_resolution(image.size, recorded["grid_pinpoints_wh"])
    padded = resize_and_pad_image(image, resolution)
    assert digest(padded) == row["resize_and_pad_sha256"] and list(padded.size) == row["resize_and_pad_size"]
    for mode in ("pad", "plain", "anyres"):
        config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=recorded["grid_pinpoints_wh"])
        pixels = process_images([image], processor, config)[0]
        assert list(pixels.shape) == row[f"{mode}_shape"]
        sampled = tensors[f"{row['name']}_{mode}_sub16"]
        if mode == "anyres" and image.height > image.width and PILLOW < 13:
            # Pillow 13, which recorded, filters the columns of a tall image before its rows, as older ones do the rows
            # of the image on its side: the base tile is that one's, turned back.
            on_its_side = process_images([image.transpose(Image.Transpose.TRANSPOSE)], processor, config)[0]
            pixels[0] = on_its_side[0].mT
        torch.testing.assert_close(pixels[..., ::16, ::16], sampled, atol=1e-5, rtol=0)


ROLES = {"u": 0, "a": 1}


@pytest.mark.parametrize("row", facts("prompts")["rows"], ids=lambda row: row["mode"])
def test_prompts(row: dict[str, Any]):
    conversation = conv_templates[row["mode"]].copy()
    for role, text in row["turns"]:
        conversation.append_message(conversation.roles[ROLES[role]], text)
    if row["prompt"] is None:
        with pytest.raises(TypeError, match="plain"):
            conversation.get_prompt()
    else:
        assert conversation.get_prompt() == row["prompt"]


def test_templates():
    for mode, recorded in facts("prompts")["separators"].items():
        template = conv_templates[mode]
        assert SeparatorStyle[recorded.pop("style")] is template.sep_style
        assert {key: getattr(template, key) for key in recorded} | {"roles": list(template.roles)} == recorded


class CharacterTokenizer:
    """One id per character, as facts_image_token describes it."""

    def __init__(self, bos: bool) -> None:
        self.bos_token_id = 1
        self.bos = bos

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * self.bos + [ord(character) + 10 for character in text])


def test_image_sentinel():
    for row in facts("image_token")["rows"]:
        tokenizer = CharacterTokenizer(row["bos"])
        assert tokenizer_image_token(row["prompt"], tokenizer) == row["ids"]
        assert tokenizer_image_token(row["prompt"], tokenizer, return_tensors="pt").tolist() == row["ids"]


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_ids(legacy: bool, tmp_path: Path):
    """Loaded from LLaVA's files, and again after transformers has saved it."""
    recorded = facts("image_token")["sentencepiece"]
    write_tokenizer(tmp_path, ROOT / recorded["model"], legacy=legacy)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, load_tokenizer(tmp_path / "saved")):
        for row in recorded["rows"]:
            expected = row["ids_legacy" if legacy else "ids"]
            assert tokenizer_image_token(row["prompt"], loaded) == expected, row["prompt"]


def test_tokenizer_without_settings(tmp_path: Path):
    """A bare tokenizer.model is a legacy Llama tokenizer with a beginning-of-sequence token."""
    recorded = facts("image_token")["sentencepiece"]
    shutil.copy(ROOT / recorded["model"], tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    for row in recorded["rows"]:
        assert tokenizer_image_token(row["prompt"], tokenizer) == row["ids_legacy"]
