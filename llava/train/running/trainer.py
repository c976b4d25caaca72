"""Transformers' Trainer, with what LLaVA and the ways to train a part of it need."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.storage.files import writing
from llava.train.labels import attention_apart
from llava.train.running.outputs import gather_learnt, load_learnt, save_learnt
from llava.train.running.steady import SteadyTrainer
from llava.train.sampling import ModalityLengthSampler
from visionzip.apply import unwrap


class LlavaTrainer(SteadyTrainer):
    """Trainer that knows the projector's own learning rate, LLaVA's order of the data, and turns that stay apart.

    Where a part of the model is learnt, a checkpoint has that part only, in the files of the result. What is logged has
    ``samples_per_second`` of all processes, ``visual_tokens_per_image`` that reach the language model,
    ``peak_memory_gib`` of the first process (of its GPU, if it has one), ``cut_samples``, how many prompts of the run
    were too long and lost their end, and ``cut_answers``, how many lost all that was to be learnt with it.

    Args:
        learns_part: only a part of the model is learnt.
        *args: as the SteadyTrainer's, as are the ``**kwargs``.
    """

    def __init__(self, *args: Any, learns_part: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.learns_part = learns_part
        self._text: tuple[Tensor, Tensor] | None = None
        self._since: float | None = None
        # samples, images, their tokens, prompts that were cut, and those that have lost all answers
        self._counts = torch.zeros(5, dtype=torch.float64)
        self._llava = llava = unwrap(self.model)
        llava.loss_function = self._count_answers(llava.loss_function)
        llava.model.register_forward_pre_hook(self._count_prompts, with_kwargs=True)
        if learns_part:
            # DeepSpeed's checkpoints have what is learnt only, but it takes what is missing in them for an error.
            self.model.register_load_state_dict_post_hook(_expect_learnt)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where the batch has ``turns``, each sees itself and what all share."""
        self._since = self._since or time.perf_counter()
        text = inputs["attention_mask"].bool()
        is_image = text & (inputs["input_ids"] == IMAGE_TOKEN_INDEX)
        self._text = (text & ~is_image).sum(dim=1), is_image.sum(dim=1)
        if (turns := inputs.pop("turns", None)) is not None:
            input_ids, labels, mask = (inputs.pop(name) for name in ("input_ids", "labels", "attention_mask"))
            images, sizes = inputs.pop("images", None), inputs.pop("image_sizes", None)
            llava = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():  # turns go where labels would: both follow the text around the image
                prepared, _, token_sizes = llava.prepare(input_ids, None, mask, None, turns, images, sizes)
            _, own_positions, seen, _, embeds, turns = prepared
            self._count(seen)
            expanded = torch.full_like(turns, IGNORE_INDEX)
            for row, own, text, places in zip(
                expanded, labels, mask.bool() & (input_ids != IMAGE_TOKEN_INDEX), turns >= 0, strict=True
            ):
                row[places] = own[text][: int(places.sum())]
            turns = torch.where(turns >= 0, turns, seen.long() - 1)  # visual tokens are in the common start
            seen, positions = attention_apart(turns, own_positions)
            inputs = {"inputs_embeds": embeds, "labels": expanded, "attention_mask": seen, "position_ids": positions}
            if token_sizes is not None:
                inputs["token_sizes"] = token_sizes
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count_answers(self, loss_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Count the samples that have nothing to learn left, where the loss gets their labels (B, L')."""

        def counted(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            lost = (labels[:, 1:] == IGNORE_INDEX).all(dim=1).sum()
            self._counts = self._counts.to(lost.device)
            self._counts[4] += lost
            return loss_function(logits, labels, *args, **kwargs)

        return counted

    def _count_prompts(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if module.training and mask is not None and mask.ndim == 2:
            self._count(mask)

    def _count(self, mask: Tensor) -> None:
        """Add a batch to the counts: the mask (B, L') of prompts with visual tokens, against what was text of them."""
        if self._text is None:
            return
        (text, images), self._text = self._text, None
        lengths = mask.sum(dim=1)
        limit = getattr(self.model.config, "tokenizer_model_max_length", None) or torch.inf
        # By the model at a position, far before which the last token that is left may stand; or when they were batched.
        by_model = getattr(self._llava, "cut_prompts", (False,) * len(mask))  # a language model alone cuts none
        cut = torch.tensor(by_model, device=mask.device) | (lengths >= limit)
        images, tokens = images.masked_fill(cut, 0), (lengths - text).masked_fill(cut, 0)
        counts = torch.stack([torch.ones_like(text).sum(), images.sum(), tokens.sum(), cut.sum(), cut.sum() * 0])
        self._counts = self._counts.to(counts.device) + counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with throughput, visual tokens and memory beside the loss."""
        if "loss" in logs and self._since is not None:
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            counts = self._counts.to(torch.float32)
            samples, images, tokens, cut, lost = self.accelerator.reduce(counts, "sum").tolist()
            self._counts.zero_()
            logs["samples_per_second"] = round(samples / seconds, 3)
            if images:
                logs["visual_tokens_per_image"] = round(tokens / images, 2)
            logs["peak_memory_gib"] = round(peak_memory() / 2**30, 3)
            logs["cut_samples"] = int(cut) + self.logged("cut_samples")
            logs["cut_answers"] = int(lost) + self.logged("cut_answers")
        super().log(logs, start_time)

    def logged(self, name: str) -> int:
        """What was logged last under a name that the whole run counts; 0 before the first step."""
        return next((entry[name] for entry in reversed(self.state.log_history) if name in entry), 0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        return ModalityLengthSampler(
            self.train_dataset.modality_lengths(),
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices only, and the projector's learning rate where one is given."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves one here
                groups.setdefault(("mm_projector" in name, dimensions > 1), []).append(parameter)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, or what is learnt (:func:`llava.train.running.outputs.save_learnt`); all processes call it."""
        if self.learns_part:
            weights = gather_learnt(self.model)
            if self.args.should_save:
                save_learnt(self.model, weights, Path(output_dir or self.args.output_dir))
            if _internal_call:  # for a checkpoint
                self.save_arguments(output_dir)
        else:
            safe = "Checkpoints are whole: the same command goes on at the last one"
            with writing(output_dir or self.args.output_dir, safe):
                super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.learns_part:  # without what is frozen, which the base has
            engine = self.model_wrapped
            save = functools.partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
            engine.save_checkpoint = save
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.learns_part:
            load_learnt(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _expect_learnt(model: nn.Module, found: Any) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    found.missing_keys[:] = [name for name in found.missing_keys if name not in frozen]


def peak_memory() -> int:
    """The most bytes that this process has had: on its GPU if it uses one, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
