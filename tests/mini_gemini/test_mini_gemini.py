"""Mini-Gemini: mining, the visual tokens, and its high definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mini_gemini import (
    ASKED,
    AUX_SIZE,
    HD,
    PATCHES,
    clip_of,
    convnext,
    pixels,
    plain_map,
    plain_mining,
    plain_projector,
    plain_tokens,
    prompt,
    smaller,
    square,
)
from safetensors.torch import load_file
from torch import nn

from checkpoints import CLIP, picture
from llava.mm_utils import process_images
from llava.model.mini_gemini.mining import mine, sub_patches
from visionzip import visionzip


class TestMining:
    """The two functions, alone."""

    @pytest.mark.parametrize("pooled", [1, 2])
    def test_sub_patches_are_cut_out_of_the_joined_map(self, pooled: int) -> None:
        maps = [torch.randn(2, 3 * 2**stage, 24 >> stage, 24 >> stage) for stage in range(3)]
        joined = [F.interpolate(stage, (24, 24), mode="bilinear", align_corners=False) for stage in maps]
        whole = F.avg_pool2d(torch.cat(joined, dim=1), pooled)
        corners = torch.tensor([[[0, 0], [8, 16]], [[16, 16], [0, 8]]])
        found = sub_patches(maps, corners, 8, pooled)
        for image in range(2):
            for patch, (row, column) in enumerate(corners[image].tolist()):
                expected = square(whole[image], row // pooled, column // pooled, 8 // pooled)
                torch.testing.assert_close(found[image, patch], expected, atol=1e-5, rtol=1e-5)

    def test_mining_is_attention_over_the_sub_patches(self) -> None:
        torch.manual_seed(0)
        projectors = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8)) for width in (8, 20, 20)]
        for parameter in (p for projector in projectors for p in projector.parameters()):
            nn.init.normal_(parameter)
        tokens, candidates = torch.randn(2, 3, 8), torch.randn(2, 3, 5, 20)
        query, keys, values = (p(x) for p, x in zip(projectors, (tokens, candidates, candidates), strict=True))
        expected = F.scaled_dot_product_attention(query[:, :, None], keys, values)[:, :, 0]
        torch.testing.assert_close(mine(tokens, candidates, *projectors), expected, atol=1e-5, rtol=1e-4)

    def test_half_precision_has_room_for_large_logits(self) -> None:
        """float16 ends at 65504; what the logits are before they are scaled down by the root of the width may not."""
        torch.manual_seed(0)
        projectors = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256)) for width in (256, 20, 20)]
        for projector in projectors:
            nn.init.normal_(projector[1].weight, std=8)
        tokens, candidates = torch.randn(1, 8, 256).half(), torch.randn(1, 8, 5, 20).half()
        expected = mine(tokens.float(), candidates.float(), *projectors)
        found = mine(tokens, candidates, *(projector.half() for projector in projectors))
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.01)


class TestVanilla:
    def test_visual_tokens_are_those_of_a_plain_reference(self, make_mgm, load_mgm) -> None:
        images = pixels(2)
        tokens = load_mgm().visual_tokens(images)
        assert [tuple(own.shape) for own in tokens] == [(PATCHES, 32)] * 2
        for own, image in zip(tokens, images, strict=True):
            torch.testing.assert_close(own, plain_tokens(make_mgm(), image), atol=1e-4, rtol=1e-4)

    def test_logits_and_loss_are_those_of_llama_on_these_tokens(self, make_mgm, load_mgm) -> None:
        model, image = load_mgm(), pixels()
        visual = plain_tokens(make_mgm(), image[0])
        text = model.get_input_embeddings()(prompt(1, 30, 40, 50))[0]
        embeds = torch.cat([text[:2], visual, text[2:]])[None]
        labels = prompt(-100, -100, -100, 40, 50)
        expanded = torch.cat([torch.full((1, 2 + PATCHES), -100), labels[:, 3:]], dim=1)
        out = model(input_ids=ASKED, images=image, labels=labels)
        expected = model(inputs_embeds=embeds, labels=expanded)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.loss, expected.loss, atol=1e-4, rtol=1e-4)
        out.loss.backward()
        assert model.model.vlm_uni_val_projector[1].weight.grad.abs().sum() > 0

    def test_images_and_images_aux_as_the_original_code_takes_them(self, load_mgm) -> None:
        model, images = load_mgm(), pixels(2)
        small = torch.stack([smaller(image, 56) for image in images])
        ids = ASKED.repeat(2, 1)
        expected = model.generate(ids, images=images, max_new_tokens=4)
        assert torch.equal(model.generate(ids, images=small, images_aux=images, max_new_tokens=4), expected)
        logits = model(input_ids=ids, images=small, images_aux=images).logits
        torch.testing.assert_close(logits, model(input_ids=ids, images=images).logits)
        torch.testing.assert_close(model.encode_images(small, images), model.encode_images(images))

    def test_pictures_are_prepared_in_the_high_resolution(self, load_mgm) -> None:
        model = load_mgm()
        processor = model.get_vision_tower().image_processor
        prepared = process_images([picture(0), picture(1, (50, 200))], processor, model.config)
        assert prepared.shape == (2, 3, AUX_SIZE, AUX_SIZE)
        grey = prepared[0, :, :16]  # a wide picture is padded above, with CLIP's mean colour
        assert grey.abs().max() < 0.02

    def test_576_tokens_at_the_released_resolution(self, load_mgm) -> None:
        model = load_mgm(vision={**CLIP, "image_size": 336}, image_size_aux=768)
        assert model.encode_images(pixels(1, 768)).shape == (1, 576, 32)
        assert visionzip(model).encode_images(pixels(1, 768)).shape == (1, 64, 32)
        assert visionzip(model, 162, 30).encode_images(pixels(1, 768)).shape == (1, 192, 32)

    @pytest.mark.parametrize(
        ("images", "aux", "error", "match"),
        [
            (pixels(1, 56), None, ValueError, r"images\[0\] has shape \(3, 56, 56\), but it must be \(3, 128, 128\)"),
            (pixels(1, 56), pixels(1, 56), ValueError, r"images_aux\[0\] has shape \(3, 56, 56\)"),
            (pixels(1, 64), pixels(1), ValueError, r"images\[0\] has shape \(1, 3, 64, 64\).*be \(1, 3, 56, 56\)"),
            (pixels(2, 56), pixels(1), ValueError, "images_aux has 1 entries for 2 images"),
            ([pixels()[0], pixels()[0] * torch.nan], None, ValueError, r"images\[1\] has 49152 pixels that are NaN"),
            (pixels(1, 56) * torch.nan, pixels(1), ValueError, r"images\[0\] has 9408 pixels that are NaN"),
            (pixels().byte(), None, ValueError, "images are torch.uint8"),
            (["cat.png"], None, TypeError, r"images\[0\] is a str, not a tensor"),
        ],
    )
    def test_images_that_do_not_fit(self, load_mgm, images: Any, aux: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            load_mgm().encode_images(images, aux)


class TestHighDefinition:
    """MGM-7B-HD: four quarters and the whole image, of one map."""

    def test_tokens_are_those_of_a_plain_reference(self, make_mgm, load_mgm) -> None:
        folder, (image,) = make_mgm(**HD), pixels(1, 2 * AUX_SIZE)
        weights, clip = load_file(folder / "model.safetensors"), clip_of(folder)
        large = smaller(image, 112)
        high = plain_map(image[None])[0]
        low = F.interpolate(high[None], scale_factor=0.5, mode="bilinear", align_corners=False)[0]
        expected = []
        with torch.no_grad():
            for tile, (row, column) in enumerate([(0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]):
                part = large[:, 56 * row : 56 * (row + 1), 56 * column : 56 * (column + 1)] if tile else None
                source = low if part is None else high[:, 32 * row :, 32 * column :]
                seen = smaller(large, 56) if part is None else part
                features = clip(seen[None], output_hidden_states=True).hidden_states[-2][0, 1:]
                found = [square(source, i // 4 * 8, i % 4 * 8, 8) for i in range(PATCHES)]
                mined = [plain_mining(weights, *pair) for pair in zip(features, found, strict=True)]
                expected.append(plain_projector(weights, features + torch.stack(mined)))
        (tokens,) = load_mgm(**HD).visual_tokens(image[None])
        torch.testing.assert_close(tokens, torch.cat(expected), atol=1e-4, rtol=1e-4)

    def test_images_as_the_original_code_takes_them(self, load_mgm) -> None:
        model, (image,) = load_mgm(**HD), pixels(1, 2 * AUX_SIZE)
        large = smaller(image, 112)
        quarters = [large[:, y : y + 56, x : x + 56] for y in (0, 56) for x in (0, 56)]
        tiles = torch.stack([*quarters, smaller(large, 56)])  # the whole image last
        torch.testing.assert_close(model.encode_images(tiles[None], image[None]), model.encode_images(image[None]))

    def test_zipped_tile_by_tile(self, load_mgm) -> None:
        """Each tile has K + M tokens of its own; its dominant patches are what they are without VisionZip."""
        model, images = load_mgm(**HD), pixels(1, 2 * AUX_SIZE)
        plain = model.encode_images(images)[0].unflatten(0, (5, PATCHES))
        large = smaller(images[0], 112)
        quarters = [large[:, y : y + 56, x : x + 56] for y in (0, 56) for x in (0, 56)]
        zipped = visionzip(model, 5, 2).encode_images(images)[0].unflatten(0, (5, 7))
        kept = model.get_vision_tower().compress(torch.stack([smaller(large, 56), *quarters])).dominant_indices - 1
        for tile in range(5):
            torch.testing.assert_close(zipped[tile, 1:5], plain[tile, kept[tile, 1:]], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("zipped", [False, True])
    def test_a_batch_is_what_its_images_are_alone(self, load_mgm, zipped: bool) -> None:
        model, images = load_mgm(**HD), pixels(2, 2 * AUX_SIZE)
        if zipped:
            visionzip(model, 5, 2)
        alone = torch.cat([model.encode_images(image[None]) for image in images])
        torch.testing.assert_close(model.encode_images(images), alone, atol=1e-5, rtol=1e-5)

    def test_the_cls_token_of_a_tile_reads_averages_of_that_tile(self, make_mgm, load_mgm) -> None:
        folder, (image,) = make_mgm(**HD), pixels(1, 2 * AUX_SIZE)
        weights, clip, large = load_file(folder / "model.safetensors"), clip_of(folder), smaller(image, 112)
        expected = []
        with torch.no_grad():
            stages = convnext()(image[None], output_hidden_states=True).hidden_states[1:]
            for top, left, scale in ((0, 0, 2), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)):  # quarters, not pixels
                seen = smaller(large[:, 56 * top : 56 * (top + scale), 56 * left : 56 * (left + scale)], 56)
                halves = [(stage[0], stage.shape[-1] // 2) for stage in stages]
                parts = [s[:, top * h : (top + scale) * h, left * h : (left + scale) * h] for s, h in halves]
                cells = torch.cat([F.adaptive_avg_pool2d(part, 8) for part in parts]).flatten(1).T
                cls = clip(seen[None], output_hidden_states=True).hidden_states[-2][0, 0]
                expected.append(plain_projector(weights, cls + plain_mining(weights, cls, cells)))
        tokens = visionzip(load_mgm(**HD), 1, 0).encode_images(image[None])[0]
        torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-4, rtol=1e-4)
