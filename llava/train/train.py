"""LLaVA's two training stages on transformers' Trainer, with LLaVA's argument names.

    … --model_name_or_path BASE --vision_tower TOWER --tune_mm_mlp_adapter True --version plain --data_path …
    … --model_name_or_path BASE --vision_tower TOWER --pretrain_mm_mlp_adapter FILE --data_path …

(``python -m llava.train.train`` in front.) The first learns the projector between a vision tower and a language model
that are both kept as they are, from captions; the second the projector and the language model, from conversations. A
LLaVA checkpoint as the base goes on with its own tower and projector; ``--visionzip_dominant`` and
``--visionzip_contextual`` train with VisionZip on. A run that was stopped goes on where it was when it is started
again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, HfArgumentParser, Trainer, set_seed

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.loading import load_weights
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.tokenizer import load_tokenizer
from llava.train.data import Collator, InstructionData, attention_apart
from llava.train.run import TrainingArguments, finish, last_checkpoint, leave_together
from visionzip import visionzip


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
    attn_implementation: str | None = field(default=None, metadata={"help": "attention kernel: sdpa, eager, …"})
    visionzip_dominant: int | None = field(default=None, metadata={"help": "train with VisionZip: tokens to keep"})
    visionzip_contextual: int | None = field(default=None, metadata={"help": "train with VisionZip: merged tokens"})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "json file in LLaVA's format"})
    image_folder: str | None = field(default=None, metadata={"help": "where the images are"})
    image_aspect_ratio: str = field(default="square", metadata={"help": "'pad' pads images to a square"})
    data_fraction: float = field(default=1.0, metadata={"help": "share of the records to use, drawn by data_seed"})
    turns_apart: bool = field(
        default=False,
        metadata={"help": "questions of a record see its image, but not each other (eager or sdpa)"},
    )


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """Transformers' arguments, and LLaVA's two."""

    mm_projector_lr: float | None = field(default=None, metadata={"help": "another learning rate for the projector"})
    model_max_length: int = field(default=2048, metadata={"help": "longest text in tokens; the rest is cut"})


class LlavaTrainer(Trainer):
    """Trainer with a learning rate of its own for the projector, and with turns that do not see each other."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where the batch has ``turns``, each sees itself and what all share."""
        if (turns := inputs.pop("turns", None)) is not None:
            input_ids, labels, mask = (inputs.pop(name) for name in ("input_ids", "labels", "attention_mask"))
            llava = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():  # turns go where labels would: both follow the text around the image
                _, _, seen, _, embeds, turns = llava.prepare_inputs_labels_for_multimodal(
                    input_ids, None, mask, None, turns, inputs.pop("images", None)
                )
            expanded = torch.full_like(turns, IGNORE_INDEX)
            for row, own, text, places in zip(
                expanded, labels, mask.bool() & (input_ids != IMAGE_TOKEN_INDEX), turns >= 0, strict=True
            ):
                row[places] = own[text][: int(places.sum())]
            turns = torch.where(turns >= 0, turns, seen.long() - 1)  # visual tokens are in the common start
            seen, positions = attention_apart(turns)
            inputs = {"inputs_embeds": embeds, "labels": expanded, "attention_mask": seen, "position_ids": positions}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices only, and the projector's learning rate where one is given."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("mm_projector" in name, parameter.ndim > 1), []).append(parameter)
        own = self.args.mm_projector_lr
        projector_lr = self.args.learning_rate if own is None else own
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": projector_lr if is_projector else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (is_projector, decays), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer


def build_model(arguments: ModelArguments, data: DataArguments) -> tuple[Any, Any, Any]:
    """The tokenizer, the model to train and the image processor (None for text only).

    A language model and a vision tower become a new LLaVA, its projector random or from ``pretrain_mm_mlp_adapter``; a
    LLaVA and a vision tower become one with that tower.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the weights do not fit, or the arguments need a vision tower and there is none.
    """
    path = arguments.model_name_or_path
    base = AutoConfig.from_pretrained(path)
    options: dict[str, Any] = {"dtype": torch.float32}  # of the weights; the Trainer computes in bf16 if it is told to
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    is_llava = bool(getattr(base, "mm_vision_tower", None))
    if is_llava and arguments.vision_tower is None:
        tokenizer, model, image_processor, _ = load_pretrained_model(path, **options)
        return tokenizer, model, image_processor
    tokenizer = load_tokenizer(path)
    if arguments.vision_tower is None:
        budgets = arguments.visionzip_dominant, arguments.visionzip_contextual
        if arguments.tune_mm_mlp_adapter or arguments.pretrain_mm_mlp_adapter or budgets != (None, None):
            raise ValueError(
                f"{path} is a language model, without projector and visual tokens: give a vision_tower, or leave "
                "tune_mm_mlp_adapter, pretrain_mm_mlp_adapter and visionzip_… out"
            )
        return tokenizer, AutoModelForCausalLM.from_pretrained(path, **options), None
    width = CLIPVisionConfig.from_pretrained(arguments.vision_tower).hidden_size
    other = ("model_type", "architectures")
    values = {k: v for k, v in base.to_dict().items() if k not in other and not k.startswith("mm_")}
    values.pop("image_aspect_ratio", None)
    config = LlavaConfig(
        **values,
        mm_vision_tower=arguments.vision_tower,
        mm_hidden_size=width,
        mm_projector_type=arguments.mm_projector_type,
        mm_vision_select_layer=arguments.mm_vision_select_layer,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio=data.image_aspect_ratio,
    )
    extra: dict[str, Tensor] = {}
    if arguments.pretrain_mm_mlp_adapter:
        extra = load_weights(arguments.pretrain_mm_mlp_adapter)
    elif not is_llava:
        extra = {f"model.mm_projector.{k}": v for k, v in build_vision_projector(config).state_dict().items()}
    config._name_or_path = ""  # a LLaVA's folder has the image processor of its own encoder, and its weights
    tower = build_vision_tower(config)
    weights = tower.encoder.state_dict()
    extra |= {f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in weights.items()}
    model = LlavaLlamaForCausalLM.from_pretrained(path, config=config, extra_weights=extra, **options)
    model.get_vision_tower().image_processor = tower.image_processor
    return tokenizer, model, tower.image_processor


