"""Transformers' OneVision, LLaVA-NeXT-Video and Video-LLaVA behind this package's commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_video_models
import pytest
import torch
from data_video import DATA as VIDEO_DATA
from data_video import video_of, write_folder
from PIL import Image

from checkpoints import picture
from eval.__main__ import main as eval_command
from llava.cli import main
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from visionzip import visionzip

FAMILIES = ["onevision", "next_video", "video_llava"]
# That need no padding where the stock processor crops.
SIZES = {"onevision": (90, 60), "next_video": (30, 100), "video_llava": (56, 56)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, as transformers saves it."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = hf_video_models.save(name, tmp_path_factory.mktemp(name) / "hf")
        return folders[name]

    return make


@pytest.fixture
def family(request: pytest.FixtureRequest, saved) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, model and image processor of a family, and the stock processor."""
    loaded = load_pretrained_model(str(saved(request.param)), device="cpu")[:3]
    return *loaded, hf_video_models.processor_for(request.param)


@pytest.mark.parametrize(("family", "size"), SIZES.items(), indirect=["family"], ids=SIZES)
@pytest.mark.parametrize("zipped", [False, True])
def test_images(family, size: tuple[int, int], zipped: bool):
    """The answer is that of the stock processor and model, also beside another image."""
    tokenizer, model, processor, stock = family
    if zipped:
        visionzip(model, dominant=5, contextual=2)
    image, question = picture(0, size), "<image>What is it?"
    inputs = stock(images=[image], text=question, return_tensors="pt")
    inputs["pixel_values"] = inputs.pop("pixel_values_images", inputs.get("pixel_values"))
    expected = model.native.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    ids = tokenizer_image_token(question, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image, picture(1, (100, 100))], processor, model.config)  # more tiles
    found = model.generate(ids, images=[pixels[0]], image_sizes=[size], do_sample=False, max_new_tokens=6)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["video_llava"], indirect=True)
def test_videos_of_video_llava(family):
    """A video (3, frames, h, w) has an ``<image>`` for each frame, and the answer is that of the stock processor."""
    tokenizer, model, processor, stock = family
    assert model.takes_videos
    inputs = stock(videos=[hf_video_models.video(0)], text="<video>What is it?", return_tensors="pt")
    video = inputs["pixel_values_videos"][0].transpose(0, 1)
    ids = tokenizer_image_token("<image>" * 3 + "What is it?", tokenizer, return_tensors="pt")[None]
    for tokens in (17, 7):  # CLS stays in videos
        expected = model.native.generate(**inputs, do_sample=False, max_new_tokens=6)
        found = model.generate(ids, images=[video], do_sample=False, max_new_tokens=6)
        assert found.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
        image = process_images([picture(0)], processor, model.config)[0]
        mixed = model.visual_tokens([image, video, image])
        assert [len(each) for each in mixed] == [tokens - (tokens == 17), *[tokens] * 3, tokens - (tokens == 17)]
        visionzip(model, dominant=5, contextual=2)
    with pytest.raises(ValueError, match=r"have 1 <image> .* but 3 images were given"):
        model.generate(ids[:, ids[0].tolist().index(-200) + 2 :], images=[video])
    with pytest.raises(ValueError, match=r"images\[0\] has shape \(3, 3, 40, 56\): a video is \(3, T, 56, 56\)"):
        model.visual_tokens([video[:, :, :40]])
    with pytest.raises(ValueError, match=r"images\[2\] has 1 pixels that are NaN"):
        model.visual_tokens(
            [image, video, image.masked_fill(torch.arange(image.numel()).view_as(image) == 7, torch.nan)]
        )


