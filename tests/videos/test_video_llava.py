"""Video-LLaVA: images and videos in prompts, and VisionZip per frame."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_videos import EDGE, image, load, prompt, video
from torch import Tensor

from checkpoints import CLIP, edit_config, edit_weights, picture
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.train import train
from llava.video import process_videos
from slow_languagebind import encode, project, tower_weights
from visionzip import compress_tokens, unzip, visionzip

IMG = IMAGE_TOKEN_INDEX
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


# What the language model sees


@pytest.mark.parametrize("frames", [8, 3, 19], ids=["a window", "less", "more"])
@torch.no_grad()
def test_videos_equal_the_reference(model: Any, folder: Path, frames: int):
    """Attention over time reaches the other frames of a window of 8, the last of which may be shorter."""
    pixels = video(frames=frames)
    hidden, _, _ = encode(tower_weights(folder, "video"), pixels.transpose(0, 1), window=8)
    torch.testing.assert_close(model.get_video_tower()(pixels[None])[0], hidden, rtol=1e-4, atol=1e-4)
    expected = project(load_file(folder / "model.safetensors"), hidden)  # the CLS token comes first
    torch.testing.assert_close(torch.stack(model.visual_tokens([pixels])), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.encode_videos(pixels[None])[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_equal_the_reference(model: Any, folder: Path):
    hidden, _, _ = encode(tower_weights(folder, "image"), image()[None], window=None)
    expected = project(load_file(folder / "model.safetensors"), hidden[0, 1:])
    torch.testing.assert_close(model.visual_tokens([image()])[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.encode_images(image()[None])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_agree(folder: Path, kernel: str):
    model = load_pretrained_model(str(folder), device="cpu", attn_implementation=kernel)[1]
    assert model.get_video_tower().config._attn_implementation == kernel
    expected = load(folder).visual_tokens([video()])
    torch.testing.assert_close(model.visual_tokens([video()]), expected, rtol=1e-4, atol=1e-4)


def test_a_tower_without_attention_over_time(folder: Path, tmp_path: Path):
    """``add_time_attn`` false: each frame is an image to it, and its checkpoint has no such weights."""
    plain = shutil.copytree(folder, tmp_path / "plain")
    tower = tmp_path / "tower"
    shutil.copytree(folder.with_name(f"{folder.name}-video"), tower)
    config = json.loads((tower / "config.json").read_text())
    config["vision_config"] |= {"add_time_attn": False}
    (tower / "config.json").write_text(json.dumps(config))
    edit_config(plain, mm_video_tower=str(tower))
    edit_weights(plain, lambda weights: {key: value for key, value in weights.items() if "temporal" not in key})
    whole = load(plain).visual_tokens([video()])
    alone = [load(plain).visual_tokens([video()[:, index : index + 1]])[0] for index in range(8)]
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)


def test_counts_of_the_released_shape(make_video_checkpoint: Callable[..., Path]):
    """224 pixels: 256 of an image; 8 x 257 of a video, or 8 x 256 as the papers count; 136 of 8 frames, 2040 of 120."""
    folder = make_video_checkpoint(vision={**CLIP, "image_size": 224})

    def count(model: Any, pixels: Tensor) -> int:
        return sum(map(len, model.visual_tokens([pixels])))

    model = load(folder)
    still, eight, many = torch.randn(3, 224, 224), video(edge=224), video(frames=120, edge=224)
    assert (count(model, still), count(model, eight)) == (256, 2056)
    model.get_video_tower().select_feature = "patch"  # mm_video_select_feature in the config
    assert count(model, eight) == 2048
    visionzip(model)
    assert (count(model, still), count(model, eight), count(model, many)) == (17, 136, 2040)


def test_the_cls_token_is_a_setting(folder: Path, tmp_path: Path):
    other = shutil.copytree(folder, tmp_path / "other")
    edit_config(other, mm_video_select_feature="patch")
    for with_cls, without in zip(
        load(folder).visual_tokens([video()]), load(other).visual_tokens([video()]), strict=True
    ):
        assert torch.equal(with_cls[1:], without)


# VisionZip


@torch.no_grad()
def test_the_selection_is_that_of_eager_attention(model: Any, folder: Path):
    """Per frame, by the attention over space of layer -2; both towers get the budget."""
    weights = load_file(folder / "model.safetensors")
    visionzip(model, dominant=10, contextual=3)
    for kind, pixels, window in (("video", video(frames=12), 8), ("image", image()[:, None], None)):
        hidden, matrix, keys = encode(tower_weights(folder, kind), pixels.transpose(0, 1), window)
        expected = compress_tokens(hidden, matrix[:, :, 0, 1:].sum(1), keys.mean(2), 10, 3)
        tower = model.get_video_tower() if kind == "video" else model.get_image_tower()
        compressed = tower.compress(pixels[None] if kind == "video" else pixels.transpose(0, 1))
        for name in ("dominant_indices", "target_indices", "assignment"):
            assert torch.equal(getattr(compressed, name), getattr(expected, name))
        seen = torch.stack(model.visual_tokens([pixels if kind == "video" else pixels[:, 0]]))
        torch.testing.assert_close(seen, project(weights, expected.tokens), rtol=1e-4, atol=1e-4)


def test_default_budget(model: Any, load: Any):
    """17 = 15 + 2 per frame; LLaVA-1.5 keeps its own default, and so does a number that is given."""
    assert visionzip(model).config.visionzip == {"dominant": 15, "contextual": 2, "layer": -2, "merge": "released"}
    assert visionzip(model, contextual=4).config.visionzip["dominant"] == 15
    visionzip(model, dominant=20, contextual=5)
    assert visionzip(model).config.visionzip["dominant"] == 20  # the stored one
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        assert visionzip(load()[1]).config.visionzip["dominant"] == 54


def test_unzip_is_exact(model: Any):
    def outputs() -> list[Tensor]:
        ids, inputs = prompt(1, -1, 7, -8, 9), [image(), video()]
        return [model(ids, images=inputs).logits, model.generate(ids, images=inputs, **GREEDY)]

    before, config = outputs(), copy.deepcopy(vars(model.config))
    visionzip(model)
    assert outputs()[0].shape[1] == 3 + 9 * 17
    unzip(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), before, strict=True))
    assert vars(model.config) == config


# Prompts


@pytest.fixture(params=[False, True], ids=["vanilla", "zipped"])
def either(request: pytest.FixtureRequest, model: Any) -> Any:
    return visionzip(model, dominant=5, contextual=2) if request.param else model


def test_a_batch_answers_as_its_prompts_would_alone(either: Any):
    """Images and videos of different lengths, mixed in a prompt and in the batch; text only."""
    first, second = video(0), video(1, frames=12)
    asked = [
        (prompt(1, -8, 13, 40), [first]),
        (prompt(1, 50, -1, 51, -12, 52, -1), [image(2), second, image(3)]),
        (prompt(1, 60, 61), []),
        (prompt(1, -1, 70), [image(4)]),
    ]
    alone = [either.generate(ids, images=images or None, **GREEDY) for ids, images in asked]
    length = max(ids.shape[1] for ids, _ in asked)
    padded = torch.cat([F.pad(ids, (length - ids.shape[1], 0)) for ids, _ in asked])
    mask = torch.cat([F.pad(torch.ones_like(ids), (length - ids.shape[1], 0)) for ids, _ in asked])
    images = [pixels for _, own in asked for pixels in own]
    assert torch.equal(either.generate(padded, images=images, attention_mask=mask, **GREEDY), torch.cat(alone))


def test_generation_with_and_without_a_cache(either: Any):
    ids, images = prompt(1, 20, -8, 30, -1, 40), [video(), image()]
    with_cache = either.generate(ids, images=images, use_cache=True, **GREEDY)
    assert torch.equal(either.generate(ids, images=images, use_cache=False, **GREEDY), with_cache)


def test_stacked_videos_and_images(either: Any):
    """As Video-LLaVA's processors return them."""
    videos = torch.stack([video(0), video(1)])
    expected = either.generate(prompt(1, -16, 7), images=list(videos), **GREEDY)
    assert torch.equal(either.generate(prompt(1, -16, 7), images=videos, **GREEDY), expected)
    assert len(either.visual_tokens(torch.stack([image(0), image(1)]))) == 2


