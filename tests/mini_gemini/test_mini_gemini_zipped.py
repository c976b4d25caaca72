"""Mini-Gemini with VisionZip, which mines for the kept tokens only, and its answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mini_gemini import (
    ASKED,
    PATCHES,
    clip_of,
    convnext,
    pixels,
    plain_map,
    plain_mining,
    plain_projector,
    smaller,
    square,
)
from safetensors.torch import load_file
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.mini_gemini.mining import sub_patches
from visionzip import compress_tokens, unzip, visionzip


class TestZipped:
    def test_tokens_are_those_of_a_plain_reference(self, make_mgm, load_mgm) -> None:
        """Selection on eager attention; sub-patches of the dominant patch, of the target, or averages for CLS."""
        images, weights = pixels(3), load_file(make_mgm() / "model.safetensors")
        clip = clip_of(make_mgm())
        with torch.no_grad():
            small = torch.stack([smaller(image, 56) for image in images])
            keys: list[Tensor] = []
            handle = clip.encoder.layers[-2].self_attn.k_proj.register_forward_hook(lambda *args: keys.append(args[2]))
            out = clip(small, output_hidden_states=True, output_attentions=True)
            handle.remove()
            zipped = compress_tokens(
                out.hidden_states[-2],
                out.attentions[-2][:, :, 0, 1:].sum(dim=1),
                keys[0].unflatten(-1, (4, -1)).mean(dim=2),
                dominant=5,
                contextual=3,
            )
            high = plain_map(images)
            expected = []
            for own, kept, targets, features in zip(
                zipped.tokens, zipped.dominant_indices, zipped.target_indices, high, strict=True
            ):
                assert kept[0] == 0
                averages = F.adaptive_avg_pool2d(features[:4], 8).flatten(1).T
                found = [averages]
                found += [square(features, (i - 1) // 4 * 8, (i - 1) % 4 * 8, 8) for i in [*kept[1:], *targets]]
                mined = [plain_mining(weights, *pair) for pair in list(zip(own, found, strict=True))[1:]]
                expected.append(plain_projector(weights, own[1:] + torch.stack(mined)))
        model = visionzip(load_mgm(), 5, 3)
        tokens = model.encode_images(images)
        assert tokens.shape == (3, 8, 32)
        torch.testing.assert_close(tokens[:, 1:], torch.stack(expected), atol=1e-4, rtol=1e-4)

    def test_the_cls_token_reads_averages_of_the_whole_image(self, make_mgm, load_mgm) -> None:
        image, weights = pixels(), load_file(make_mgm() / "model.safetensors")
        with torch.no_grad():
            cls = clip_of(make_mgm())(smaller(image[0], 56)[None], output_hidden_states=True).hidden_states[-2][0, 0]
            hidden = convnext()(image, output_hidden_states=True).hidden_states[1:]
            cells = torch.cat([F.adaptive_avg_pool2d(stage[0], 8) for stage in hidden]).flatten(1).T
            expected = plain_projector(weights, cls + plain_mining(weights, cls, cells))
        model = visionzip(load_mgm(), 1, 0)
        torch.testing.assert_close(model.encode_images(image)[0], expected[None], atol=1e-4, rtol=1e-4)

    def test_a_kept_patch_is_what_it_is_without_visionzip(self, load_mgm) -> None:
        model = load_mgm()
        plain = model.encode_images(pixels(2))
        zipped = visionzip(model, 6, 2).encode_images(pixels(2))
        kept = model.get_vision_tower().compress(model.whole_images(pixels(2))).dominant_indices[:, 1:] - 1
        for image in range(2):
            torch.testing.assert_close(zipped[image, 1:6], plain[image, kept[image]], atol=1e-5, rtol=1e-5)

    def test_everything_kept(self, load_mgm) -> None:
        model = load_mgm()
        plain = model.encode_images(pixels())
        with pytest.warns(UserWarning, match="nothing will be compressed"):
            zipped = visionzip(model, 54, 10).encode_images(pixels())
        assert zipped.shape == (1, 1 + PATCHES, 32)  # and CLS
        torch.testing.assert_close(zipped[:, 1:], plain, atol=1e-5, rtol=1e-5)

    def test_default_budget_and_exact_undoing(self, load_mgm) -> None:
        model = load_mgm()
        before = model(input_ids=ASKED, images=pixels()).logits
        with pytest.warns(UserWarning, match="nothing will be compressed"):
            visionzip(model)
        assert (model.config.visionzip["dominant"], model.config.visionzip["contextual"]) == (54, 10)
        visionzip(model, 4, 2)
        assert model(input_ids=ASKED, images=pixels()).logits.shape[1] == before.shape[1] - PATCHES + 6
        assert torch.equal(unzip(model)(input_ids=ASKED, images=pixels()).logits, before)
        assert not hasattr(model.config, "visionzip")

    def test_only_the_kept_tokens_are_mined(self, load_mgm, monkeypatch: pytest.MonkeyPatch) -> None:
        """K + M queries, and the sub-patches of K - 1 + M patches; CLS has its averages."""
        model, looked_at, asked = visionzip(load_mgm(), 5, 3), [], []

        def counted(maps: Any, corners: Tensor, *args: Any) -> Tensor:
            looked_at.append(tuple(corners.shape[:2]))
            return sub_patches(maps, corners, *args)

        monkeypatch.setattr("llava.model.mini_gemini.mgm_arch.sub_patches", counted)
        query = model.get_model().vlm_uni_query_projector
        query.register_forward_pre_hook(lambda module, args: asked.append(tuple(args[0].shape[:2])))
        model.encode_images(pixels(2))
        assert (looked_at, asked) == ([(2, 7)], [(2, 8)])


@pytest.mark.parametrize("zipped", [False, True])
class TestGeneration:
    @pytest.fixture
    def model(self, load_mgm, zipped: bool) -> Any:
        return visionzip(load_mgm(), 4, 2) if zipped else load_mgm()

    def test_a_batch_answers_as_one_by_one(self, model) -> None:
        images = pixels(3)
        rows = [ASKED[0], torch.tensor([1, 30, 60, 70]), torch.tensor([1, IMAGE_TOKEN_INDEX, 9, IMAGE_TOKEN_INDEX])]
        taken = [images[:1], None, images[1:]]
        alone = [
            model.generate(row[None], images=own, max_new_tokens=5)[0] for row, own in zip(rows, taken, strict=True)
        ]
        padded = torch.stack([F.pad(row, (5 - len(row), 0)) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (5 - len(row), 0)) for row in rows])
        together = model.generate(padded, attention_mask=mask, images=list(images), max_new_tokens=5)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[: len(one)])

    def test_with_the_cache_as_without(self, model) -> None:
        options = {"images": pixels(), "max_new_tokens": 6, "min_new_tokens": 6}
        expected = model.generate(ASKED, use_cache=False, **options)
        assert torch.equal(model.generate(ASKED, **options), expected)

    def test_only_the_last_token_has_logits(self, model) -> None:
        """``generate`` asks for no others where the forward names ``logits_to_keep``."""
        lengths = []
        model.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        model.generate(ASKED, images=pixels(), max_new_tokens=3, min_new_tokens=3)
        assert lengths == [1, 1, 1]

    def test_an_image_given_twice_is_encoded_once(self, model, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        aux = model.get_vision_tower_aux()
        aux.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        image = pixels()[0]
        first, second, other = model.visual_tokens([image, image, pixels(seed=1)[0]])
        assert seen == [2]
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
