"""``--cache_visual_tokens``: trained from a cache, a run is the run that it would have been."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from training import TRAINER
from visual_cache import SIZES, ZIPPED, lines, stored

from checkpoints import NEXT, TOWER_PREFIX, edit_weights, picture
from llava.mm_utils import process_images
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.train.token_store import CachedImages, Index, Writer, stamp_of
from visionzip import visionzip

PLACED = {"dominant": 3, "contextual": 2, "positions": "original", "size_bias": True}  # in a checkpoint's config
ROOT = Path(__file__).parents[2]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zipped": ({}, {**ZIPPED, "dataloader_num_workers": 1}),
    "vanilla": ({}, {"bf16": True}),
    "tiles": (NEXT, {}),
    "zipped tiles": (NEXT, {**ZIPPED, "bf16": True}),
    "lora, turns apart": ({}, {**ZIPPED, "tune_mm_mlp_adapter": False, "lora_enable": True, "turns_apart": True}),
    "all": ({}, {**ZIPPED, "tune_mm_mlp_adapter": False}),
    "original positions and size bias": ({"visionzip": PLACED}, {}),
    "original positions and size bias, turns apart": ({"visionzip": PLACED}, {"turns_apart": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_same(case: str, tune, make_checkpoint, tmp_path: Path):
    """In float32 and in bfloat16, to the last bit; also when the images have not been encoded by this run."""
    overrides, flags = CASES[case]
    flags = {"model": make_checkpoint(**overrides), **flags}
    uncached = tune("uncached", **flags)
    before: dict[str, bytes] = {}
    for name in ("first", "again"):
        cached = tune(name, cache_visual_tokens=tmp_path / "cache", **flags)
        assert len(cached.losses) == 4
        assert cached.losses == uncached.losses
        assert [key for key, value in cached.weights.items() if not torch.equal(value, uncached.weights[key])] == []
        assert cached.tokens == uncached.tokens  # visual ones of an image, as the log has them
        assert stored(tmp_path / "cache") == (before or stored(tmp_path / "cache"))
        before = stored(tmp_path / "cache")
    assert len(before) == 1
    assert len(lines(tmp_path / "cache")) == len(SIZES)  # each image once, although one is in two records
    size = sum(map(len, before.values()))
    tiles = 27 if overrides == NEXT else len(SIZES)
    zipped, placed = ZIPPED.items() <= flags.items(), "visionzip" in overrides
    tokens = 5 if zipped or placed else 16
    facts = zipped + 2 * placed  # of each token: which it is, and its size
    assert size == tiles * tokens * (32 * (2 if flags.get("bf16") else 4) + 4 * facts)


def test_what_tokens_depend_on_has_a_folder_of_its_own(tune, make_checkpoint, copied, tmp_path: Path):
    """Setting, precision, tower and image preprocessing; not the language model."""
    cache, model = tmp_path / "cache", make_checkpoint()
    other = copied()
    folders: list[set[str]] = []

    def run(**flags: Any) -> int:
        tune(str(len(folders)), cache_visual_tokens=cache, max_steps=1, **{**ZIPPED, "model": model, **flags})
        folders.append({path.name for path in cache.iterdir()})
        return len(folders[-1])

    assert run() == 1
    assert run(visionzip_contextual=3) == 2
    assert run(bf16=True) == 3
    assert run(image_aspect_ratio="square") == 4
    edit_weights(other, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    assert run(model=other) == 4
    name = TOWER_PREFIX + "vision_model.encoder.layers.1.mlp.fc1.weight"
    edit_weights(other, lambda weights: {**weights, name: weights[name] + 1e-3})
    assert run(model=other) == 5
    last = TOWER_PREFIX + "vision_model.encoder.layers.3.mlp.fc1.weight"  # never run
    edit_weights(other, lambda weights: {**weights, last: weights[last] + 1})
    assert run(model=other) == 5
    assert all(name.startswith(("3+2-", "3+3-")) for name in folders[-1])
    recipe = json.loads(next(cache.glob("3+3-*/recipe.json")).read_text())
    assert recipe["visionzip"]["contextual"] == 3


def test_a_run_that_was_killed_goes_on(tune, tmp_path: Path):
    """What is whole of the cache is used: here, three images, the index cut inside the fourth line."""
    cache = tmp_path / "cache"
    whole = tune("whole", cache_visual_tokens=cache, **ZIPPED)
    index, tokens = next(cache.glob("*/index-*")), next(cache.glob("*/tokens-*"))
    text, size = index.read_text().splitlines(keepends=True), tokens.stat().st_size
    index.write_text("".join(text[:3]) + text[3][:20])
    assert tune("rest", cache_visual_tokens=cache, **ZIPPED).losses == whole.losses
    assert sorted(map(len, stored(cache).values())) == [size / 2, size]
    assert tokens.stat().st_size == size

    with tokens.open("r+b") as file:  # and if the tokens themselves were lost, though a line names them
        file.truncate(size // 3)
    assert tune("mended", cache_visual_tokens=cache, **ZIPPED).losses == whole.losses
    assert sorted(map(len, stored(cache).values())) == [size / 6, size / 3, size / 2]


def test_images_that_change_are_encoded_anew(tune, own_shapes: Path, tmp_path: Path):
    """And only these: files that were copied, moved or touched are read, but known by their content."""
    cache, images = tmp_path / "cache", own_shapes / "images"
    flags = {"folder": own_shapes, **ZIPPED}
    before = tune("before", cache_visual_tokens=cache, **flags)
    size = sum(map(len, stored(cache).values()))
    moved = shutil.copytree(own_shapes, tmp_path / "moved")
    os.utime(moved / "images/1.png")
    assert tune("moved", cache_visual_tokens=cache, **{**flags, "folder": moved}).losses == before.losses
    assert sum(map(len, stored(cache).values())) == size

    times = (images / "2.png").stat()
    picture(99, SIZES[2]).save(images / "2.png")
    os.utime(images / "2.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as tar and rsync set it
    uncached = tune("uncached", **flags)
    assert uncached.losses != before.losses
    assert tune("changed", cache_visual_tokens=cache, **flags).losses == uncached.losses
    assert sum(map(len, stored(cache).values())) == size * 7 / 6
    shutil.move(images / "3.png", images / "4.png")  # another image under a name that the cache knows
    shutil.copy(images / "0.png", images / "3.png")
    uncached = tune("uncached", **flags)
    assert tune("swapped", cache_visual_tokens=cache, **flags).losses == uncached.losses


def test_text_only(tune, own_shapes: Path, tmp_path: Path):
    path = own_shapes / "data.json"
    path.write_text(json.dumps([record for record in json.loads(path.read_text()) if "image" not in record]))
    flags = {"folder": own_shapes, **ZIPPED, "tune_mm_mlp_adapter": False}
    assert tune("cached", cache_visual_tokens=tmp_path / "cache", **flags).losses == tune("uncached", **flags).losses


def test_processes_do_not_disturb_each_other(tmp_path: Path):
    """Two that write at the same time, of which one is killed before its last line."""
    tokens = torch.arange(40.0).view(1, 5, 8)
    image = tmp_path / "image"
    image.write_text("")
    with Writer(tmp_path, {}) as one, Writer(tmp_path, {}) as other:
        for number in range(4):
            for name, writer in (("one", one), ("other", other)):
                entry = writer.add_tokens(f"{name}{number}", (1, 2), EncodedImage(tokens + number))
                if (name, number) != ("other", 3):
                    writer.add_line(f"{name}{number}", stamp_of(str(image)), entry)
    index = Index(tmp_path, torch.float32)
    assert sorted(index.by_digest) == ["one0", "one1", "one2", "one3", "other0", "other1", "other2"]
    entries = {path: entry for (path, _), entry in index.by_path.items()}
    images = CachedImages(tmp_path, torch.float32, entries, {}, EncodedImage(tokens))
    for name in entries:
        assert torch.equal(images.sample(name)[0].tokens, tokens + int(name[-1]))
    assert torch.equal(pickle.loads(pickle.dumps(images)).sample("one2")[0].tokens, tokens + 2)


def test_two_processes_under_zero3(quick_trainer: Path, shapes: Path, tune, make_checkpoint, tmp_path: Path):
    """Each encodes half of the images, from a tower of which it holds a part; the losses are those of one process."""
    pytest.importorskip("deepspeed")
    flags = {
        "model_name_or_path": make_checkpoint(),
        "output_dir": tmp_path / "two",
        "data_path": shapes / "data.json",
        "image_folder": shapes / "images",
        "cache_visual_tokens": tmp_path / "cache",
        "deepspeed": ROOT / "scripts/zero3.json",
        **{**TRAINER, **ZIPPED, "tune_mm_mlp_adapter": True, "save_strategy": "no", "max_steps": 2},
    }
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    launch = [str(quick_trainer / "bin/python"), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "llava.train.train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    files = sorted((tmp_path / "cache").glob("*/index-*"))
    assert [len(file.read_text().splitlines()) for file in files] == [3, 3]
    losses = json.loads((tmp_path / "two/run.json").read_text())["losses"]
    alone = tune("one", per_device_train_batch_size=4, max_steps=2, **ZIPPED)
    assert [entry["loss"] for entry in losses if "loss" in entry] == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("setting", [None, (3, 2)])
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_a_model_takes_encoded_images(load, merge_type: str, setting: tuple[int, int] | None):
    """In the place of pixels, for all ways to lay out tiles."""
    _, model, processor, _ = load(mm_patch_merge_type=merge_type, image_aspect_ratio="anyres")
    if setting:
        visionzip(model, *setting)
    tower = model.get_vision_tower()
    pixels = [process_images([picture(index, size)], processor, model.config)[0] for index, size in enumerate(SIZES)]
    pixels[4] = pixels[4][:1]
    encoded = [tower.encode(image) for image in pixels]
    with torch.no_grad():
        expected = model.visual_tokens(pixels, SIZES)
        for image, tokens in zip(model.visual_tokens(encoded, SIZES), expected, strict=True):
            torch.testing.assert_close(image, tokens, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="5 of 6 images are EncodedImage"):
        model.visual_tokens([*encoded[:5], pixels[5]], SIZES)
