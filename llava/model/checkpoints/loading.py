"""Loading that fails loudly: every weight of the model has to come from somewhere, every one of the file has to go."""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from llava.model.checkpoints.files import weight_shapes

logger = logging.getLogger(__name__)

NEWLINE = "model.image_newline"  # LLaVA-NeXT's; of no use where the merge type is flat
# Buffers that older transformers saved with the weights; they are computed now.
OBSOLETE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# Arguments of from_pretrained with which the weights are not in a checkpoint's usual files.
_OTHER_SOURCES = {"gguf_file", "key_mapping", "subfolder", "use_safetensors", "variant"}


def check_device(name: str, flag: bool = False) -> str:
    """A device's name, checked before anything is built there.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …
        flag: whether it is of the flag ``--device``, for the message.

    Raises:
        ValueError: torch knows no such device, nothing can be computed on it, or this machine has none.
    """
    given, cpu = (f"--device {name}", "--device cpu") if flag else (f"device={name!r}", "device='cpu'")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{given} is no device: use cuda or cpu") from error
    if device.type == "cuda":  # asked without starting CUDA in this process
        if not torch.cuda.is_available():
            raise ValueError(f"{given} was asked for but this machine has no CUDA: use {cpu}")
        if (device.index or 0) >= (number := torch.cuda.device_count()):
            raise ValueError(f"{given} was asked for but this machine has {number} such devices, counted from 0")
        return name
    try:
        usable = device.type != "meta" and torch.zeros(1, device=device).item() == 0
    except Exception:  # each backend that is not there has its own
        usable = False
    if not usable:
        raise ValueError(f"{given} was asked for but nothing can be computed on it here: use cuda or cpu")
    return name