def test_questions_about_one_video_encode_it_once(either: Any):
    encoded: list[int] = []
    embeddings = either.get_video_tower().encoder.embeddings
    embeddings.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    one, other = video(0), video(1)
    tokens = either.visual_tokens([one, other, one])
    assert encoded == [16]
    torch.testing.assert_close(tokens[:8], tokens[16:])
    torch.testing.assert_close(tokens[8:16], either.visual_tokens([other]), rtol=1e-4, atol=1e-4)


def test_a_training_step(either: Any):
    """A video's positions are ignored; the projector learns, the towers do not."""
    ids = prompt(1, 40, -8, 41, 42)
    labels = ids.masked_fill(ids == IMG, IGNORE_INDEX)
    out = either(ids, labels=labels, images=[video()])
    visual = out.logits.shape[1] - 4
    predicted = out.logits[0, [0, 1 + visual, 2 + visual]]
    torch.testing.assert_close(out.loss, F.cross_entropy(predicted, torch.tensor([40, 41, 42])))
    out.loss.backward()
    assert either.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for tower in either.towers().values() for parameter in tower.parameters())


def test_a_conversation_about_a_video(folder: Path):
    """A later turn reuses the video's part of the cache, and answers as recomputing everything does."""
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    visionzip(model)
    frames = [picture(seed) for seed in range(8)]
    session = ChatSession(model, tokenizer, processor, "llava_v1", **GREEDY)
    first = session.ask("What happens?", [frames, picture(9)])
    assert first.visual_tokens == 9 * 17
    prompts = session.conversation.get_prompt()
    assert "USER: " + "<image>" * 9 + "\nWhat happens?" in prompts
    second = session.ask("And then?")
    assert second.visual_tokens == 0 and second.cached_tokens > 9 * 17
    fresh = ChatSession(model, tokenizer, processor, "llava_v1", **GREEDY)
    fresh.conversation, fresh._visual = session.conversation.copy(), list(session._visual)
    fresh.conversation.messages = fresh.conversation.messages[:2]
    assert fresh.ask("And then?").text == second.text


