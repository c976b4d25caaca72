"""``--cache_visual_tokens``: each image's visual tokens, computed once, and training without the vision tower.

Tower and VisionZip are frozen, so that an image's tokens in front of the projector are the same in every epoch and
every run. They are kept in ``DIR/<setting>-<key>/``: the key is a hash of all that they depend on but the image, the
tower's weights, VisionZip's setting, the image preprocessing and the precision that the run computes in. Another tower,
setting or precision thus has a folder of its own. Inside it an image is known by its content.

Tokens are stored in the type that the projector reads them in: bfloat16 (or float16) where the run computes in that, so
that nothing is lost (under autocast, its first layer rounds what it gets to that type itself), else the tower's own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from llava.commands.screen import progress
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model.checkpoints.loading import gathered
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.train.data import UNUSABLE, InstructionData
from llava.train.token_store import CachedImages, Index, Stamp, Writer, stamp_of
from visionzip.methods import has_size_bias, method_of

if TYPE_CHECKING:
    from transformers import TrainingArguments  # loads peft and bitsandbytes, which `visionzip --help` need not

_FORMAT = 3  # of what is computed and how it is stored; a change makes all older caches unknown
_BATCH = 32  # images that the tower encodes at a time
_NOT_THE_TOWER = ("architectures", "dtype", "torch_dtype", "transformers_version")


class Precision(NamedTuple):
    """Type of the tower's weights in a run, and the type that autocast computes in, if it is on."""

    weights: torch.dtype
    autocast: torch.dtype | None

    @property
    def stored(self) -> torch.dtype:
        """Type of the tokens as the projector's first layer takes them."""
        return self.autocast or self.weights