@pytest.mark.parametrize("family", ["onevision", "next_video"], indirect=True)
def test_videos_of_families_with_tiles(family):
    """A video has a batch axis, as tiles have four dimensions too; the answer is that of the stock processor."""
    tokenizer, model, processor, stock = family
    frames, image = [Image.fromarray(frame) for frame in hf_video_models.video(0)], picture(1, (90, 60))
    inputs = stock(videos=[hf_video_models.video(0)], text="<video>What is it?", return_tensors="pt")
    pixels = model.video_pixels(frames, processor)
    assert pixels.shape == (1, 3, 3, 56, 56) and model.takes_videos
    if "onevision" in type(model.native).__name__.lower():  # squeezes; the tests' stand-in for its processor crops
        assert not torch.allclose(pixels, inputs["pixel_values_videos"], atol=0.1)
        inputs["pixel_values_videos"] = pixels
    else:
        torch.testing.assert_close(pixels, inputs["pixel_values_videos"])
    tiles = process_images([image], processor, model.config)[0]
    ids = tokenizer_image_token("<image>" * 3 + "What is it?", tokenizer, return_tensors="pt")[None]
    extra = int("onevision" in type(model.native).__name__.lower())
    for tokens in (4, 3):
        expected = model.native.generate(**inputs, do_sample=False, max_new_tokens=6)
        found = model.generate(ids, images=[pixels], do_sample=False, max_new_tokens=6)
        assert found.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
        mixed = model.visual_tokens([tiles, pixels, tiles], [image.size, (90, 60), image.size])
        assert [len(each) for each in mixed[1:-1]] == [tokens, tokens, tokens + extra]
        torch.testing.assert_close(mixed[0], mixed[-1])
        visionzip(model, dominant=2, contextual=1)
    assert model.frame_length == 4
    with pytest.raises(ValueError, match="the video has no frames"):
        model.video_pixels([], processor)
    with pytest.raises(TypeError, match=r"the video is a Tensor, not the frames of a video: .*load_video"):
        model.video_pixels(pixels, processor)
    for wrong in (torch.cat([pixels, pixels]), pixels[..., :40], pixels[:, :0], pixels[:0]):
        with pytest.raises(ValueError, match=r"images\[1\] has shape .*: a video is \(1, T, 3, 56, 56\), as"):
            model.visual_tokens([pixels, wrong])


@pytest.mark.parametrize("name", FAMILIES)
def test_visualize_and_benchmark(name: str, saved, tmp_path: Path):
    model, output = ["--model-path", str(saved(name)), "--device", "cpu"], tmp_path / "times.json"
    picture(0).save(tmp_path / "cube.png")
    files = ["--image", str(tmp_path / "cube.png"), "--output", str(tmp_path / "figures")]
    assert main(["visualize", *model, "--dominant", "5", "--contextual", "2", *files]) == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == 5
    tiles = 1 if name == "video_llava" else 5
    request = [*model, "--tokens", str(7 * tiles), "--rounds", "1", "--dtype", "float32", "--output", str(output)]
    assert main(["benchmark", "prefill", *request]) == 0
    vanilla, zipped, *others = json.loads(output.read_text())["results"]
    assert [row["method"] for row in others] == ["fastv", "sparsevlm"]
    newlines = {"onevision": 8, "next_video": 8, "video_llava": 0}[name]  # one for each row of the grid
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (16 * tiles + newlines, 7 * tiles)


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_on_images(name: str, saved, scenes_data: Path, tmp_path: Path):
    """Batches answer as single questions do, a run goes on, and each image has the tokens that were asked for."""
    places = ["--model-path", str(saved(name)), "--data", str(scenes_data), "--device", "cpu"]
    asked = ["run", "scenes", *places, "--conv-mode", "vicuna_v1", "--method", "vanilla", "visionzip", "--tokens", "6"]
    found = []
    for size, limits in (("1", ["6"]), ("4", ["4", "6"])):
        out = tmp_path / size
        for limit in limits:
            assert eval_command([*asked, "--batch-size", size, "--limit", limit, "--output", str(out)]) == 0
        files = sorted((out / "answers").glob("*.jsonl"))
        found.append({file.name: [json.loads(line)["text"] for line in file.open()] for file in files})
    assert found[0] == found[1] and all(len(texts) == 6 for texts in found[0].values())
    rows = json.loads((tmp_path / "4/results.json").read_text())["rows"]
    assert rows[1]["visual_tokens"] == (6 if name == "video_llava" else 30)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("brief_msvd")
def test_eval_on_videos(name: str, saved, tmp_path: Path):
    """All tokens of a frame are what the family makes of it: all patches, or fewer that it pools."""
    folder = write_folder(tmp_path, "msvd")
    places = ["--model-path", str(saved(name)), "--data", str(folder), "--output", str(tmp_path / "out")]
    asked = ["--method", "vanilla", "visionzip", "--tokens", "3", "--judge", "exact", "--device", "cpu"]
    assert eval_command(["run", "msvd", *places, *asked, "--conv-mode", "vicuna_v1", "--limit", "2"]) == 0
    vanilla, zipped = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    frame, newline = {"onevision": (4, 1), "next_video": (4, 0), "video_llava": (17, 0)}[name]
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (8 * frame + newline, 8 * 3 + newline)


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_about_a_video(name: str, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    video = tmp_path / "clip.avi"
    video.write_bytes(video_of(VIDEO_DATA["msvd"], "bQJQGoJF7_k_162_169"))
    lines = iter(["What is shown?", "And then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    budget = ["--dominant", "2", "--contextual", "1", "--temperature", "0", "--max-new-tokens", "3"]
    model = ["--model-path", str(saved(name)), "--device", "cpu"]
    assert main(["chat", *model, *budget, "--video", str(video)]) == 0
    printed = capsys.readouterr().out
    assert f"({8 * 3 + (name == 'onevision')} visual)" in printed and "(0 visual)" in printed
