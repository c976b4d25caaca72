"""``--cache_visual_tokens`` where something is wrong: images, the disk, the cache itself, or what is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from visual_cache import SIZES, ZIPPED, lines

from checkpoints import LANGUAGE_MODEL, write_tokenizer
from llava.train.cache import cache_visual_tokens
from visionzip import visionzip


def test_a_damaged_cache_is_said_and_mended(tune, tmp_path: Path, capsys):
    cache = tmp_path / "cache"
    whole = tune("whole", cache_visual_tokens=cache, **ZIPPED)
    tokens = next(cache.glob("*/tokens-*"))
    data = bytearray(tokens.read_bytes())
    data[20::40] = bytes(byte ^ 1 for byte in data[20::40])  # a bit, here and there
    tokens.write_bytes(data)
    for skip in (False, True):
        assert tune("damaged", cache_visual_tokens=cache, skip_bad_samples=skip, **ZIPPED) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"are damaged: delete {tokens} and start again" in message
    tokens.unlink()
    assert tune("mended", cache_visual_tokens=cache, **ZIPPED).losses == whole.losses


def test_images_that_cannot_be_read(tune, own_shapes: Path, tmp_path: Path, capsys):
    """An error that names the record, when the others are encoded; or a skip, as without a cache."""
    cache, flags = tmp_path / "cache", {"folder": own_shapes, **ZIPPED}
    for index in (1, 4):
        (own_shapes / f"images/{index}.png").write_bytes(b"no image")
    assert tune("refused", cache_visual_tokens=cache, **flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "record 'seen-1' cannot be used" in message
    assert "1.png is not a readable image" in message
    assert "(1 more images cannot be read)" in message
    assert len(lines(cache)) == len(SIZES) - 2
    flags |= {"skip_bad_samples": True, "max_steps": 5}  # the whole epoch
    runs = [tune("uncached", **flags), tune("cached", cache_visual_tokens=cache, **flags)]
    assert runs[0].losses == runs[1].losses
    left_out = [sorted(bad["id"] for bad in run.record["left_out"]) for run in runs]
    assert left_out == [["seen-1", "seen-4"]] * 2


def test_images_that_are_too_large(tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Pillow has an error of its own for them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # more than twice that is refused
    assert tune("refused", cache_visual_tokens=tmp_path / "cache", **ZIPPED) == 2
    message = capsys.readouterr().err
    assert "record 'seen-5' cannot be used: " in message and "5.png is too large to be read (Image size" in message
    run = tune("skipped", cache_visual_tokens=tmp_path / "cache", skip_bad_samples=True, max_steps=5, **ZIPPED)
    assert [bad["id"] for bad in run.record["left_out"]] == ["seen-5"]


def test_no_room(tune, full_disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """It is said before the work if that can be known, else when the disk is full."""
    file = tmp_path / "file"
    file.write_text("")
    assert tune("run", cache_visual_tokens=file / "cache", **ZIPPED) == 2
    assert f"{file} is a file, not a folder" in capsys.readouterr().err
    usage = shutil.disk_usage
    here = tmp_path / "cache"
    here.mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=3000) if path == here else usage(path)
    )
    assert tune("run", cache_visual_tokens=here, **ZIPPED) == 2
    assert "has 0.0 GB free, but the tokens of 6 images take at least 0.0 GB" in capsys.readouterr().err
    monkeypatch.undo()
    with full_disk(3000):  # four images
        assert tune("run", cache_visual_tokens=here, **ZIPPED) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write " in message and "tokens-" in message and "The images that are encoded stay so" in message
    assert tune("run", cache_visual_tokens=here, **ZIPPED).losses == tune("uncached", **ZIPPED).losses


def test_a_language_model_has_no_visual_tokens(tune, tmp_path: Path, capsys):
    base = tmp_path / "base"
    own = {key: value for key, value in LANGUAGE_MODEL.items() if not key.startswith(("mm_", "image_"))}
    LlamaForCausalLM(LlamaConfig(**own)).save_pretrained(base)
    write_tokenizer(base)
    assert tune("run", model=base, tune_mm_mlp_adapter=False, cache_visual_tokens=tmp_path / "cache") == 2
    assert "cache_visual_tokens needs a vision tower" in capsys.readouterr().err


def test_a_choice_behind_the_projector_is_not_kept(load, tmp_path: Path):
    """The projector may learn, and the choice with it."""
    model = visionzip(load()[1], keep=4, method="norm")
    with pytest.raises(ValueError, match=r"method='norm' chooses by what is behind the projector.*leave the cache out"):
        cache_visual_tokens(str(tmp_path), None, model, None)