# What is refused


ONE_VIDEO = prompt(1, -8, 7)
REFUSED = {
    "one <image> for a video": (prompt(1, -1, 7), lambda: [video()], "1 <image>.*8 images.*one for each of its frames"),
    "a video without a batch axis": (ONE_VIDEO, video, rf"images\[0\] has shape \(8, {EDGE}, {EDGE}\).*\[None\]"),
    "frames first": (ONE_VIDEO, lambda: [video().transpose(0, 1)], rf"images\[0\] has shape \(8, 3, .*\(3, T, {EDGE}"),
    "another size": (ONE_VIDEO, lambda: [video(edge=56)], r"images\[0\] has shape \(3, 8, 56, 56\)"),
    "no frames": (ONE_VIDEO, lambda: [video(frames=0)], r"images\[0\] has shape \(3, 0,"),
    "NaN": (prompt(1, -8, -8), lambda: [video(), video() * torch.nan], r"images\[1\] has .* pixels that are NaN"),
    "raw pixels": (ONE_VIDEO, lambda: [video().to(torch.uint8)], "images are torch.uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model: Any, case: str):
    ids, images, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.generate(ids, images=images(), **GREEDY)


def test_wrong_kinds_are_refused(model: Any):
    with pytest.raises(TypeError, match=r"images\[0\] is a list, not a tensor.*process_videos"):
        model.generate(ONE_VIDEO, images=[[picture(0)]], **GREEDY)
    with pytest.raises(ValueError, match=r"the video tower takes videos.*give an image to the image tower"):
        model.get_video_tower()(image()[None])
    with pytest.raises(TypeError, match=r"videos\[0\] is a Image, not the frames of a video"):
        process_videos([picture(0)], model.get_image_tower().image_processor)
    with pytest.raises(ValueError, match=r"videos\[0\] has no frames"):
        process_videos([[]], model.get_image_tower().image_processor)


@pytest.mark.parametrize("vision_tower", [None, "some/tower"])
def test_training_is_refused(folder: Path, tmp_path: Path, vision_tower: str | None):
    """Before anything is loaded."""
    arguments = ModelArguments(str(folder), vision_tower, tune_mm_mlp_adapter=True)
    training = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    picture(0).save(tmp_path / "none.png")
    (tmp_path / "none.json").write_text(json.dumps([{"id": "a", "image": "none.png", "conversations": turns}]))
    with pytest.raises(ValueError, match=r"Video-LLaVA-tiny is a Video-LLaVA, which is not trained here"):
        train(arguments, DataArguments(data_path=str(tmp_path / "none.json"), image_folder=str(tmp_path)), training)