def check_cache_folder(folder: str) -> None:
    """Check that a cache can be there, before anything is loaded.

    Raises:
        NotADirectoryError: a part of its path is a file.
    """
    nearest = next(part for part in (Path(folder).absolute(), *Path(folder).absolute().parents) if part.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cache_visual_tokens={folder}: {nearest} is a file, not a folder; choose another one")


def cache_visual_tokens(folder: str, data: InstructionData, model: Any, training: TrainingArguments) -> CachedImages:
    """Encode the images that are not in the cache yet, shared out over the run's processes, and open it.

    All processes call this, before the Trainer is made (it would wrap the model, and DeepSpeed cast it).

    Args:
        folder: of all caches; on several nodes, on a disk that they share.
        data: what is trained on. If it notes records that it skips, images that cannot be read are left out.
        model: a LLaVA model, zipped as it will be trained.
        training: says device, precision and processes, and how many more processes read images.

    Raises:
        ValueError: the model's method chooses by what is behind the projector; or an image cannot be read, and the
            message names its record. The others are encoded by then.
        OSError: the disk is full or will be, or another process has not encoded its share.
    """
    tower = model.get_vision_tower()
    if tower.visionzip is not None and "projected" in method_of(tower.visionzip).reads:
        raise ValueError(
            f"cache_visual_tokens={folder}: method={tower.visionzip.method!r} chooses by what is behind the projector, "
            "which may learn, so that its choice cannot be kept: leave the cache out, or choose another method"
        )
    device = training.device  # asking for it sets up the processes
    precision = _precision(tower, training)
    names = dict.fromkeys(record["image"] for record in data.records if "image" in record)
    paths = {name: os.path.abspath(data.folder / name) for name in names}  # noqa: PTH100 - links stay as they are
    stamps, bad = _stamps(paths.values())
    _refuse(bad, paths, data)  # what is not there is known before the long work
    with gathered(tower.parameters()):
        recipe = _recipe(tower, precision, data)
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        setting = "vanilla" if tower.visionzip is None else "{}+{}".format(*tower.counts[:2])
        store = Path(folder) / f"{setting}-{key}"
        index = Index(store, precision.stored)
        # By place in the whole list, so that it does not matter what each process sees of the others' work already.
        own = list(stamps)[training.process_index :: training.world_size]
        todo = [path for path in own if (path, stamps[path]) not in index.by_path]
        if todo:
            _check_room(folder, len(todo) * training.world_size, tower, precision)
            quiet = (training.disable_tqdm and sys.stderr.isatty()) or training.process_index > 0
            bar = progress(len(own), "visual tokens", "images", len(own) - len(todo), quiet)
            images = _Images(todo, set(index.by_digest), data)
            loader = DataLoader(images, batch_size=_BATCH, num_workers=training.dataloader_num_workers, collate_fn=list)
            encode = _encoder(tower, precision, device)
            with bar, Writer(store, recipe) as writer:
                for batch in loader:
                    bad |= _encode_batch(batch, encode, index, writer)
                    bar.update(len(batch))
    shares = gather_object([(bool(todo), bad)])  # waits for all
    bad = {path: problem for _, problems in shares for path, problem in problems.items()}
    _refuse(bad, paths, data)
    if any(wrote for wrote, _ in shares):
        index = Index(store, precision.stored)
    entries = {name: index.by_path.get((path, stamps[path])) for name, path in paths.items() if path not in bad}
    if missing := [name for name, entry in entries.items() if entry is None]:
        raise OSError(
            f"{len(missing)} images are not in {store} although every process has done its share, such as "
            f"{missing[0]}: did they change just now? On several nodes, cache_visual_tokens must be on a disk that all "
            "nodes share"
        )
    problems = {name: bad[path] for name, path in paths.items() if path in bad}
    return CachedImages(store, precision.stored, entries, problems, blank_image(tower, precision.stored))


def drop_tower(model: Any) -> None:
    """Take the encoder's layers out of a model: they are not moved to the GPU, and cannot be run any more.

    Under ZeRO-3 they stay: each process has a part of them only, and DeepSpeed knows where.
    """
    if not is_deepspeed_zero3_enabled():
        model.get_vision_tower().encoder._modules.clear()


class _Images(Dataset):
    """Image files, as the tower takes them; a data loader's processes read them."""

    def __init__(self, paths: list[str], known: set[str], data: InstructionData) -> None:
        self.paths = paths
        self.known = known
        self.image_processor = data.image_processor
        self.model_config = data.model_config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``path`` and what is wrong as ``bad``; or ``stamp``, ``digest``, ``size`` and, if it is new, ``pixels``."""
        path = self.paths[index]
        try:
            item = {"path": path, "stamp": stamp_of(path)}
            item["digest"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if item["digest"] not in self.known:
                image = load_image(path, as_stored=True)
                pixels = process_images([image], self.image_processor, self.model_config)[0]
                item |= {"size": image.size, "pixels": pixels if pixels.ndim == 4 else pixels[None]}
        except UNUSABLE as error:  # told when all the others are encoded
            return {"path": path, "bad": str(error)}
        return item


def _encode_batch(
    batch: list[dict[str, Any]],
    encode: Callable[[Tensor], EncodedImage],
    index: Index,
    writer: Writer,
) -> dict[str, str]:
    """Encode and write some of the items of :class:`_Images`; returns what is wrong with which path."""
    good = [item for item in batch if "bad" not in item]
    new = [item for item in good if "pixels" in item]
    if new:
        counts = [len(item["pixels"]) for item in new]
        encoded = encode(torch.cat([item["pixels"] for item in new]))
        for item, own in zip(new, encoded.split(counts), strict=True):
            index.by_digest[item["digest"]] = writer.add_tokens(item["digest"], item["size"], own)
    for item in good:
        writer.add_line(item["path"], item["stamp"], index.by_digest[item["digest"]])
    return {item["path"]: item["bad"] for item in batch if "bad" in item}


def _encoder(tower: VisionTower, precision: Precision, device: torch.device) -> Callable[[Tensor], EncodedImage]:
    """The tower as the run would use it, of pixels (B, 3, h, w)."""
    if (tower.device, tower.dtype) != (device, precision.weights) and not is_deepspeed_zero3_enabled():
        tower = copy.deepcopy(tower).to(device, precision.weights)  # the model's own stays where and as it is

    @torch.no_grad()
    def encode(pixels: Tensor) -> EncodedImage:
        with torch.autocast(tower.device.type, precision.autocast, enabled=precision.autocast is not None):
            encoded = tower.encode(pixels.to(tower.device, tower.dtype)).to("cpu")
        return replace(encoded, tokens=encoded.tokens.to(precision.stored))

    return encode


def _precision(tower: VisionTower, training: TrainingArguments) -> Precision:
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if getattr(training, "deepspeed_plugin", None) is not None:  # casts the model, and does not use autocast
        return Precision(half or tower.dtype, None)
    return Precision(tower.dtype, half)


def _recipe(tower: VisionTower, precision: Precision, data: InstructionData) -> dict[str, Any]:
    """All that an image's tokens depend on, but the image."""
    weights = hashlib.sha256()
    for name, value in sorted(tower.encoder.state_dict().items()):
        if tower.needs(name):
            weights.update(name.encode())
            weights.update(value.to("cpu", precision.weights).contiguous().flatten().view(torch.uint8).numpy())
    config = tower.config.to_dict()
    return {
        "format": _FORMAT,
        "tower": {key: config[key] for key in sorted(config) if key[0] != "_" and key not in _NOT_THE_TOWER},
        "tower_weights": weights.hexdigest(),
        "select": [tower.select_layer, tower.select_feature],
        "visionzip": None if tower.visionzip is None else tower.visionzip.to_dict(),
        "precision": [str(dtype) for dtype in precision],
        "image_processor": json.loads(data.image_processor.to_json_string()),
        "image_aspect_ratio": getattr(data.model_config, "image_aspect_ratio", None),
        "image_grid_pinpoints": getattr(data.model_config, "image_grid_pinpoints", None),
    }


def blank_image(tower: VisionTower, dtype: torch.dtype) -> EncodedImage:
    """An image of one tile of zeros, with all that the tower makes of one."""
    setting = tower.visionzip
    tokens = tower.num_patches if setting is None else tower.counts.total
    sizes = torch.ones(1, tokens) if setting is not None and has_size_bias(setting) else None
    kept = None if setting is None else torch.zeros(1, tokens, dtype=torch.long)
    return EncodedImage(torch.zeros(1, tokens, tower.hidden_size, dtype=dtype), kept, sizes)


def _check_room(folder: str, images: int, tower: VisionTower, precision: Precision) -> None:
    """Check that so many images of one tile each have room on the disk."""
    blank = blank_image(tower, precision.stored)
    parts = (blank.tokens, blank.kept.int() if blank.kept is not None else None, blank.sizes)
    needed = images * sum(part.nbytes for part in parts if part is not None)
    nearest = next(part for part in (Path(folder).absolute(), *Path(folder).absolute().parents) if part.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise OSError(
            f"cache_visual_tokens={folder} has {free / 1e9:.1f} GB free, but the tokens of {images} images take at "
            f"least {needed / 1e9:.1f} GB: make room, choose a folder on another disk, or lower the budget of VisionZip"
        )


def _stamps(paths: Iterable[str]) -> tuple[dict[str, Stamp], dict[str, str]]:
    """Of each file, and what is wrong with those that are not there."""
    stamps: dict[str, Stamp] = {}
    bad: dict[str, str] = {}
    for path in paths:
        try:
            stamps[path] = stamp_of(path)
        except OSError:
            bad[path] = f"no image file at {path}"
    return stamps, bad


def _refuse(bad: dict[str, str], paths: dict[str, str], data: InstructionData) -> None:
    """Say which record has an image that cannot be read, unless such records are skipped."""
    if data.skipped is not None:
        return
    for index, record in enumerate(data.records):
        if problem := bad.get(paths.get(record.get("image"))):
            others = f" ({len(bad) - 1} more images cannot be read)" if len(bad) > 1 else ""
            raise ValueError(f"record {record.get('id', index)!r} cannot be used: {problem}{others}")