def check_finite_weights(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Check weights that a training may have left, which are few: projector, newline, adapter.

    Args:
        weights: by name; of what is elsewhere (ZeRO-3, offloading) the part that is here is looked at.
        source: where they come from, for the message.

    Raises:
        ValueError: some are NaN or infinite; the message names them.
    """
    here = {key: getattr(value, "ds_tensor", value).detach() for key, value in weights.items()}
    bad = [
        key
        for key, value in here.items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if bad:
        raise ValueError(
            f"{len(bad)} weights from {source} are NaN or infinite, such as {bad[0]}: the training that wrote them has "
            "failed. Give another checkpoint, or train it again with a lower learning rate"
        )


def main_dtype(weights: Iterable[Tensor]) -> torch.dtype:
    """Type of most of the values in some weights, which may be meta tensors."""
    sizes: dict[torch.dtype, int] = {}
    for value in weights:
        sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=sizes.__getitem__)


def check_weights(model: Any, found: dict[str, tuple[int, ...]], extra_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compare a checkpoint with the model by names and shapes, before anything large is read.

    Args:
        model: a LLaVA model; it may be on the meta device.
        found: names and shapes of the checkpoint's weights.
        extra_weights: weights by name that replace or complete the checkpoint's.

    Returns:
        ``extra_weights``, and the vision tower's own weights if neither they nor the checkpoint has them.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: weights are missing, unexpected, or of another shape; the message names them.
    """
    shapes = _shapes(model)
    tied = {key for pair in model.all_tied_weights_keys.items() if found.keys() & set(pair) for key in pair}
    info = {
        "missing_keys": shapes.keys() - found.keys() - tied,
        "unexpected_keys": found.keys() - shapes.keys(),
        "mismatched_keys": {
            (key, found[key], shape) for key, shape in shapes.items() if key in found and found[key] != shape
        },
    }
    return _complete(model, info, extra_weights)


def settle_weights(model: Any, info: dict[str, Any], extra_weights: dict[str, Tensor]) -> None:
    """Complete a model that transformers has just loaded, and refuse one that would be partly random.

    Args:
        model: a LLaVA model.
        info: transformers' loading info.
        extra_weights: weights by name, put over the loaded ones.

    Raises:
        ValueError: weights are missing, unexpected, of another shape, or not finite; the message names them.
        RuntimeError: the place of an extra weight has been offloaded.
    """
    extra_weights = _complete(model, info, extra_weights)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad(), gathered(own[key] for key in extra_weights):
        for key, value in extra_weights.items():
            if own[key].is_meta:
                raise RuntimeError(
                    f"{key} does not come from the checkpoint itself and was offloaded before it could be loaded: give "
                    "the model room (a smaller one, load_8bit, or device_map={'model.vision_tower': 0, …})"
                )
            own[key].copy_(value)
    trained = {key: value for key, value in own.items() if "projector" in key or key == NEWLINE}
    check_finite_weights(trained, model.config.name_or_path)
    for prefix, tower in model.towers().items():
        absent = {key for key in info["missing_keys"] if key.startswith(prefix)} - extra_weights.keys()
        model._keys_to_ignore_on_save |= absent  # not to write what is random
        tower.untrained = frozenset(key.removeprefix(prefix) for key in absent)
        tower.is_loaded = True


def _complete(model: Any, info: dict[str, Any], extra_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``extra_weights`` and what else the model needs; ValueError if that does not fit."""
    shapes = _shapes(model)
    missing = set(info["missing_keys"]) - extra_weights.keys()
    unexpected = {key for key in info["unexpected_keys"] if key != NEWLINE and not OBSOLETE.search(key)}
    unexpected |= extra_weights.keys() - shapes.keys()
    found = {key: tuple(shape) for key, shape, _ in info["mismatched_keys"]}
    found |= {key: tuple(value.shape) for key, value in extra_weights.items() if key in shapes}
    mismatched = {
        f"{key} (model {shapes[key]}, checkpoint {shape})" for key, shape in found.items() if shape != shapes[key]
    }
    from_files = {}  # towers of which the checkpoint has nothing
    for prefix, tower in model.towers().items():
        needed = {key for key in shapes if key.startswith(prefix) and tower.needs(key.removeprefix(prefix))}
        if needed <= missing:
            from_files[prefix], needed = tower, set()
        missing = {key for key in missing if not key.startswith(prefix) or key in needed}
    problems = [
        f"{len(keys)} {problem}, such as {', '.join(sorted(keys)[:3])}"
        for problem, keys in (
            ("missing from the checkpoint", missing),
            ("not part of the model", unexpected),
            ("of another shape than the model's", mismatched),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights in {model.config.name_or_path} do not fit {type(model).__name__}: {'; '.join(problems)}. The "
            "checkpoint is incomplete or its config.json belongs to another model; a projector or LoRA alone needs "
            "model_base"
        )
    return extra_weights | {
        prefix + key: value for prefix, tower in from_files.items() for key, value in tower.read_weights().items()
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all weights by name, also where ZeRO-3 has left none of them on this rank."""
    weights = model.state_dict(keep_vars=True)
    return {key: tuple(getattr(value, "ds_shape", value.shape)) for key, value in weights.items()}


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have these parameters whole during the block where ZeRO-3 partitions them; what rank 0 writes is kept."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # noqa: PLC0415 - optional, and there if ZeRO-3 is on

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


@contextmanager
def no_load_report() -> Iterator[None]:
    """Keep back transformers' table of missing and unexpected weights, in this thread.

    It lists what is as it should be (the vision tower's weights come from its own folder), and what is not is an error
    here. Everything else that transformers logs still comes through.
    """
    thread = threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_report = "LOAD REPORT" in message and "CONVERSION" not in message
        return record.thread != thread or not is_report

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_wanted)
    try:
        yield
    finally:
        source.removeFilter(is_wanted)


class CheckedLoading:
    """``from_pretrained`` and ``save_pretrained`` of models with vision towers, which lose no weight unsaid.

    Mixed in before transformers' own class. It has ``get_vision_tower()`` and ``towers()``.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        extra_weights: dict[str, Tensor] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, and fail if a weight of the model is not in it or one of it not in the model.

        The vision tower's weights come from ``config.mm_vision_tower`` where the checkpoint has none. Everything else
        as in transformers. A local checkpoint is checked by names and shapes before anything large is read.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            *args: as in transformers, as are the ``**kwargs``.
            extra_weights: weights by name that replace or complete the checkpoint's (a tuned projector).
            output_loading_info: return the loading info too.
            **kwargs: ``config``, ``dtype``, ``device_map``, ``attn_implementation``, ``quantization_config``, …

        Raises:
            OSError: a file is missing or damaged.
            ValueError: a weight is missing, unexpected, of another shape, or not finite (of those that are trained
                most: projector and newline).
        """
        path, weights = pretrained_model_name_or_path, extra_weights or {}
        if path is not None and Path(path).is_dir() and not kwargs.keys() & _OTHER_SOURCES:
            config = copy.deepcopy(kwargs.pop("config", None))
            if not isinstance(config, PretrainedConfig):
                own = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}  # "auto" is no type
                config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
                kwargs |= own
            config.name_or_path = str(path)
            kwargs["config"] = config
            if getattr(config, "quantization_config", None) is None:
                found = weight_shapes(path)
                if NEWLINE in found or NEWLINE in weights:
                    config.mm_image_newline = True
                with torch.device("meta"):
                    model = cls(copy.deepcopy(config))
                weights = check_weights(model, found, weights)
        kwargs["ignore_mismatched_sizes"] = True  # settle_weights names them, and an extra weight may replace them
        with no_load_report():
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        settle_weights(model, info, weights)
        for tower in model.towers().values():
            tower.requires_grad_(False)  # loading has made new, trainable parameters
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save with the original keys, as transformers does; what the vision tower needs is put beside the weights.

        Encoder weights that the checkpoint never had are left out again (see ``settle_weights``).
        """
        tower = self.get_vision_tower()
        if tower is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        for each in self.towers().values():
            setattr(self.config, each.config_key, each.config.to_diff_dict())
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        try:
            tower.image_processor.save_pretrained(save_directory)
        except OSError as error:
            logger.warning("saved without the image processor: %s", error)
