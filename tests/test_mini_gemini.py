"""Mini-Gemini: two towers, patch info mining, and VisionZip that mines for the kept tokens only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mini_gemini import AUX_SIZE, HD, convnext, openclip_weights, write_mini_gemini
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModel

from checkpoints import CLIP, edit_config, edit_weights, picture, write_tokenizer
from llava.cli import main as visionzip_command
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for
from llava.efficiency.mining import build_model, mining_of
from llava.eval.run_llava import main as run_llava
from llava.mm_utils import process_images
from llava.model import MGMLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.mining import mine, sub_patches
from llava.model.multimodal_encoder.openclip_encoder import OpenCLIPVisionTower
from llava.serve.chat import ChatSession
from visionzip import compress_tokens, unzip, visionzip
from visionzip.baselines.controls import random_tokens

PATCHES = 16


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a Mini-Gemini; the same arguments give the same folder."""
    folders: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        if (key := repr(options)) not in folders:
            folders[key] = write_mini_gemini(tmp_path_factory.mktemp("checkpoint") / "MGM-tiny", **options)
        return folders[key]

    return make


@pytest.fixture
def load(make: Callable[..., Path]) -> Callable[..., Any]:
    """Such a model on the CPU."""
    return lambda **options: load_pretrained_model(str(make(**options)), device="cpu")[1]