@torch.inference_mode()
def whiten_projector(model: Any, images: Tensor) -> None:
    """Start an MLP projector so that nothing of the features drowns in their mean and their few largest directions.

    The features of a tower are read in the middle of its residual stream, where a mean and a direction or two can hold
    nearly all of their size; a random projector passes that on, and the rest is learnt late or never. Here the first
    layer takes the mean off and gives all directions the same variance, and the last one gives tokens the size of the
    language model's embeddings. The architecture is as before.

    Args:
        model: a LLaVA whose projector is an MLP.
        images: (B, 3, h, w), some of the training images.

    Raises:
        ValueError: the projector is no MLP.
    """
    projector = model.get_model().mm_projector
    if not isinstance(projector, nn.Sequential) or len(projector) < 3:
        raise ValueError("whiten_mm_projector needs an MLP projector: set mm_projector_type to mlp2x_gelu")
    features = model.get_vision_tower()(images).flatten(0, 1).double()
    mean = features.mean(dim=0)
    variances, directions = torch.linalg.eigh((features - mean).T.cov())
    # Directions with next to no variance are noise, which is not to be blown up.
    scale = (variances.clamp(min=0) + 0.02 * variances.mean()).rsqrt()
    first, last = projector[0], projector[-1]
    weight = nn.init.orthogonal_(torch.empty_like(first.weight)).double() @ torch.diag(scale) @ directions.T
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ mean)
    hidden = projector[:-1](features.to(first.weight.dtype))
    last.weight.normal_(std=float(model.get_input_embeddings().weight.std() / hidden.square().sum(dim=1).mean().sqrt()))
    last.bias.zero_()


def train(arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments) -> None:
    """Run one stage, from its last checkpoint if there is one, and save what it learnt.

    Writes into ``output_dir``: the model (or, with ``tune_mm_mlp_adapter``, ``mm_projector.safetensors`` and the
    config), ``run.json`` (arguments, versions, losses) and ``losses.png``.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the data or the weights do not fit.
    """
    set_seed(training.seed)
    tokenizer, model, image_processor = build_model(arguments, data)
    if data.turns_apart and (image_processor is None or "flash" in model.config._attn_implementation):
        raise ValueError("turns_apart needs a vision tower, and attention that takes a mask: eager or sdpa")
    dataset = InstructionData(
        data.data_path,
        data.image_folder,
        tokenizer,
        arguments.version,
        image_processor,
        model.config,
        data.data_fraction,
        42 if training.data_seed is None else training.data_seed,
        data.turns_apart,
    )
    if arguments.whiten_mm_projector:
        whiten_projector(model, torch.stack([dataset[index]["image"] for index in range(min(256, len(dataset)))]))
    if arguments.visionzip_dominant is not None or arguments.visionzip_contextual is not None:
        visionzip(model, arguments.visionzip_dominant, arguments.visionzip_contextual)
    model.config.use_cache = False
    if arguments.tune_mm_mlp_adapter:
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
    trainer = LlavaTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=Collator(tokenizer, training.model_max_length),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir))
    model.config.use_cache = True
    if not trainer.is_world_process_zero():
        return
    output = Path(training.output_dir)
    if arguments.tune_mm_mlp_adapter:
        weights = {k: v.contiguous() for k, v in model.state_dict().items() if "mm_projector" in k}
        save_file(weights, output / "mm_projector.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(output)
        image_processor.save_pretrained(output)  # the base's folder may be the only one that has it
    else:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    records = [record.get("id") for record in dataset.records] if data.data_fraction < 1 else len(dataset)
    finish(trainer, {"model": arguments, "data": data}, {"records": records})


def main() -> int:
    """The command: parse LLaVA's arguments and train; bad input is one line and exit status 2."""
    arguments, data, training = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments), description=__doc__
    ).parse_args_into_dataclasses()
    try:
        train(arguments, data, training)
        leave_together()
    except (ValueError, OSError, ImportError) as error:
        print(f"llava.train.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
