"""Videos from files, their pixels, and a conversation about one in the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_video import write_video
from PIL import Image
from transformers import CLIPImageProcessorPil

from checkpoints import CLIP, picture
from llava.cli import main
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.languagebind import LanguageBindImageProcessor
from llava.video import load_video, process_videos, process_visuals

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of 12 frames, each brighter than the one before."""
    path = tmp_path / "clip.mp4"
    write_video(str(path), "libx264", [10 + 20 * index for index in range(12)])
    return path


def brightness(frames: list[Image.Image]) -> list[int]:
    return [round((np.asarray(frame).mean() - 10) / 20) for frame in frames]


def test_frames_are_spread_evenly(clip: Path):
    assert brightness(load_video(clip)) == [0, 1, 3, 4, 6, 7, 9, 11]
    assert brightness(load_video(clip, 12)) == list(range(12))
    assert brightness(load_video(clip, 1)) == [0]


def test_fewer_frames_than_asked_for(tmp_path: Path):
    """An error where a number was given; without one they are repeated, as Video-LLaVA does."""
    path = tmp_path / "short.gif"
    write_video(str(path), "gif", [10, 30, 50])
    assert brightness(load_video(path)) == [0, 0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"short\.gif has only 3 frames, but 4 were asked for: ask for at most 3"):
        load_video(path, 4)
    with pytest.raises(ValueError, match="frames=0: ask for at least one"):
        load_video(path, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "ICO", "AVIF"])
def test_an_image_is_no_video(tmp_path: Path, kind: str):
    path = tmp_path / "photo.mp4"
    picture(0).save(path, kind)
    with pytest.raises(ValueError, match=r"photo\.mp4 is an image, not a video: give it as an image"):
        load_video(path)


def test_an_animation_is_one(tmp_path: Path):
    path = tmp_path / "animation.gif"
    first, *more = [Image.new("RGB", (48, 32), (level,) * 3) for level in (10, 30, 50)]
    first.save(path, save_all=True, append_images=more)
    assert brightness(load_video(path, 3)) == [0, 1, 2]


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no video"):
        load_video(tmp_path / "none.mp4")
    (tmp_path / "page.mp4").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"page\.mp4 cannot be read as a video"):
        load_video(tmp_path / "page.mp4")


# Pixels


@pytest.mark.parametrize("size", [(90, 60), (60, 91), (56, 56), (40, 30)])
def test_pixels_are_the_released_ones(size: tuple[int, int]):
    """Short side to the edge with pytorchvideo's rounding, bilinear between pixels' centres; then the middle."""
    frames = [picture(seed, size) for seed in range(2)]
    (found,) = process_videos([frames], PROCESSOR)
    assert found.shape == (3, 2, 56, 56) and found.dtype == torch.float32
    width, height = size
    wide, high = (56, int(height / width * 56)) if width < height else (int(width / height * 56), 56)
    left, top = round((wide - 56) / 2), round((high - 56) / 2)
    mean, std = (np.array(values)[:, None] for values in (PROCESSOR.image_mean, PROCESSOR.image_std))
    pixels = np.asarray(frames[1], dtype=np.float64).transpose(2, 0, 1) / 255
    for row, column in ((0, 0), (10, 20), (55, 55), (30, 0)):
        y = min(max((row + top + 0.5) * height / high - 0.5, 0), height - 1)
        x = min(max((column + left + 0.5) * width / wide - 0.5, 0), width - 1)
        above, before = int(y), int(x)
        below, after = min(above + 1, height - 1), min(before + 1, width - 1)
        upper = pixels[:, above, before] * (before + 1 - x) + pixels[:, above, after] * (x - before)
        lower = pixels[:, below, before] * (before + 1 - x) + pixels[:, below, after] * (x - before)
        expected = (upper * (above + 1 - y) + lower * (y - above) - mean[:, 0]) / std[:, 0]
        np.testing.assert_allclose(found[:, 1, row, column].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(300, 300), (90, 60), (60, 64)])
def test_images_are_scaled_as_released(size: tuple[int, int]):
    """torchvision 0.15 resizes a tensor by this call; PIL, with which CLIP's own processor does it, smooths besides."""
    edges = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    still = picture(0, size)
    (found,) = LanguageBindImageProcessor(**edges).preprocess([still], return_tensors="pt")["pixel_values"]
    values = torch.from_numpy(np.array(still)).permute(2, 0, 1).float() / 255
    width, height = (int(56 * length / min(size)) for length in size)
    scaled = F.interpolate(values[None], size=(height, width), mode="bicubic", align_corners=False)[0]
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PROCESSOR.image_mean, PROCESSOR.image_std))
    torch.testing.assert_close(found, (scaled[:, top : top + 56, left : left + 56] - mean) / std, atol=1e-5, rtol=0)
    if size == (300, 300):
        (smooth,) = PROCESSOR.preprocess([still], return_tensors="pt")["pixel_values"]
        assert (found - smooth).std() > 0.5


def test_a_video_for_models_with_and_without_videos(make_video_checkpoint: Callable[..., Path], load):
    """One tensor, or its frames as images."""
    frames, still = [picture(seed) for seed in range(3)], picture(4)
    _, model, processor, _ = load_pretrained_model(str(make_video_checkpoint()), device="cpu")
    tensors, sizes = process_visuals([still, frames], processor, model)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 56, 56), (3, 3, 56, 56)] and sizes == [(90, 60)] * 2
    _, model, processor, _ = load()
    tensors, sizes = process_visuals([still, frames], processor, model)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 56, 56)] * 4 and sizes == [(90, 60)] * 4


# Chat


@pytest.fixture
def ask(make_video_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """``visionzip chat`` with the tiny Video-LLaVA, some lines of input and more flags."""
    folder = make_video_checkpoint(vision={**CLIP, "image_size": 112})

    def run(lines: list[str], *flags: str, model: Path = folder) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, ""])))
        command = ["chat", "--model-path", str(model), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "3"]
        return main([*command, *flags])

    return run


def test_chat_about_a_video(ask: Callable[..., int], clip: Path, capsys):
    assert ask(["What happens?", f"/video {clip}", "And here?"], "--video", str(clip), "--frames", "12") == 0
    printed = capsys.readouterr().out
    assert "VideoLlavaLlamaForCausalLM" in printed and "VisionZip 15 + 2" in printed and "llava_v1" in printed
    assert printed.count("(204 visual)") == 2


def test_chat_says_what_is_wrong(ask: Callable[..., int], clip: Path, tmp_path: Path, capsys):
    """With a flag before anything is loaded; in the conversation it goes on."""
    assert ask(["Well?"], "--video", str(clip), "--frames", "13") == 2
    assert "has only 12 frames, but 13 were asked for" in capsys.readouterr().err
    picture(0).save(tmp_path / "photo.png")
    assert ask([f"/video {tmp_path}/photo.png", f"/image {clip}", f"/video {clip}", "And now?"]) == 0
    printed = capsys.readouterr().out
    assert "photo.png is an image, not a video" in printed and "clip.mp4 is not a readable image" in printed
    assert "(136 visual)" in printed


def test_chat_with_a_model_of_images(ask: Callable[..., int], make_checkpoint, clip: Path, capsys):
    """Each frame is an image to it."""
    assert ask(["Well?"], "--video", str(clip), "--vanilla", model=make_checkpoint()) == 0
    assert "(128 visual)" in capsys.readouterr().out