@pytest.fixture
def copied(make: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint for this test alone, with the folder of its high-resolution tower in ``aux`` beside it."""
    source = make()
    shutil.copytree(source.with_name(source.name + "-aux"), tmp_path / "aux")
    folder = shutil.copytree(source, tmp_path / "MGM-tiny")
    edit_config(folder, mm_vision_tower_aux=str(tmp_path / "aux"))
    return folder


def pixels(count: int = 1, edge: int = AUX_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def prompt(*ids: int) -> Tensor:
    return torch.tensor([ids])


ASKED = prompt(1, 30, IMAGE_TOKEN_INDEX, 40, 50)


def clip_of(folder: Path) -> CLIPVisionModel:
    """transformers' CLIP with the checkpoint's own tower, and attention that can be read."""
    return CLIPVisionModel.from_pretrained(folder.with_name(folder.name + "-tower"), attn_implementation="eager").eval()


def plain_map(images: Tensor) -> Tensor:
    """All of ConvNeXt's stages at the first one's size: (B, 60, h / 4, w / 4)."""
    model = convnext()
    stages, maps = [], model.embeddings(images)
    for stage in model.encoder.stages:
        stages.append(maps := stage(maps))
    size = stages[0].shape[-2:]
    return torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=False) for each in stages], dim=1)


def plain_mining(weights: dict[str, Tensor], tokens: Tensor, candidates: Tensor) -> Tensor:
    """One token (D,) and its sub-patches (P, C): attention with every projection written out."""

    def project(name: str, values: Tensor) -> Tensor:
        own = [weights[f"model.vlm_uni_{name}_projector.{key}"] for key in ("0.weight", "0.bias", "1.weight", "1.bias")]
        return F.linear(F.layer_norm(values, values.shape[-1:], own[0], own[1]), own[2], own[3])

    query, keys, values = project("query", tokens), project("aux", candidates), project("val", candidates)
    return (keys @ query / len(query) ** 0.5).softmax(dim=0) @ values


def square(features: Tensor, row: int, column: int, edge: int) -> Tensor:
    """The positions (edge * edge, C) of a square of a map (C, h, w)."""
    return features[:, row : row + edge, column : column + edge].flatten(1).T


def plain_projector(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    own = [weights[f"model.mm_projector.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")]
    return F.linear(F.gelu(F.linear(tokens, own[0], own[1])), own[2], own[3])


def smaller(image: Tensor, edge: int) -> Tensor:
    return F.interpolate(image[None], (edge, edge), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def plain_tokens(folder: Path, image: Tensor) -> Tensor:
    """Visual tokens (16, 32) of an image (3, 128, 128), as the paper has them."""
    weights = load_file(folder / "model.safetensors")
    features = clip_of(folder)(smaller(image, 56)[None], output_hidden_states=True).hidden_states[-2][0, 1:]
    high = plain_map(image[None])[0]
    mined = [plain_mining(weights, features[i], square(high, i // 4 * 8, i % 4 * 8, 8)) for i in range(PATCHES)]
    return plain_projector(weights, features + torch.stack(mined))


class TestTower:
    def test_its_maps_are_those_of_transformers_convnext(self, make) -> None:
        """Alone, with OpenCLIP's own file; widths and depths are read from it too."""
        folder = make()
        tower = OpenCLIPVisionTower(str(folder.with_name(folder.name + "-aux")), SimpleNamespace())
        assert tower.hidden_size == 60
        maps = tower(pixels(2))
        assert [tuple(stage.shape) for stage in maps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
        with torch.no_grad():
            expected = convnext()(pixels(2), output_hidden_states=True).hidden_states[1:]
        for stage, other in zip(maps, expected, strict=True):
            torch.testing.assert_close(stage, other, atol=1e-4, rtol=1e-4)

    def test_the_checkpoint_may_have_its_weights(self, make, load, tmp_path: Path) -> None:
        whole = make(aux_inside=True)
        keys = {key for key in load_file(whole / "model.safetensors") if "tower_aux" in key}
        assert {"model.vision_tower_aux.vision_stem.0.weight", "model.vision_tower_aux.vision_stem.1.bias"} < keys
        assert "model.vision_tower_aux.vision_stages.1.downsample.1.weight" in keys
        assert "model.vision_tower_aux.vision_stages.2.blocks.2.mlp.fc2.bias" in keys
        other = shutil.copytree(whole, tmp_path / "MGM-tiny")
        edit_weights(other, lambda weights: weights | {key: 2 * weights[key] for key in keys})
        doubled = load_pretrained_model(str(other), device="cpu")[1].get_vision_tower_aux()
        for key, value in load(aux_inside=True).get_vision_tower_aux().state_dict().items():
            torch.testing.assert_close(doubled.state_dict()[key], 2 * value)

    def test_stays_as_it_is_in_training(self, load) -> None:
        assert not any(parameter.requires_grad for parameter in load().get_vision_tower_aux().parameters())


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


class TestVanilla:
    @pytest.mark.parametrize("aux_inside", [False, True])
    def test_loads_the_original_layout_with_nothing_missing_or_left_over(self, make, aux_inside: bool) -> None:
        folder = make(aux_inside=aux_inside)
        _, model, processor, length = load_pretrained_model(str(folder), None, "MGM-7B", device="cpu")
        assert isinstance(model, MGMLlamaForCausalLM)
        assert (length, processor.crop_size["height"]) == (2048, 56)
        own = model.state_dict()
        for key, value in load_file(folder / "model.safetensors").items():
            assert torch.equal(own.pop(key), value), key
        assert all(key.startswith("model.vision_tower_aux.") for key in own)
        for key, value in openclip_weights(convnext()).items():
            if key.startswith(("visual.trunk.stem.", "visual.trunk.stages.")):
                key = key.replace("visual.trunk.", "model.vision_tower_aux.vision_")  # noqa: PLW2901
                assert torch.equal(model.state_dict()[key], value), key

    def test_early_uploads_have_another_name(self, copied: Path) -> None:
        edit_config(copied, architectures=["MiniGeminiLlamaForCausalLM"], model_type="mini_gemini")
        assert isinstance(load_pretrained_model(str(copied), device="cpu")[1], MGMLlamaForCausalLM)

    def test_visual_tokens_are_those_of_a_plain_reference(self, make, load) -> None:
        images = pixels(2)
        tokens = load().visual_tokens(images)
        assert [tuple(own.shape) for own in tokens] == [(PATCHES, 32)] * 2
        for own, image in zip(tokens, images, strict=True):
            torch.testing.assert_close(own, plain_tokens(make(), image), atol=1e-4, rtol=1e-4)

    def test_logits_and_loss_are_those_of_llama_on_these_tokens(self, make, load) -> None:
        model, image = load(), pixels()
        visual = plain_tokens(make(), image[0])
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

    def test_images_and_images_aux_as_the_original_code_takes_them(self, load) -> None:
        model, images = load(), pixels(2)
        small = torch.stack([smaller(image, 56) for image in images])
        ids = ASKED.repeat(2, 1)
        expected = model.generate(ids, images=images, max_new_tokens=4)
        assert torch.equal(model.generate(ids, images=small, images_aux=images, max_new_tokens=4), expected)
        logits = model(input_ids=ids, images=small, images_aux=images).logits
        torch.testing.assert_close(logits, model(input_ids=ids, images=images).logits)
        torch.testing.assert_close(model.encode_images(small, images), model.encode_images(images))

    def test_pictures_are_prepared_in_the_high_resolution(self, load) -> None:
        model = load()
        processor = model.get_vision_tower().image_processor
        prepared = process_images([picture(0), picture(1, (50, 200))], processor, model.config)
        assert prepared.shape == (2, 3, AUX_SIZE, AUX_SIZE)
        grey = prepared[0, :, :16]  # a wide picture is padded above, with CLIP's mean colour
        assert grey.abs().max() < 0.02

    def test_saved_and_loaded_again(self, load, tmp_path: Path) -> None:
        model = load()
        model.save_pretrained(tmp_path / "saved")
        write_tokenizer(tmp_path / "saved")
        edit_config(tmp_path / "saved", mm_vision_tower="gone/clip", mm_vision_tower_aux="gone/convnext")
        again = load_pretrained_model(str(tmp_path / "saved"), device="cpu")[1]
        assert again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(again.encode_images(pixels()), model.encode_images(pixels()))

    def test_its_name_chooses_its_template(self) -> None:
        assert conv_mode_for("MGM-7B") == "vicuna_v1"
        assert conv_mode_for("MGM-34B") == "chatml_direct"

    def test_576_tokens_at_the_released_resolution(self, load) -> None:
        model = load(vision={**CLIP, "image_size": 336}, image_size_aux=768)
        assert model.encode_images(pixels(1, 768)).shape == (1, 576, 32)
        assert visionzip(model).encode_images(pixels(1, 768)).shape == (1, 64, 32)
        assert visionzip(model, 162, 30).encode_images(pixels(1, 768)).shape == (1, 192, 32)


class TestHighDefinition:
    """MGM-7B-HD: four quarters and the whole image, of one map."""

    def test_tokens_are_those_of_a_plain_reference(self, make, load) -> None:
        folder, (image,) = make(**HD), pixels(1, 2 * AUX_SIZE)
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
        (tokens,) = load(**HD).visual_tokens(image[None])
        torch.testing.assert_close(tokens, torch.cat(expected), atol=1e-4, rtol=1e-4)

    def test_images_as_the_original_code_takes_them(self, load) -> None:
        model, (image,) = load(**HD), pixels(1, 2 * AUX_SIZE)
        large = smaller(image, 112)
        quarters = [large[:, y : y + 56, x : x + 56] for y in (0, 56) for x in (0, 56)]
        tiles = torch.stack([*quarters, smaller(large, 56)])  # the whole image last
        torch.testing.assert_close(model.encode_images(tiles[None], image[None]), model.encode_images(image[None]))

    def test_zipped_tile_by_tile(self, load) -> None:
        model = visionzip(load(**HD), 5, 2)
        assert model.encode_images(pixels(2, 2 * AUX_SIZE)).shape == (2, 5 * 7, 32)


class TestZipped:
    def test_tokens_are_those_of_a_plain_reference(self, make, load) -> None:
        """Selection on eager attention; sub-patches of the dominant patch, of the target, or averages for CLS."""
        images, weights = pixels(3), load_file(make() / "model.safetensors")
        clip = clip_of(make())
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
        model = visionzip(load(), 5, 3)
        tokens = model.encode_images(images)
        assert tokens.shape == (3, 8, 32)
        torch.testing.assert_close(tokens[:, 1:], torch.stack(expected), atol=1e-4, rtol=1e-4)

    def test_the_cls_token_reads_averages_of_the_whole_image(self, make, load) -> None:
        image, weights = pixels(), load_file(make() / "model.safetensors")
        with torch.no_grad():
            cls = clip_of(make())(smaller(image[0], 56)[None], output_hidden_states=True).hidden_states[-2][0, 0]
            hidden = convnext()(image, output_hidden_states=True).hidden_states[1:]
            cells = torch.cat([F.adaptive_avg_pool2d(stage[0], 8) for stage in hidden]).flatten(1).T
            expected = plain_projector(weights, cls + plain_mining(weights, cls, cells))
        model = visionzip(load(), 1, 0)
        torch.testing.assert_close(model.encode_images(image)[0], expected[None], atol=1e-4, rtol=1e-4)

    def test_a_kept_patch_is_what_it_is_without_visionzip(self, load) -> None:
        model = load()
        plain = model.encode_images(pixels(2))
        zipped = visionzip(model, 6, 2).encode_images(pixels(2))
        kept = model.get_vision_tower().compress(model.whole_images(pixels(2))).dominant_indices[:, 1:] - 1
        for image in range(2):
            torch.testing.assert_close(zipped[image, 1:6], plain[image, kept[image]], atol=1e-5, rtol=1e-5)

    def test_everything_kept(self, load) -> None:
        model = load()
        plain = model.encode_images(pixels())
        with pytest.warns(UserWarning, match="nothing will be compressed"):
            zipped = visionzip(model, 54, 10).encode_images(pixels())
        assert zipped.shape == (1, 1 + PATCHES, 32)  # and CLS
        torch.testing.assert_close(zipped[:, 1:], plain, atol=1e-5, rtol=1e-5)

    def test_default_budget_and_exact_undoing(self, load) -> None:
        model = load()
        before = model(input_ids=ASKED, images=pixels()).logits
        with pytest.warns(UserWarning, match="nothing will be compressed"):
            visionzip(model)
        assert (model.config.visionzip["dominant"], model.config.visionzip["contextual"]) == (54, 10)
        visionzip(model, 4, 2)
        assert model(input_ids=ASKED, images=pixels()).logits.shape[1] == before.shape[1] - PATCHES + 6
        assert torch.equal(unzip(model)(input_ids=ASKED, images=pixels()).logits, before)
        assert not hasattr(model.config, "visionzip")

    def test_a_saved_model_comes_back_zipped(self, load, tmp_path: Path) -> None:
        model = visionzip(load(), 4, 2, merge="average")
        model.save_pretrained(tmp_path / "saved")
        again = MGMLlamaForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.config.visionzip == model.config.visionzip
        assert torch.equal(again.encode_images(pixels()), model.encode_images(pixels()))


@pytest.mark.parametrize("zipped", [False, True])
class TestGeneration:
    @pytest.fixture
    def model(self, load, zipped: bool) -> Any:
        return visionzip(load(), 4, 2) if zipped else load()

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

    def test_an_image_given_twice_is_encoded_once(self, model, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        aux = model.get_vision_tower_aux()
        aux.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        image = pixels()[0]
        first, second, other = model.visual_tokens([image, image, pixels(seed=1)[0]])
        assert seen == [2]
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


class TestBadInput:
    def fails(self, folder: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            load_pretrained_model(str(folder), device="cpu")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"image_size_aux": 120}, r"image_size_aux=120 does not fit 4 x 4 patches: it must be a multiple of 16"),
            ({"image_size_aux": None}, r"needs image_size_aux \(768\)"),
            ({"mm_vision_tower_aux": None}, r"needs mm_vision_tower_aux"),
            ({"image_grid": 3}, r"image_grid=3 is not supported"),
            ({"mm_hidden_size_aux": 2880}, r"mm_hidden_size_aux=2880, but the vision tower .* has 60 channels"),
            ({"mm_vision_select_feature": "cls_patch"}, r"'cls_patch' is not supported: Mini-Gemini mines for patches"),
        ],
    )
    def test_a_config_that_does_not_fit(self, copied: Path, unread, fields: dict[str, Any], match: str) -> None:
        edit_config(copied, **fields)
        self.fails(copied, ValueError, match)

    def test_no_high_resolution_tower(self, copied: Path, unread, offline) -> None:
        edit_config(copied, mm_vision_tower_aux="model_zoo/OpenAI/openclip-convnext-large")
        self.fails(copied, OSError, "no open_clip_model.safetensors or .* mm_vision_tower_aux='model_zoo/OpenAI/openc")

    def test_a_tower_that_is_no_convnext(self, copied: Path, unread) -> None:
        torch.save({"visual.conv1.weight": torch.ones(2, 2)}, copied.parent / "aux" / "open_clip_pytorch_model.bin")
        self.fails(copied, ValueError, "is not OpenCLIP's ConvNeXt")

    def test_a_tower_that_lacks_a_weight(self, copied: Path, unread) -> None:
        weights = openclip_weights(convnext())
        del weights["visual.trunk.stages.1.blocks.0.norm.bias"]
        torch.save(weights, copied.parent / "aux" / "open_clip_pytorch_model.bin")
        self.fails(copied, ValueError, "lacks 1 weights, .* such as vision_stages.1.blocks.0.norm.bias")

    def test_a_checkpoint_that_lacks_a_projection(self, copied: Path, unread) -> None:
        edit_weights(copied, lambda weights: {k: v for k, v in weights.items() if "vlm_uni_aux" not in k})
        self.fails(copied, ValueError, "4 missing from the checkpoint, such as model.vlm_uni_aux_projector.0.bias")

    def test_a_checkpoint_with_a_part_of_the_tower(self, make, unread, tmp_path: Path) -> None:
        folder = shutil.copytree(make(aux_inside=True), tmp_path / "MGM-tiny")
        gone = "model.vision_tower_aux.vision_stem.0.weight"
        edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if key != gone})
        self.fails(folder, ValueError, f"1 missing from the checkpoint, such as {gone}")

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
    def test_images_that_do_not_fit(self, load, images: Any, aux: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            load().encode_images(images, aux)

    def test_controls_do_not_say_which_patches_they_keep(self, load) -> None:
        with pytest.raises(ValueError, match="returned 4 tokens of 16 patches: controls"):
            random_tokens(load(), 4).encode_images(pixels())


class TestCommands:
    """The same commands as for LLaVA."""

    @pytest.fixture
    def flags(self, make: Callable[..., Path]) -> list[str]:
        return ["--model-path", str(make()), "--device", "cpu"]

    @pytest.fixture
    def image_file(self, tmp_path: Path) -> str:
        picture(0).save(tmp_path / "cube.png")
        return str(tmp_path / "cube.png")

    def test_a_chat(self, load, tokenizers) -> None:
        model = visionzip(load(), 4, 2)
        session = ChatSession(model, tokenizers[False], model.get_vision_tower().image_processor, max_new_tokens=4)
        first = session.ask("What is it?", [picture(0)])
        second = session.ask("And then?")
        assert (first.visual_tokens, second.visual_tokens) == (6, 0)
        assert second.cached_tokens > first.visual_tokens

    def test_run_llava(self, flags: list[str], image_file: str) -> None:
        assert run_llava([*flags, "--image-file", image_file, "--query", "What?", "--max_new_tokens", "3"]) == 0

    def test_visualize(self, flags: list[str], image_file: str, tmp_path: Path) -> None:
        out = tmp_path / "figures"
        flags = [*flags, "--dominant", "4", "--contextual", "2", "--image", image_file, "--out", str(out)]
        assert visionzip_command(["visualize", *flags]) == 0
        assert (out / "tokens.png").is_file()

    def test_benchmark_mining(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Time and memory are of three ways that compute the same; that is what is checked here."""
        monkeypatch.setattr("llava.efficiency.mining.peak_memory", lambda module, request: 100.0)
        flags = ["--shape", "tiny", "--dominant", "20", "--contextual", "4", "--rounds", "2", "--device", "cpu"]
        assert visionzip_command(["benchmark", "mining", *flags, "--output", str(tmp_path / "mining.json")]) == 0
        rows = json.loads((tmp_path / "mining.json").read_text())["results"]
        assert [row["what"] for row in rows][:3] == ["released", "all", "kept"]
        assert all(len(row["seconds"]) == 2 for row in rows)

    @torch.no_grad()
    def test_what_the_benchmark_compares(self) -> None:
        model = build_model("tiny", "cpu", torch.float32)
        images = torch.randn(1, 3, 256, 256)
        released, ours, kept = (mining_of(way, model, images, (20, 4))() for way in ("released", "all", "kept"))
        assert released.shape == (1, 64, 64) and kept.shape == (1, 24, 64)
        torch.testing.assert_close(released, ours, atol=1e-5, rtol=1e-4)
        assert model.get_vision_tower().visionzip is None
