"""What ``python -m llava.train.train`` can be told, with LLaVA's argument names, and what cannot go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled, is_tensorboard_available, is_wandb_available
from transformers.utils import is_peft_available

from llava.model.checkpoints.files import checkpoint_path
from llava.storage.fingerprint import checksum, fingerprint
from llava.train.data import Record
from llava.train.running.checkpoints import records_digest, what_decides_steps
from llava.train.running.run import TrainingArguments, check_finite
from visionzip import VisionZipConfig
from visionzip.methods import method_of

_DECIDING_DATA = ("data_path", "image_aspect_ratio", "data_fraction", "turns_apart")
_DECIDING_TRAINING = ("learning_rate", "mm_projector_lr", "weight_decay", "seed", "data_seed", "model_max_length")
_PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path")


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "language model or LLaVA checkpoint to start from"})
    vision_tower: str | None = field(
        default=None, metadata={"help": "encoder for a language model (none: text only), or another one for a LLaVA"}
    )
    version: str = field(default="v1", metadata={"help": "prompt template; 'plain' for captions"})
    mm_projector_type: str = field(default="mlp2x_gelu", metadata={"help": "projector of a new LLaVA"})
    mm_vision_select_layer: int = field(default=-2, metadata={"help": "hidden state that a new LLaVA reads"})
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "projector to start from (a file)"})
    whiten_mm_projector: bool = field(
        default=False, metadata={"help": "start the projector from the features' own mean and covariance"}
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "learn the projector only"})
    lora_enable: bool = field(default=False, metadata={"help": "learn the projector and a LoRA adapter"})
    lora_r: int = field(default=128, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=256, metadata={"help": "the adapter's weight is alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "of the adapter's input"})
    bits: int = field(default=16, metadata={"help": "4 or 8 quantises the language model (with lora_enable)"})
    attn_implementation: str | None = field(default=None, metadata={"help": "attention kernel: sdpa, eager, …"})
    visionzip_dominant: int | None = field(default=None, metadata={"help": "train with VisionZip: tokens to keep"})
    visionzip_contextual: int | None = field(default=None, metadata={"help": "train with VisionZip: merged tokens"})
    visionzip_method: str | None = field(
        default=None,
        metadata={"help": "another method of choosing than VisionZip's, of as many tokens in all (visionzip-plus, …)"},
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_finite(self)

    @property
    def budget(self) -> dict[str, Any]:
        """VisionZip's setting as far as it is given; nothing leaves the model as it is."""
        counts = {"dominant": self.visionzip_dominant, "contextual": self.visionzip_contextual}
        given = {name: count for name, count in counts.items() if count is not None}
        if self.visionzip_method in (None, "visionzip"):
            return given
        return {"method": self.visionzip_method, **({"keep": sum(given.values())} if given else {})}

    @property
    def learns_part(self) -> bool:
        """Whether most of the model stays as it is, so that outputs and checkpoints need only what is learnt."""
        return self.tune_mm_mlp_adapter or self.lora_enable

    @property
    def needs_tower(self) -> bool:
        """Whether it says so: that the model has a vision tower, or is to get one."""
        return bool(self.vision_tower or self.learns_part or self.pretrain_mm_mlp_adapter or self.budget)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "json file in LLaVA's format"})
    image_folder: str | None = field(default=None, metadata={"help": "where the images are"})
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={"help": "'pad' to a square, 'square' crops, 'anyres' makes tiles (default: the LLaVA's own)"},
    )
    data_fraction: float = field(default=1.0, metadata={"help": "share of the records to use, drawn by data_seed"})
    cache_visual_tokens: str | None = field(
        default=None, metadata={"help": "folder: encode each image once, and train without the vision tower"}
    )
    skip_bad_samples: bool = field(default=False, metadata={"help": "leave out records that cannot be used, and count"})
    turns_apart: bool = field(
        default=False,
        metadata={"help": "questions of a record see its image, but not each other (eager or sdpa)"},
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_finite(self)


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """Transformers' arguments, and LLaVA's."""

    mm_projector_lr: float | None = field(default=None, metadata={"help": "another learning rate for the projector"})
    model_max_length: int | None = field(
        default=None, metadata={"help": "longest prompt in tokens, the rest is cut (default: the LLaVA's own, or 2048)"}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches with an image and of text only, of about the same length"}
    )


def weight_dtype(arguments: ModelArguments, training: LlavaTrainingArguments) -> torch.dtype:
    """The type to load weights in.

    What is learnt needs float32 somewhere: DeepSpeed keeps such copies itself, else the weights have to be that. What
    is frozen does not.
    """
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return half if training.deepspeed or arguments.learns_part else torch.float32


def what_decides(
    arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments, records: Sequence[Record]
) -> dict[str, Any]:
    """What a run's weights follow from, but for its length: with another value it is another run.

    Of files and folders the last name counts, as they may move, and what is in them: checksums of the models' weights
    and of the records (not of the images).
    """
    found = {name: value for name, value in asdict(arguments).items() if name != "attn_implementation"}
    found |= {name: getattr(data, name) for name in _DECIDING_DATA}
    found |= {name: getattr(training, name) for name in _DECIDING_TRAINING}
    found = {name: Path(value).name if name in _PATHS and value else value for name, value in found.items()}
    found |= {"records": records_digest(records), **what_decides_steps(training)}
    for name in ("model_name_or_path", "vision_tower"):
        if path := getattr(arguments, name):
            found[f"{name} content"] = fingerprint(path)[:16]
    if arguments.pretrain_mm_mlp_adapter:
        found["pretrain_mm_mlp_adapter content"] = checksum(Path(arguments.pretrain_mm_mlp_adapter))[:16]
    return found


def check_arguments(arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments) -> None:
    """Find what does not go together or is not there, before anything is read.

    Raises:
        FileNotFoundError: the model, its vision tower or the projector to start from is not there.
        NotADirectoryError: the output folder is a file.
        ValueError: arguments do not go together.
        ImportError: a library is not installed.
    """
    if arguments.tune_mm_mlp_adapter and arguments.lora_enable:
        raise ValueError(
            "tune_mm_mlp_adapter learns the projector only, lora_enable the projector and an adapter: give one"
        )
    if arguments.bits not in (4, 8, 16):
        raise ValueError(f"bits={arguments.bits} is not 4, 8 or 16 (16: not quantised)")
    if arguments.bits < 16 and not arguments.lora_enable:
        raise ValueError(f"bits={arguments.bits} needs lora_enable: quantised weights cannot be trained themselves")
    if arguments.bits < 16 and is_deepspeed_zero3_enabled():
        raise ValueError(f"bits={arguments.bits} and ZeRO-3 do not go together: use zero2.json, or no deepspeed")
    _check_values(arguments, data, training)
    for name in ("model_name_or_path", "vision_tower"):
        if path := getattr(arguments, name):
            checkpoint_path(path, name)
    projector = arguments.pretrain_mm_mlp_adapter
    if projector and not Path(projector).is_file():
        raise FileNotFoundError(f"pretrain_mm_mlp_adapter={projector} is no file")
    output = Path(training.output_dir)
    nearest = next(part for part in (output, *output.absolute().parents) if part.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir={output}: {nearest} is a file, not a folder")
    if arguments.lora_enable and not is_peft_available():
        raise ImportError("lora_enable needs peft: pip install peft")
    for name, is_there in (("wandb", is_wandb_available), ("tensorboard", is_tensorboard_available)):
        if name in training.report_to and not is_there():
            raise ImportError(f"report_to {name} needs it installed: pip install {name}, or report_to none")


def _check_values(arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments) -> None:
    method_of(VisionZipConfig(**arguments.budget))
    if data.image_aspect_ratio not in (None, "pad", "square", "anyres"):
        raise ValueError(f"image_aspect_ratio={data.image_aspect_ratio!r} is not pad, square or anyres")
    counts = {"lora_r": arguments.lora_r, "model_max_length": training.model_max_length}
    counts |= {name: getattr(training, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    if low := [f"{name}={count}" for name, count in counts.items() if count is not None and count < 1]:
        raise ValueError(f"{low[0]} is below 1: give a number of at least 1")
    if training.save_strategy == "steps" and training.save_steps <= 0:
        raise ValueError(f"save_steps={training.save_steps:g} is not above 0: to save no checkpoints, save_strategy no")
    if training.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor} does not work here: it takes labels and logits "
            "to be of one length, but visual tokens make the logits longer. Leave it out"
        )
