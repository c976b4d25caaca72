"""What ``visionzip convert`` refuses, before a weight is read, and what it leaves when it is stopped: nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

import llava.commands.convert
from checkpoints import NEXT, SIGLIP, edit_config, edit_weights
from layouts import convert, without, write_native

REFUSED = {
    "linear": ({"mm_projector_type": "linear"}, "its projector is 'linear'"),
    "mlp3x": ({"mm_projector_type": "mlp3x_gelu"}, "its projector is 'mlp3x_gelu'"),
    "start_end": ({"mm_use_im_start_end": True}, "puts start and end tokens around images"),
    "spatial": ({"mm_patch_merge_type": "spatial", "image_aspect_ratio": "anyres"}, "joins tiles by"),
    "flat_tiles": ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type='flat' with image_aspect_ratio='anyres'"),
    "onevision": ({**NEXT, "image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio='anyres_max_9'"),
    "next_cls": ({**NEXT, "mm_vision_select_feature": "cls_patch"}, "its tiles keep the CLS token"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantised"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_no_counterpart_in_transformers(changes: dict[str, Any], reason: str, copied, tmp_path: Path, capsys):
    source = copied()
    edit_config(source, **changes)
    assert convert(source, tmp_path / "native", "transformers") == 2
    error = capsys.readouterr().err
    assert f"{source} has no counterpart in transformers: " in error and reason in error
    assert not list(tmp_path.glob("native*"))


NATIVE_REFUSED = {
    "projector": ({"projector_hidden_act": "relu"}, "its projector has activation 'relu'"),
    "bias": ({"multimodal_projector_bias": False}, "bias=False"),
    "layers": ({"vision_feature_layer": [-2, -5]}, "reads several layers"),
    "text": ({"text_config": {"model_type": "gemma"}}, "its language model is 'gemma'"),
    "vision": ({"vision_config": {"model_type": "pixtral"}}, "its vision tower is 'pixtral'"),
    "siglip": ({"vision_config": SIGLIP}, "leaves out the first patch"),
    "video": (
        {"architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video"},
        "is a LlavaNextVideoForConditionalGeneration, which has no counterpart",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), NATIVE_REFUSED.values(), ids=NATIVE_REFUSED)
def test_no_counterpart_in_llavas_layout(changes: dict[str, Any], reason: str, tmp_path: Path, capsys):
    write_native(tmp_path / "native")
    edit_config(tmp_path / "native", **changes)
    assert convert(tmp_path / "native", tmp_path / "llava", "original") == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("llava*"))


@pytest.mark.parametrize("own", ["MGMLlamaForCausalLM", "VideoLlavaLlamaForCausalLM"])
def test_families_that_are_more_than_llava(own: str, copied, tmp_path: Path, capsys):
    """What they have besides LLaVA's weights would be lost."""
    source = copied()
    edit_config(source, architectures=[own])
    assert convert(source, tmp_path / "native", "transformers") == 2
    assert f"is a {own}, which has no counterpart in transformers: convertible are Ll" in capsys.readouterr().err


def test_weights_are_fetched_last(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """From the hub, whose checkpoints have 14 GB: what is refused is refused by the small files."""
    source, asked = copied(), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(source)

    monkeypatch.setattr(llava.commands.convert, "snapshot_download", fetch)
    for to, changes in (("original", {}), ("transformers", {"mm_projector_type": "linear"})):
        edit_config(source, **changes)
        assert convert("owner/name", tmp_path / "out", to) == 2
    assert len(asked) == 2 and not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    edit_config(source, mm_projector_type="mlp2x_gelu")
    assert convert("owner/name", tmp_path / "out", "transformers") == 0
    assert len(asked) == 4 and "*.safetensors" in asked[-1]


def test_tokens_that_would_be_lost(tmp_path: Path, capsys):
    write_native(tmp_path / "native")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    tokenizer.add_tokens(["<box>"])
    tokenizer.save_pretrained(tmp_path / "native")
    assert convert(tmp_path / "native", tmp_path / "llava", "original") == 2
    assert "its vocabulary has ['<box>'] after <image> (480)" in capsys.readouterr().err


def test_other_bad_input(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, offline):
    """One line, before a weight is read; nothing is left."""
    source = copied()
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "notes").write_text("")
    convert(source, tmp_path / "native", "transformers")
    out = tmp_path / "out"
    for arguments, message in (
        ((source, full, "transformers"), f"DST {full} exists: choose a new folder"),
        ((empty, out, "transformers"), f"{empty} has no config.json"),
        (("nobody/nothing", out, "original"), "SRC nobody/nothing is neither a folder nor to be had from the hub"),
        ((tmp_path / "native", out, "transformers"), "in that layout already: did you mean --to original?"),
        ((source, out, "original"), "is a LlavaLlamaForCausalLM, which has no counterpart in LLaVA's layout"),
    ):
        assert convert(*arguments) == 2
        assert message in capsys.readouterr().err
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=9))
    assert convert(source, out, "transformers") == 2
    assert f"DST {out} needs 0.0 GB but {tmp_path} has 0.0 GB free" in capsys.readouterr().err
    monkeypatch.undo()
    for folder, lost in ((source, "model.norm.weight"), (tmp_path / "native", "multi_modal_projector.linear_1.bias")):
        edit_weights(folder, without(lost))
        assert convert(folder, out, "transformers" if folder == source else "original") == 2
        assert "1 missing from the checkpoint" in capsys.readouterr().err
    (source / "model.safetensors").unlink()
    assert convert(source, out, "transformers") == 2
    assert "is no full checkpoint: make one" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_run_that_is_stopped_leaves_nothing(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after the first shard; then one that was killed before it could clean up is done anew."""
    source = copied()
    save = llava.commands.convert.save_file
    written: list[Path] = []

    def interrupted(tensors: Any, path: Path, **options: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, **options)

    monkeypatch.setattr(llava.commands.convert, "_SHARD_BYTES", 100_000)
    monkeypatch.setattr(llava.commands.convert, "save_file", interrupted)
    assert convert(source, tmp_path / "native", "transformers") == 130
    assert written[0].parent.name == "native.partial"
    assert not list(tmp_path.glob("native*"))
    monkeypatch.undo()
    (tmp_path / "native.partial").mkdir()
    (tmp_path / "native.partial/model-00001-of-00009.safetensors").write_text("half of it")
    assert convert(source, tmp_path / "native", "transformers") == 0
    assert [file.name for file in (tmp_path / "native").glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_link_to_another_disk(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """It stays one; of a mounted folder, which cannot be replaced, that is said before any work."""
    source, disk = copied(), tmp_path / "disk"
    disk.mkdir()
    for name, target in (("empty", disk / "empty"), ("dangling", disk / "new")):
        (tmp_path / name).symlink_to(target)
    (disk / "empty").mkdir()
    for name in ("empty", "dangling"):
        assert convert(source, tmp_path / name, "transformers") == 0
        assert (tmp_path / name).is_symlink() and (tmp_path / name / "model.safetensors").is_file()
    assert sorted(path.name for path in disk.iterdir()) == ["empty", "new"]
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    assert convert(source, tmp_path / "mounted", "transformers") == 2
    assert "mounted is a mount point: choose a new folder in it" in capsys.readouterr().err
